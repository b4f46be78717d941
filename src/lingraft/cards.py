"""Model cards: what an adapter is, as its README.md on the hub."""
