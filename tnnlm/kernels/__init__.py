"""Kernels: parameters -> taps (E, L)."""

from tnnlm.kernels.base import Kernel, build_kernel, register_kernel
from tnnlm.kernels.tno import TNOKernel

__all__ = ["Kernel", "TNOKernel", "build_kernel", "register_kernel"]
