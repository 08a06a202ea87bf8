"""Planning of an export: everything is decided and checked before any of it is done."""
