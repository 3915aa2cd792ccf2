"""Configuration of a run: the schema of its settings, and the code that reads and checks them."""
