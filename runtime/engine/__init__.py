"""Runs a file's methods, and keeps the caches of the texts."""
