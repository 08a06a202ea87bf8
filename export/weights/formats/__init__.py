"""Storage formats of matrices, one module each. See docs/extending.md for how to add one."""
