"""Training callbacks: checkpoints, skipping of bad steps, EMA, validation, samples and progress."""
