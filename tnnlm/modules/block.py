"""One layer of the model: prenorm sequence mixing and prenorm channel mixing with residual connections.

A block is wired as the layers of a Toeplitz neural network (``tnn``, arXiv 2305.04749), of HyenaDNA
(``hyena``, arXiv 2306.15794), or of S4 (``s4`` and, with a gate, ``s4_glu``, arXiv 2111.00396).
"""

from __future__ import annotations

from torch import Tensor, nn

from tnnlm.modules.glu import GLU
from tnnlm.modules.hyena import HyenaMixer
from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.mlp import MLP
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.modules.s4 import S4Mixer
from tnnlm.ops.recurrence import State


class Block(nn.Module):
    """Prenorm residual block: x + mixer(norm(x)), then x + glu(norm(x)), with dropout on both branches."""

    def __init__(
        self,
        mixer: GatedMixer | HyenaMixer | S4Mixer,
        glu: GLU | MLP | None,
        dropout: float,
        norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        """Build the block.

        Args:
            mixer: Sequence mixing.
            glu: Channel mixing; None leaves it out.
            dropout: Dropout probability.
            norms: Norms before sequence and channel mixing; None takes norms without parameters.
        """
        super().__init__()
        self.norm, self.glu_norm = norms or (SimpleRMSNorm(), SimpleRMSNorm())
        self.mixer = mixer
        self.glu = glu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, D) for x (B, L, D).

        Args:
            x: Inputs.
            mask: Where it (B, L) is False, x is padding; None if nothing is.
            features: Features of the kernel, see :class:`tnnlm.kernels.NetworkKernel`; at most one tensor.
                Without it the kernel computes them.
        """
        x = x + self.dropout(self.mixer(self.norm(x), mask, *features))
        return self._mix_channels(x)

    def init_state(self, batch_size: int) -> tuple[State, ...]:
        """Return the states before the first token, ``mixer.n_states`` of them."""
        return self.mixer.init_state(batch_size)

    def prefill(
        self, x: Tensor, states: tuple[State, ...], lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process the tokens of x (B, L, D) in parallel and return outputs and the next states."""
        y, states = self.mixer.prefill(self.norm(x), states, lengths)
        return self._mix_channels(x + self.dropout(y)), states

    def step(
        self, x: Tensor, states: tuple[State, ...], active: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Process one token x (B, D) and return outputs and the next states."""
        y, states = self.mixer.step(self.norm(x), states, active)
        return self._mix_channels(x + self.dropout(y)), states

    def steps(self, x: Tensor, states: tuple[State, ...]) -> tuple[Tensor, list[tuple[State, ...]]]:
        """Process K tokens x (B, K, D) and return outputs and the states after each token."""
        y, after = self.mixer.steps(self.norm(x), states)
        return self._mix_channels(x + self.dropout(y)), after

    def _mix_channels(self, x: Tensor) -> Tensor:
        return x if self.glu is None else x + self.dropout(self.glu(self.glu_norm(x)))


def build_block(
    wiring: str,
    d_model: int,
    d_inner: int,
    d_hidden: int,
    conv: LongConv | BiConv | RecurrentConv,
    dropout: float,
) -> Block:
    """Return a block of a wiring.

    Args:
        wiring: Name of the wiring: tnn, hyena, s4 or s4_glu.
        d_model: Width of the residual stream.
        d_inner: Number of channels of the long convolution, ``d_model`` for all wirings but tnn.
        d_hidden: Hidden width of the channel mixing.
        conv: Long convolution.
        dropout: Dropout probability.
    """
    if wiring == "tnn":
        return Block(GatedMixer(d_model, d_inner, conv), GLU(d_model, d_hidden), dropout)
    norms = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
    if wiring == "hyena":
        return Block(HyenaMixer(d_model, conv), MLP(d_model, d_hidden), dropout, norms)
    return Block(S4Mixer(d_model, conv, gated=wiring == "s4_glu"), None, dropout, (norms[0], nn.Identity()))
