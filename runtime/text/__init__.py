"""From logits to text, token by token."""
