"""Decoding a converted model: engines, linear layers, generation, saved states, exports."""
