"""How far a running experiment is, in a file that others may read."""
