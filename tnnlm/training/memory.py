"""Peak memory of a run on paper: one optimizer step and one validation over fake tensors.

Both run the code of the training itself, so that no tensor has to be counted by hand. They take a model of
one layer and a model of two, because each peak is an affine function of the number of layers if the parts of
a backward pass (head, first block, last block, embedding) are measured separately. Fake tensors are on the
CPU, because those of a GPU need a build of PyTorch for GPUs. Operators take the path of the device of the
run all the same, see :func:`on_path_of`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from tnnlm.config.schema import Config
from tnnlm.evaluation import class_scores, masked_nll, parallel_nll, recurrent_nll
from tnnlm.models.backbone import Backbone
from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.models.joint_kernels import joint_kernels
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.modules import RecurrentConv
from tnnlm.ops.conv_backends import use_backend
from tnnlm.ops.cross_entropy import limit_of
from tnnlm.ops.toeplitz import tile_width
from tnnlm.training.attached import Attached, attached_recurrences
from tnnlm.training.estimate import (
    SHARDING,
    resolve_accelerator,
    resolve_devices,
    resolve_precision,
    sharded_bytes,
)
from tnnlm.training.live_bytes import LiveBytes, counted
from tnnlm.training.optim import build_optimizer
from tnnlm.training.trainable import build_trainable

WORK_BUFFERS = 5
"""Assumed buffers of an FFT convolution while it runs, each of the size of its padded inputs: the inputs, the
product of the spectra, a copy of it, the outputs, and the work area of the FFT library."""
_NUMBERED = re.compile(r"[\d\[]")
"""Part of a pattern of parameters that may select layers by number."""
_TRUE_DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
"""Dtypes of the weights in the precisions that don't keep them in float32."""


@dataclass(frozen=True)
class RunMemory:
    """Peak memory per device of a run, in bytes."""

    state: int
    """Weights, buffers, gradients and moments of the optimizer, averaged weights, and the buckets of DDP."""
    buckets: int
    """Part of ``state``: the buffers through which DDP reduces the gradients."""
    step: int
    """Peak of an optimizer step, ``state`` included."""
    validation: int
    """Peak of a validation, ``state`` and attached recurrences included."""
    attached: Attached | None
    """Recurrences that a validation holds and a checkpoint stores; None for tasks without recurrences."""

    @property
    def peak(self) -> int:
        """Larger one of the two peaks."""
        return max(self.step, self.validation)


def estimate_memory(config: Config) -> RunMemory:
    """Estimate the peak memory of a run per device, without training and without data.

    Assumptions: ``WORK_BUFFERS`` per FFT convolution; :data:`~tnnlm.training.attached.ASSUMED_MODES` where
    the weights decide the size of a recurrence; blocks are not compiled, which would save activations. With
    FSDP the activations are those of one device, and the state is computed by
    :func:`~tnnlm.training.estimate.sharded_bytes`.
    """
    attached = attached_recurrences(config) if config.task == "causal" else None
    layers = config.model.n_layers
    one, two = (_peaks(config, n, attached) for n in (1, 2))
    peaks = {name: low + (two[name] - low) * (layers - 1) for name, low in one.items()}
    state, buckets = peaks.pop("state"), peaks.pop("buckets")
    validation = max(peaks.pop(name, 0) for name in ("parallel", "recurrent"))
    step = max(peaks.values())
    if config.trainer.strategy in SHARDING:
        with without_weights():
            sharded = sharded_bytes(config, build_trainable(config))
        step, validation, state = step - state + sharded, validation - state + sharded, sharded
    return RunMemory(state=state, buckets=buckets, step=step, validation=validation, attached=attached)


def _peaks(config: Config, layers: int, attached: Attached | None) -> dict[str, int]:
    """Return the bytes of the state and the peak of each phase, for a model of ``layers`` layers."""
    config = copy.deepcopy(config)
    config.model.n_layers = layers
    # Patterns that select layers by number don't fit this model, and peft can't add adapters to fake tensors.
    # Their parameters, or with adapters all, count as trained, which is an upper bound.
    config.init.freeze = [pattern for pattern in config.init.freeze if not _NUMBERED.search(pattern)]
    config.init.lora.rank = None
    device = "cpu" if resolve_accelerator(config) == "cpu" else "cuda"
    precision = resolve_precision(config)
    with on_path_of(device), counted(partial(_work, device)) as live:
        with _default_dtype(_TRUE_DTYPES.get(precision, torch.float32)):  # fake weights cannot be converted
            model: Any = build_trainable(config)
        model.recompute = config.trainer.recompute
        optimizer = build_optimizer(model, config.optim, fused=config.trainer.precision != "16-mixed")
        held, buckets = _state(config, model, optimizer)
        batch = fake_batch(config)
        state = live.now
        _step(config, model, optimizer, partial(model.loss, batch), partial(autocast_of, precision), live)
        _validate(config, model.eval(), batch, attached, live)
        del held
    live.peaks.pop("build")  # creating the moments by a step, which training does before it holds activations
    return {"last": live.peaks["first"], **live.peaks, "state": state, "buckets": buckets}


