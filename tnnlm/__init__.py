"""tnnlm: train long-convolution language models in parallel, deploy them as recurrences."""

__version__ = "0.1.0"
