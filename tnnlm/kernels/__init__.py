"""Convolution kernels: modules that turn parameters into taps (E, L).

Importing this package registers every kernel that is part of it.
"""

from tnnlm.kernels.base import KERNEL_SCHEMAS, Kernel, KernelConfig, LagKernel, build_kernel, register_kernel
from tnnlm.kernels.fd_tno import FDTNOConfig, FDTNOKernel
from tnnlm.kernels.hyena import HyenaConfig, HyenaKernel
from tnnlm.kernels.network import NetworkKernel
from tnnlm.kernels.rtf import RTFConfig, RTFKernel
from tnnlm.kernels.sgconv import SGConvConfig, SGConvKernel
from tnnlm.kernels.tno import TNOConfig, TNOKernel
from tnnlm.kernels.two_sided import TwoSidedKernel

__all__ = [
    "KERNEL_SCHEMAS",
    "FDTNOConfig",
    "FDTNOKernel",
    "HyenaConfig",
    "HyenaKernel",
    "Kernel",
    "KernelConfig",
    "LagKernel",
    "NetworkKernel",
    "RTFConfig",
    "RTFKernel",
    "SGConvConfig",
    "SGConvKernel",
    "TNOConfig",
    "TNOKernel",
    "TwoSidedKernel",
    "build_kernel",
    "register_kernel",
]
