"""Quantised Hugging Face checkpoints, whose matrices are dequantised as they are read."""
