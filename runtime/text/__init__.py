"""The steps from logits to text, token by token."""
