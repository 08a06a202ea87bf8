"""Readers of checkpoints, one module per layout; export.checkpoints.layouts has the table of layouts."""
