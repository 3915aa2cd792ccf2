"""Inference with converted models: engines, linear layers, generation, saved states and exports."""
