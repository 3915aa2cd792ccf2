"""Parts of tools/gpu_check.py: measurements on one GPU, each in a separate process, and their report."""
