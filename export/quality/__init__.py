"""What a file computes, against the model it was made from, and what quantising costs."""
