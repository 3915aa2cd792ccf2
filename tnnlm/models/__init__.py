"""Models: a backbone of blocks, the causal language model, masked models and classifiers."""
