"""Runs an exported .pte from Python."""
