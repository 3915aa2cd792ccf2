"""OpenAI-compatible server with fixed-size states: continuous batching, prefix caching and a web page."""
