"""Import of the checkpoints of other implementations: their keys, and a run with their weights."""
