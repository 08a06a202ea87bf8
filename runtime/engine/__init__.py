"""A file's methods run, and the caches of the texts they run on."""
