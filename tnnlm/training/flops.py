"""Floating-point operations of training, computed from a configuration, without Lightning or a model."""

from __future__ import annotations

import math

from tnnlm.config.schema import ModelConfig
from tnnlm.ops.toeplitz import fft_length


def flops_per_token(config: ModelConfig, n_rows: int = 1, guessed: float = 1.0) -> float:
    """Return the floating-point operations per token of a training step, forward and backward.

    Matrix products, including the head, count 6 per weight (Kaplan et al. 2020). FFT convolutions count
    2.5 n log2 n per transform: two forward and two backward for every row, and four for the taps, shared by
    ``n_rows`` rows of a batch. The head is counted for ``guessed``, the share of tokens with logits.
    Position networks, norms and gates are not counted.
    """
    inner, hidden = config.expand * config.d_model, config.glu_dim or config.d_model
    projections = {
        "tnn": 3 * inner + 3 * hidden,
        "hyena": 4 * inner + 2 * hidden,
        "s4": inner,
        "s4_glu": 2 * inner,
    }
    layer = config.d_model * projections[config.block]
    n = fft_length(2 * config.max_length)
    transforms = (4 + 4 / n_rows) * 2.5 * n * math.log2(n) + 3 * 6 * (n // 2)
    convolution = inner * transforms / config.max_length
    head = guessed * config.d_model * config.vocab_size
    return 6 * (config.n_layers * layer + head) + config.n_layers * convolution
