"""What is worked out before the graph: rotary tables, masks, tokens."""
