"""Key map of stacks of residual layers in the repository of S4, which SGConv and RTF were trained in.

A language model is an embedding, alternately LayerNorms and layers, a final LayerNorm and a head that is
tied to the embedding. A layer is a long convolution, GELU and a linear layer, with or without a gate.
"""

from __future__ import annotations

import re

from tnnlm.checkpoints.importers.keys import Keys, Plan, Rule
from tnnlm.errors import CheckpointError

EMBEDDING = r"(.*\.)?(encoder(\.0)?|embedding|embed_tokens)\.weight"
"""Key of the embedding."""
HEAD = r"(.*\.)?(decoder(\.0)?(\.output_transform)?|lm_head)\.weight"
"""Key of the head."""


class Stack:
    """Names of a stack of layers, and the part of its plan that doesn't depend on the convolution."""

    def __init__(self, keys: Keys, mark: str) -> None:
        """Find the names.

        Args:
            keys: Tensors of the checkpoint.
            mark: Regular expression of a key of the convolution, relative to its module.

        Raises:
            CheckpointError: If a key that determines a size is missing.
        """
        found = (re.fullmatch(rf"(.*?)layers\.0\.layer\.((?:\w+\.)*?){mark}", key) for key in keys.weights)
        match = next(filter(None, found), None)
        if match is None:
            raise CheckpointError(
                f"{keys.path}: is not a whole {keys.title} checkpoint: layers.0.layer lacks its kernel"
            )
        self.prefix, self.inner = match[1], match[2]
        self.n_layers = keys.count(rf"{re.escape(self.prefix)}layers\.(\d+)\.")
        embedding = next((key for key in keys.weights if re.fullmatch(EMBEDDING, key)), "embedding.weight")
        vocab_size, d_model = keys.shape(embedding, 2)
        head = next((key for key in keys.weights if re.fullmatch(HEAD, key)), None)
        # The norms are wrapped in a module in the repository of S4.
        wrapped = ".norm" * (f"{self.prefix}layers.0.norm.norm.weight" in keys.weights)
        linear = ".0" * (f"{self.prefix}layers.0.layer.output_linear.0.weight" in keys.weights)
        outputs, _ = keys.shape(f"{self.prefix}layers.0.layer.output_linear{linear}.weight", 2)
        self.plan = Plan(
            {
                "model.d_model": d_model,
                "model.vocab_size": vocab_size,
                "model.n_layers": self.n_layers,
                "model.block": "s4" if outputs == d_model else "s4_glu",
                "model.expand": 1,
                "model.final_norm": "layer",
            },
            {"embedding.weight": Rule((embedding,))},
            {} if head is None else {head: embedding},
        )
        self.plan.linear("norm", f"{self.prefix}norm{wrapped}")
        for index in range(self.n_layers):
            theirs = f"{self.prefix}layers.{index}"
            self.plan.linear(f"blocks.{index}.norm", f"{theirs}.norm{wrapped}")
            self.plan.linear(f"blocks.{index}.mixer.out_proj", f"{theirs}.layer.output_linear{linear}")

    def conv(self, index: int) -> str:
        """Return the name of the convolution of a layer, with a dot at its end."""
        return f"{self.prefix}layers.{index}.layer.{self.inner}"

    @staticmethod
    def kernel(index: int) -> str:
        """Return the name of the kernel of a layer of ours."""
        return f"blocks.{index}.mixer.conv.kernel"
