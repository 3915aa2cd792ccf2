"""Kernels: parameters -> taps (E, L). Importing this package registers all of its own."""

from tnnlm.kernels.base import Kernel, LagKernel, build_kernel, register_kernel
from tnnlm.kernels.fd_tno import FDTNOKernel
from tnnlm.kernels.rtf import RTFKernel
from tnnlm.kernels.sgconv import SGConvKernel
from tnnlm.kernels.tno import TNOKernel
from tnnlm.kernels.two_sided import TwoSidedKernel

__all__ = [
    "FDTNOKernel",
    "Kernel",
    "LagKernel",
    "RTFKernel",
    "SGConvKernel",
    "TNOKernel",
    "TwoSidedKernel",
    "build_kernel",
    "register_kernel",
]
