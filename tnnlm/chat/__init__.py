"""Chat templates: rendering of messages as text, in a process of its own, and encoding of that text."""
