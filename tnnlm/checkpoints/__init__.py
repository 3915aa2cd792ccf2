"""Model files: training checkpoints, converted models, and how to locate them."""
