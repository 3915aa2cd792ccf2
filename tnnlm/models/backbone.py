"""Backbone of all models: embedding, blocks and final norm. It is not a LightningModule.

The models built on it are :class:`tnnlm.models.causal_lm.CausalLM`, and the bidirectional models of
:mod:`tnnlm.models.encoders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnnlm.config.schema import ModelConfig
from tnnlm.kernels import TwoSidedKernel, build_kernel
from tnnlm.models.joint_kernels import joint_features
from tnnlm.modules import BiConv, Block, LongConv, RecurrentConv, build_block, final_norm


class Backbone(nn.Module):
    """Token embedding, prenorm blocks and a final norm (arXiv 2305.04749)."""

    causal_by_default: ClassVar[bool] = True
    """Default of ``config.causal``."""

    def __init__(
        self, config: ModelConfig, convs: Sequence[LongConv | BiConv | RecurrentConv] | None = None
    ) -> None:
        """Build the model with the kernel of ``config``, or with ``convs``, one per layer, if given."""
        super().__init__()
        self.config = config
        d_inner = config.expand * config.d_model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.causal = self.causal_by_default if config.causal is None else config.causal
        """Whether a position depends on earlier positions only."""
        self.blocks = nn.ModuleList(
            build_block(
                config.block, config.d_model, d_inner, config.glu_dim or config.d_model, conv, config.dropout
            )
            for conv in convs or [self._new_conv(d_inner) for _ in range(config.n_layers)]
        )
        self.norm = final_norm(config.final_norm, config.d_model)
        self.recompute = False
        """Activation checkpointing: whether to store only the input of each block for the backward pass, at
        the cost of a third more compute."""

    @property
    def layers(self) -> list[Block]:
        """Blocks of the model as a typed list."""
        return cast(list[Block], list(self.blocks))

    @property
    def n_params(self) -> int:
        """Number of trainable parameters; a tied embedding counts once, frozen decays don't count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def compile_blocks(self) -> None:
        """Compile every block in place; parameter names don't change, and blocks share one compilation."""
        for block in self.layers:
            block.compile()

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, L, D), normalised, for tokens (B, L).

        Tokens where ``mask`` (B, L) is False are padding, which doesn't affect other positions; hidden states
        at padding positions are undefined.
        """
        x = self._embed(tokens)
        if self.recompute and self.training:
            for block in self.layers:
                x = checkpoint(block, x, mask, use_reentrant=False)
            return self.norm(x)
        # Outside of training nothing is bound by these launches, and a layer may be evaluated by itself.
        joint = joint_features(self.layers, tokens.shape[1]) if self.training else None
        for index, block in enumerate(self.layers):
            x = block(x, mask) if joint is None else block(x, mask, joint[index])
        return self.norm(x)

    def _new_conv(self, channels: int) -> LongConv | BiConv:
        kernel, length = self.config.kernel, self.config.max_length
        if self.causal:
            return LongConv(build_kernel(kernel, channels, length))
        return BiConv(TwoSidedKernel(kernel, channels, length))

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        # The embedding is tied to the head, so that scaling the weights themselves would scale the logits.
        return self.dropout(x * self.config.d_model**0.5 if self.config.embed_scale else x)
