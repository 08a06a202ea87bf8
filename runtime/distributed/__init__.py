"""A model on several machines."""
