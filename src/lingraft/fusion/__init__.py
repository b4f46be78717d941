"""FLARE: two languages fused inside the adapter."""
