"""Parts of tools/load_test.py: streams of requests, and hostile clients alongside them."""
