"""Features of the kernels of all layers in one batch, where that is possible and faster.

On a GPU the networks of the kernels are bound by the number of launches, which the batch divides by the
number of layers. A CPU launches nothing, and computes them layer by layer by default.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from tnnlm.kernels import NetworkKernel
from tnnlm.kernels.rpe import RelativePositionEncoder
from tnnlm.modules import Block, LongConv
from tnnlm.ops.override import Override

_PARTS = {RelativePositionEncoder, nn.ModuleList, nn.Linear}
"""Classes of the parts of a network; a part of another class, such as an adapter, may compute another map."""
_assumed: Override[bool] = Override()


def joint_kernels(joint: bool) -> AbstractContextManager[None]:
    """Compute the kernels of all layers in one batch on every device, or on none, within a ``with`` block.

    Models whose kernels can't be computed in one batch compute them layer by layer all the same.
    """
    return _assumed.use(joint)


def joint_features(layers: Sequence[Block], length: int) -> list[Tensor] | None:
    """Return the features of the kernel of every layer for ``length`` taps, computed in one batch.

    Returns:
        One tensor per layer, as :meth:`tnnlm.kernels.NetworkKernel.joint_features` describes, or None if the
        layers must compute them: on a CPU, or if their kernels differ, or are no networks, or if a layer is
        compiled, sharded (its weights are gathered only while it runs) or bidirectional.
    """
    kernels = [_plain_kernel(layer) for layer in layers]
    found = [kernel for kernel in kernels if kernel is not None]
    if len(found) < len(kernels) or not found:
        return None
    kind, first = type(found[0]), _shape_of(found[0])
    if any(type(kernel) is not kind or _shape_of(kernel) != first for kernel in found[1:]):
        return None
    return list(kind.joint_features(found, length).unbind())


def _plain_kernel(layer: nn.Module) -> NetworkKernel | None:
    """Return the kernel of a layer if its features can be computed before the layer runs, or None."""
    # Sharding a module changes its class.
    if type(layer) is not Block or type(layer.mixer.conv) is not LongConv:
        return None
    kernel = layer.mixer.conv.kernel
    # A class derived from a network may compute other taps from other features.
    if not isinstance(kernel, NetworkKernel) or "joint_features" not in vars(type(kernel)):
        return None
    device = next(kernel.parameters()).device
    if not (device.type != "cpu" if _assumed.choice is None else _assumed.choice):
        return None
    parts = list(kernel.modules())[1:]
    altered = any(type(part) not in _PARTS or _has_hooks(part) for part in parts)
    return None if altered or _is_compiled(layer) else kernel


def _shape_of(kernel: NetworkKernel) -> tuple[Hashable, ...]:
    """Return what must be equal between kernels that are computed in one batch."""
    tensors = ((name, part.shape, part.dtype, part.device) for name, part in kernel.named_parameters())
    return *kernel.settings, *tensors


def _has_hooks(module: nn.Module) -> bool:
    """Return whether code runs before or after a module, which the batch would skip."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(layer: Block) -> bool:
    """Return whether a layer runs as a graph, which holds its kernel."""
    return layer._compiled_call_impl is not None
