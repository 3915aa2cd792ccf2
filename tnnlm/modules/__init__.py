"""Modules on (B, L, D) with ``forward``; the recurrent modules also have ``prefill`` and ``step``."""

from tnnlm.modules.block import Block, build_block
from tnnlm.modules.context_conv import ContextConv
from tnnlm.modules.glu import GLU
from tnnlm.modules.hyena import HyenaMixer, ShortConv
from tnnlm.modules.long_conv import BiConv, LongConv, TapsConv
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.mlp import MLP
from tnnlm.modules.norm import SimpleRMSNorm, final_norm
from tnnlm.modules.recurrent_conv import RecurrentConv
from tnnlm.modules.s4 import S4Mixer

__all__ = [
    "GLU",
    "MLP",
    "BiConv",
    "Block",
    "ContextConv",
    "GatedMixer",
    "HyenaMixer",
    "LongConv",
    "RecurrentConv",
    "S4Mixer",
    "ShortConv",
    "SimpleRMSNorm",
    "TapsConv",
    "build_block",
    "final_norm",
]
