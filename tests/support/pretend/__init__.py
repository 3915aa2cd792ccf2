"""A pretended GPU: real numbers computed on the CPU by tensors that report the device cuda:0.

Tests run :mod:`scenarios` in a subprocess through :func:`launch.pretended`, because the C++ part
(``device_guard.cpp``: what autograd asks a CUDA device for and a CPU build of PyTorch lacks) must be loaded
before PyTorch. In the subprocess an operation that mixes devices raises the error of a GPU, and the ledger
(:mod:`tensors`) counts host synchronisations by place and step, and kernel launches.

Limits: FSDP2 and the gradient reducer of DDP do not accept such tensors, because both are C++ code that reads
storage. :mod:`ranks` therefore replaces the DDP wrapper and all collectives by those of two identical ranks,
which refuse CPU tensors as NCCL does; the reducers themselves run in real processes over gloo, which refuse
what else NCCL refuses (:mod:`tests.support.nccl`). CUDA graphs replay their operators (:mod:`graphs`), and
fused operators run their reference. Compilation, real streams and timing are not covered. Tensors can't be
made in inference mode, so the pretended device replaces it by ``no_grad``.
"""
