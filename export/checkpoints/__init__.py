"""One module per layout of checkpoint; export.checkpoints.layouts has the table of them."""
