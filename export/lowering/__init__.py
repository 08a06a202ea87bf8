"""Traced, lowered by a backend, put together and written."""
