"""Files of models: checkpoints of training, converted folders, and where they lie."""
