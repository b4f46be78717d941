"""Answers read in what models write, and their worth, in many languages. Needs no model."""
