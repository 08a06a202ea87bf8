"""Verification: comparison of a file with the model it was made from, and measurement of the cost of quantisation."""
