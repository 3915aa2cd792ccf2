"""How fast a converted model reads and writes, beside peers of equal weight bytes and the machine's limit."""
