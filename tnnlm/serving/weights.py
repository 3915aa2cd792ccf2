"""Weights of a served model, independent of the files that they were read from."""

from __future__ import annotations

from torch import Tensor, nn


def hold_in_memory(model: nn.Module) -> None:
    """Copy all weights and buffers of a model into memory, in place.

    Loading maps files of weights into memory without reading them. If such a file is truncated while its
    model is served, the system ends the process (SIGBUS); if it is overwritten, its weights change.
    """
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    copy = copies.setdefault(id(tensor), _copied(tensor))
                    own[name] = copy  # type: ignore[assignment]


def _copied(tensor: Tensor) -> Tensor:
    # Not by assignment to tensor.data: a view keeps the tensor of the whole file alive.
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
