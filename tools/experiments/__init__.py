"""The papers' claims as experiments: a command, a table and a plot each, behind tools/reproduce.py."""
