"""Experiments that test the claims of the papers; `tools/reproduce.py` runs them and writes their pages."""
