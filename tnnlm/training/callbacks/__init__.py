"""Callbacks of training: checkpoints, skipped steps, averaged weights, validation, progress."""
