"""Hardware and runtime support: CPU threads, memory allocator, available operators. Needs only torch."""
