"""Chat templates: rendering of messages as text, in a separate process, and encoding of that text."""
