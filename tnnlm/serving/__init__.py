"""An OpenAI-compatible server over fixed-size states: continuous batching, prefix reuse, a page to try it."""
