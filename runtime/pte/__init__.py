"""What a file carries: the contract between export and the runtimes."""
