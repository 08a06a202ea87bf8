"""The common parts of the commands."""
