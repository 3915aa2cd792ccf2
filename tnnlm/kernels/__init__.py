"""Kernels: parameters -> taps (E, L). Importing this package registers all of its own."""

from tnnlm.kernels.base import Kernel, build_kernel, register_kernel
from tnnlm.kernels.fd_tno import FDTNOKernel
from tnnlm.kernels.rtf import RTFKernel
from tnnlm.kernels.sgconv import SGConvKernel
from tnnlm.kernels.tno import TNOKernel

__all__ = [
    "FDTNOKernel",
    "Kernel",
    "RTFKernel",
    "SGConvKernel",
    "TNOKernel",
    "build_kernel",
    "register_kernel",
]
