"""Training: the only package, with data.py, that knows Lightning."""
