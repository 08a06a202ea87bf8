"""One module per layout of checkpoint; model.checkpoint has the table of them."""
