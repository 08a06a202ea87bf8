"""Serves a model over OpenAI's HTTP API."""
