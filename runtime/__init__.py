"""The Python runtime, which runs exported .pte files."""
