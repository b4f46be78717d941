"""Divergences beside one another: cosines, layer by layer, and which languages belong together."""
