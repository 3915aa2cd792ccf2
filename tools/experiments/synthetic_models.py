"""The models of the synthetic tasks, in both forms, and how each form answers a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from experiments.frame import Record
from tnnlm.config.schema import ConversionConfig, ModelConfig
from tnnlm.conversion import convert_kernels
from tnnlm.conversion.methods import LayerConversion
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel, KernelConfig, RTFConfig, SGConvConfig, TNOConfig, build_kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops.recurrence import Params, State

METHODS = {"rtf": ("companion", "window"), "tnn": ("balanced", "etsc"), "sgconv": ("window",)}
"""conversions of each family, of which the first that can be made is taken"""


class SignalModel(nn.Module):
    """A signal in, a signal out: linear to E channels, a long convolution of each, linear to one.

    The RTF paper's model of the delay task: one layer without norm, residual and activation.
    """

    conv: LongConv | RecurrentConv

    def __init__(self, n_channels: int, conv: LongConv | RecurrentConv) -> None:
        super().__init__()
        self.in_proj = nn.Linear(1, n_channels)
        self.conv = conv
        self.out_proj = nn.Linear(n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) -> (B, L)."""
        y: Tensor = self.out_proj(self.conv(self.in_proj(x.unsqueeze(-1))))
        return y.squeeze(-1)

    def init_state(self, batch_size: int) -> State:
        """The state before the first value."""
        return self.conv.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance by one value per row, (B,) -> (B,)."""
        y, state = self.conv.step(self.in_proj(x.unsqueeze(-1)), state)
        return self.out_proj(y).squeeze(-1), state


Model: TypeAlias = CausalLM | SignalModel


class Recurrent(NamedTuple):
    """A converted model, and what became of its kernels."""

    model: Model
    layers: list[LayerConversion]
    refused: str
    """what was said of the methods before"""


def build_model(cell: Record) -> Model:
    """The model that a cell of the experiment names, in its parallel form, initialised under its seed."""
    torch.manual_seed(cell["seed"])
    kernel, width = kernel_config(cell), cell["d_model"]
    if cell["task"] == "delay":
        return SignalModel(width, LongConv(build_kernel(kernel, width, cell["length"])))
    return CausalLM(
        ModelConfig(
            d_model=width,
            n_layers=cell["layers"],
            vocab_size=cell["vocab_size"],
            max_length=cell["length"],
            expand=1,
            kernel=kernel,
        )
    )


def kernel_config(cell: Record) -> KernelConfig:
    """A cell's kernel. RTF as published for these tasks: one denominator for all channels of a layer."""
    if cell["family"] == "rtf":
        return RTFConfig(
            name="rtf",
            state_size=cell["state_size"],
            denominators=1,
            init=cell["init"],
            constraint=cell["constraint"],
        )
    return SGConvConfig(name="sgconv") if cell["family"] == "sgconv" else TNOConfig(decay=cell["decay"])


def convert_by_family(model: Model, family: str, length: int) -> Recurrent:
    """A converted copy of ``model``, right at all lags below ``length``.

    Raises:
        UserError: if none of the family's methods can.
    """
    found = _kernels(model)
    refused = []
    for method in METHODS[family]:
        try:
            _, layers = convert_kernels(found, length, ConversionConfig(method=method, horizon=length))
        except UserError as error:
            refused.append(f"{method}: {error}")
            continue
        return Recurrent(_attach(model, [layer.params for layer in layers]), layers, "; ".join(refused))
    raise UserError("; ".join(refused))


@torch.no_grad()
def answers(model: Model, inputs: Tensor, last: int) -> Tensor:
    """What the parallel form gives at the ``last`` positions of inputs (B, L)."""
    outputs: Tensor = model(inputs)
    return outputs[:, -last:]


@torch.no_grad()
def answers_by_steps(model: Model, inputs: Tensor, last: int) -> Tensor:
    """The same of a converted model, which reads one position after the other."""
    state: Any = model.init_state(len(inputs))
    outputs = []
    for t in range(inputs.shape[1]):
        y, state = model.step(inputs[:, t], state)
        outputs.append(y)
    return torch.stack(outputs[-last:], dim=1)


def _kernels(model: Model) -> Sequence[Kernel]:
    if isinstance(model, CausalLM):
        return kernels(model)
    assert isinstance(model.conv, LongConv), "converted already"
    return [model.conv.kernel]


def _attach(model: Model, layers: Sequence[Params]) -> Model:
    if isinstance(model, CausalLM):
        return attach(model, layers)
    converted = copy.deepcopy(model)
    converted.conv = RecurrentConv(layers[0])
    return converted.eval().requires_grad_(False)
