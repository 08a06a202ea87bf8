"""The contents of a file: the contract between export and the runtimes."""
