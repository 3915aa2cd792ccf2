"""Modules over (B, L, D): each has ``forward``, and the recurrent ones ``prefill`` and ``step``."""

from tnnlm.modules.block import Block
from tnnlm.modules.glu import GLU
from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.modules.recurrent_conv import RecurrentConv

__all__ = ["GLU", "BiConv", "Block", "GatedMixer", "LongConv", "RecurrentConv", "SimpleRMSNorm"]
