"""What an export will do, worked out before it does any of it."""
