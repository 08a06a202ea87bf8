"""The Llama model: its configuration, its PyTorch modules and the arithmetic they share."""
