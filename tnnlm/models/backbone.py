"""What every model shares: embedding, blocks, norm. Not a LightningModule.

The heads over it: ``model.CausalLM``, and in ``encoder`` those that see a text as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnnlm.config.schema import ModelConfig
from tnnlm.kernels import TwoSidedKernel, build_kernel
from tnnlm.modules import GLU, BiConv, Block, GatedMixer, LongConv, RecurrentConv, SimpleRMSNorm


class Backbone(nn.Module):
    """A stack of prenorm blocks over token embeddings, and a last norm (arXiv 2305.04749)."""

    causal_by_default: ClassVar[bool] = True
    """what ``config.causal`` is where it is not set"""

    def __init__(
        self, config: ModelConfig, convs: Sequence[LongConv | BiConv | RecurrentConv] | None = None
    ) -> None:
        """Build it; ``convs``, one per layer, take the place of the kernels that ``config`` names."""
        super().__init__()
        self.config = config
        d_inner = config.expand * config.d_model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.causal = self.causal_by_default if config.causal is None else config.causal
        """whether a position sees those before it alone"""
        self.blocks = nn.ModuleList(
            Block(
                GatedMixer(config.d_model, d_inner, conv),
                GLU(config.d_model, config.glu_dim or config.d_model),
                config.dropout,
            )
            for conv in convs or [self._new_conv(d_inner) for _ in range(config.n_layers)]
        )
        self.norm = SimpleRMSNorm()
        self.recompute = False
        """keep a block's input alone for the backward pass, and compute the rest again: a third more work"""

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return cast(list[Block], list(self.blocks))

    @property
    def n_params(self) -> int:
        """Trainable parameters; the tied embedding counts once, frozen decays not at all."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def compile_blocks(self) -> None:
        """Compile every block in place: names of parameters stay, and one compilation serves all blocks."""
        for block in self.layers:
            block.compile()

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What a head reads, normalised: (B, L, D) for tokens (B, L).

        Tokens where ``mask`` (B, L) is False are padding, which no other position sees. Features there mean
        nothing.
        """
        x = self._embed(tokens)
        again = self.recompute and self.training
        for block in self.layers:
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        return self.norm(x)

    def _new_conv(self, channels: int) -> LongConv | BiConv:
        kernel, length = self.config.kernel, self.config.max_length
        if self.causal:
            return LongConv(build_kernel(kernel, channels, length))
        return BiConv(TwoSidedKernel(kernel, channels, length))

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens))
