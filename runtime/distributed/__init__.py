"""Runs a model on several machines."""
