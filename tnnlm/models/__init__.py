"""Models: the shared backbone, the causal language model, the masked language model and the classifier."""
