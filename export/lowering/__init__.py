"""The stages from the eager model to the file: tracing, lowering for a backend, assembly and writing."""
