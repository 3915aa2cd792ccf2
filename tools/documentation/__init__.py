"""Figures and reference tables of the documentation, rendered from committed records and from the code."""
