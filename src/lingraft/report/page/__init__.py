"""A run's results as one page that needs no network: what is on it, how it is drawn, how it is written."""
