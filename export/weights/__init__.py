"""How weights are stored, and what makes them so."""
