"""Where metrics go: metrics.csv and plain lines, Weights & Biases."""
