"""Modules on (B, L, D) with ``forward``; the recurrent modules also have ``prefill`` and ``step``."""

from tnnlm.modules.block import Block
from tnnlm.modules.glu import GLU
from tnnlm.modules.long_conv import BiConv, LongConv
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm, final_norm
from tnnlm.modules.recurrent_conv import RecurrentConv

__all__ = ["GLU", "BiConv", "Block", "GatedMixer", "LongConv", "RecurrentConv", "SimpleRMSNorm", "final_norm"]
