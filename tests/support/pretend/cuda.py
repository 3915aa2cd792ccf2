"""The functions of ``torch.cuda`` that a training run calls, for a pretended GPU."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tests.support.pretend import graphs
from tests.support.pretend.tensors import LEDGER, OnCall, OnDispatch, PretendTensor

SEEDS: list[int] = []
"""Random state of the pretended GPU: the seeds that it was given."""


class NoGrad(torch.no_grad):
    """Stand-in for inference mode, in which the pretended tensors can't be made."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


class Event:
    """CUDA event. The host waits for it if it was recorded after the last optimizer step."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.step = -1

    def record(self, *_: Any) -> None:
        """Remember the step."""
        self.step = LEDGER.step()

    def synchronize(self) -> None:
        """Count a synchronisation unless a whole step has passed."""
        if self.step >= LEDGER.step():
            LEDGER.sync("event")


class Stream:
    """CUDA stream."""

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""


def replace_inference_mode() -> None:
    """Replace inference mode; call it before the package is imported, which decorates functions with it."""
    torch.inference_mode = NoGrad  # type: ignore[misc,assignment]
    torch.autograd.grad_mode.inference_mode = NoGrad  # type: ignore[misc,assignment]


@contextlib.contextmanager
def pretended_cuda(devices: int = 1) -> Iterator[None]:
    """Make PyTorch report ``devices`` GPUs inside a ``with`` block, of which cuda:0 is usable."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    real_save, real_generator = torch.save, torch.Generator
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda device: contextlib.nullcontext(),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended GPU",
        "synchronize": lambda *_: LEDGER.sync("torch.cuda.synchronize"),
        "empty_cache": nothing,
        "max_memory_allocated": lambda *_: 1 << 30,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: SEEDS.__setitem__(slice(None), [seed]),
        "manual_seed_all": lambda seed: SEEDS.__setitem__(slice(None), [seed]),
        "get_rng_state_all": lambda: [torch.tensor([*SEEDS, 0][:1]).view(torch.uint8)],
        "set_rng_state_all": lambda states: None,
        **graphs.REPLACED,
    }
    with contextlib.ExitStack() as patches:
        for name, value in replaced.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, value))
        for target, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.save", lambda value, *rest, **more: real_save(on_host(value), *rest, **more)),
            ("torch.Generator", lambda device="cpu": real_generator("cpu")),
        ):
            patches.enter_context(mock.patch(target, value))
        patches.enter_context(in_this_thread())
        yield


@contextlib.contextmanager
def in_this_thread() -> Iterator[None]:
    """Intercept the operators of one thread; the other replacements apply to all threads."""
    with OnDispatch(), OnCall():
        yield


def on_host(value: Any) -> Any:
    """Return a value to be saved with the CPU tensors of pretended ones, which pickle does not know."""
    if isinstance(value, PretendTensor):
        return value.inner.detach()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, on_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(on_host, value))
    return value
