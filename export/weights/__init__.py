"""Storage formats of weights, and the conversion of weights to them."""
