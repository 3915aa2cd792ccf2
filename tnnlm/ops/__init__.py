"""Pure functions on tensors, without modules, configuration or global state."""