def _state(config: Config, model: Backbone, optimizer: Optimizer) -> tuple[list[Tensor], int]:
    """Create gradients, moments, averages and buckets; return the last two, and the bytes of buckets."""
    held = []
    if config.trainer.ema_decay is not None:
        held += [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    several = resolve_devices(config) * config.trainer.num_nodes > 1
    strategy = config.trainer.strategy
    reduced = strategy.startswith("ddp") or (strategy == "auto" and several)
    buckets = [torch.empty_like(parameter) for parameter in trained] if reduced else []
    return [*held, *buckets], sum(bucket.nbytes for bucket in buckets)


def _step(
    config: Config,
    model: Backbone,
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
    context: Callable[[], AbstractContextManager[None]],
    live: LiveBytes,
) -> None:
    """Run the last micro-batch of an optimizer step in the order of Lightning, phase by phase."""

    def mark(phase: str, tensor: Tensor) -> None:
        def enter(gradient: Tensor) -> None:
            live.phase = phase

        if tensor.requires_grad:  # not in the validation
            tensor.register_hook(enter)

    # The backward pass reaches the last block first.
    for block, phase in zip(reversed(model.layers), ("first", "last"), strict=False):
        block.register_forward_hook(lambda _, __, out, phase=phase: mark(phase, out))
    model.layers[0].register_forward_pre_hook(lambda _, given: mark("embedding", given[0]))
    live.phase = "forward"
    with context():
        value = loss()
    # The gradients of the step before are freed after the forward pass; those of earlier micro-batches stay.
    if config.trainer.accumulate == 1:
        optimizer.zero_grad()
    live.phase = "head"
    value.backward()
    live.phase = "step"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    clip_grads_with_norm_(parameters, config.optim.grad_clip or 1.0, norm)
    optimizer.step()


def _validate(config: Config, model: Any, batch: Any, attached: Attached | None, live: LiveBytes) -> None:
    """Score a batch as the validation of the task does."""
    live.phase = "parallel"
    if isinstance(batch, MaskedBatch):
        masked_nll(model, batch)
    elif isinstance(batch, LabelledBatch):
        class_scores(model, batch)
    else:
        assert isinstance(model, CausalLM)
        assert attached is not None
        parts = [[torch.empty(p.shape, dtype=p.dtype) for p in attached.layer] for _ in model.layers]
        convs = [RecurrentConv(type(attached.layer)(*layer)) for layer in parts]
        parallel_nll(model, batch)
        live.phase, chunk = "recurrent", config.conversion.chunk
        with in_recurrent_form(model, convs):
            # From the second chunk on, every chunk takes the same memory.
            recurrent_nll(model, batch[:, : 2 * chunk + 1], chunk)


def fake_batch(config: Config) -> Any:
    """Return a batch of the task, of this device's share of the tokens."""
    rows, model = config.data.batch_size, config.model
    length = model.max_length // config.trainer.context_parallel
    if config.task == "causal":
        return torch.zeros(rows, length + 1, dtype=torch.long)
    if config.task == "masked":
        places = torch.zeros(rows, round(config.data.mask_fraction * length), dtype=torch.long)
        return MaskedBatch(torch.zeros(rows, length, dtype=torch.long), places, places.clone())
    shape = (rows, 2) if model.pair else (rows,)
    tokens, lengths = torch.zeros(*shape, length, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    return LabelledBatch(tokens, lengths, torch.zeros(rows, dtype=torch.long))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass, which Lightning's plugin for the precision enters, too.

    Like Lightning, autocast keeps no casts of weights: every use makes a copy.
    """
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast("cpu", dtype, enabled=precision.endswith("-mixed"), cache_enabled=False)


@contextmanager
def on_path_of(device: str) -> Iterator[None]:
    """Let operators on the CPU take the path of another device, where that changes what memory they need.

    A GPU is assumed to have Triton, which comes with PyTorch, and not the optional cuDNN frontend and Liger,
    with which the loss takes less memory.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    with ExitStack() as stack:
        stack.enter_context(limit_of(device))
        if device != "cpu":
            stack.enter_context(use_backend("windows"))
            stack.enter_context(joint_kernels(True))  # an estimate also of sharded layers: it takes few bytes
        yield


def _work(device: str, operator: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that a convolution by FFT holds while it runs; 0 for other operators."""
    ops = torch.ops.tnnlm
    # The windows of row_conv are views of the inputs: they are not padded.
    n_place, buffers = {
        ops.circular_conv.default: (2, WORK_BUFFERS),
        ops.circular_conv_backward.default: (3, WORK_BUFFERS),
        ops.row_conv.default: (2, WORK_BUFFERS - 1),
        ops.row_conv_backward.default: (4, WORK_BUFFERS),
    }.get(operator, (0, 0))
    if not buffers:
        return 0
    (channels, batch, _), n = args[0].shape, args[n_place]
    width = 8 if args[1].dtype in (torch.float64, torch.complex128) else 4
    return buffers * tile_width(channels, batch, n, device) * batch * n * width
