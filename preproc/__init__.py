"""Preparation of a model's inputs outside the graph: tokens, chat templates, rotary tables and masks."""
