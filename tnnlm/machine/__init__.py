"""What this machine has and can do: threads, memory allocator, operators. Needs torch alone."""
