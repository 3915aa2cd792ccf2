"""The synthetic memory tasks of the RTF paper (arXiv 2405.06147, section 4.2), drawn anew for every batch.

Copying (Arjovsky et al., arXiv 1511.06464): symbols, then blanks, then as many markers as symbols, at
which the symbols are to be told in order. Delay (Gu et al., arXiv 2206.12037): a white signal below a
cut-off frequency, to be given out again some steps later. And the models that learn them, in both forms.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from experiments.frame import Record
from tnnlm.config.schema import ConversionConfig, ModelConfig
from tnnlm.conversion import convert_kernels
from tnnlm.conversion.methods import LayerConversion
from tnnlm.errors import UserError
from tnnlm.kernels import KernelConfig, RTFConfig, SGConvConfig, TNOConfig, build_kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops.recurrence import State

BLANK = 0
"""token id; the marker is the last id, symbols are all between"""
FAMILY_METHODS = {"rtf": ("companion", "window"), "tnn": ("balanced", "etsc"), "sgconv": ("window",)}
"""conversions of each family, of which the first that can be made is taken"""


class Batch(NamedTuple):
    """Inputs (B, L), and what the last positions are to give, (B, at most L)."""

    inputs: Tensor
    targets: Tensor


def copying(seed: int, batch: int, *, rows: int, symbols: int, vocab_size: int, blanks: int = 0) -> Batch:
    """One batch of the copying task: the same for the same arguments, whatever was drawn before.

    Args:
        seed: of the whole stream.
        batch: number of the batch in it.
        rows: B.
        symbols: to remember, M.
        vocab_size: of blank, marker and symbols together, at least 3.
        blanks: between the symbols and the first marker.

    Returns:
        token ids (B, 2 M + ``blanks``), and the symbols (B, M), targets of the last M positions.

    Raises:
        ValueError: for a vocabulary without symbols.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size {vocab_size}: blank and marker leave no symbol")
    drawn = _stream(seed, batch).integers(BLANK + 1, vocab_size - 1, size=(rows, symbols))
    told = torch.from_numpy(drawn)
    rest = torch.full((rows, blanks + symbols), BLANK)
    rest[:, blanks:] = vocab_size - 1
    return Batch(torch.cat((told, rest), dim=1), told)


def delay(
    seed: int, batch: int, *, rows: int, length: int, lag: int, cutoff: float = 0.25, rms: float = 0.5
) -> Batch:
    """One batch of the delay task: the same for the same arguments, whatever was drawn before.

    Args:
        seed: of the whole stream.
        batch: number of the batch in it.
        rows: B.
        length: L.
        lag: steps of delay, below L.
        cutoff: highest frequency of the signal, in cycles per step, at most 0.5.
        rms: of the signal before its first value is taken off all of them, so that it starts at zero.

    Returns:
        signals (B, L) in float32, and the same ``lag`` steps later, (B, L), zero before.

    Raises:
        ValueError: if nothing of a signal is told again, or no frequency is below the cut-off.
    """
    if not 0 < lag < length:
        raise ValueError(f"lag {lag}: must be from 1 to below the length, {length}")
    frequencies = np.fft.rfftfreq(length)
    kept = (frequencies > 0) & (frequencies <= cutoff)
    if not kept.any():
        raise ValueError(f"cutoff {cutoff}: below the lowest frequency, {frequencies[1]:g}")
    noise = _stream(seed, batch).standard_normal((rows, length))
    signal = np.fft.irfft(np.fft.rfft(noise) * kept, n=length)
    # Every frequency but that of Nyquist counts twice.
    share = np.where(frequencies[kept] < 0.5, 2, 1).sum() / length
    signal *= rms / np.sqrt(share)
    inputs = torch.from_numpy(signal - signal[:, :1]).float()
    return Batch(inputs, torch.nn.functional.pad(inputs[:, :-lag], (lag, 0)))


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
    sizes = {"n_layers": cell["layers"], "vocab_size": cell["vocab_size"], "max_length": cell["length"]}
    return CausalLM(ModelConfig(d_model=width, expand=1, kernel=kernel, **sizes))


def kernel_config(cell: Record) -> KernelConfig:
    """A cell's kernel. RTF as published for these tasks: one denominator for all channels of a layer."""
    if cell["family"] == "rtf":
        own = {name: cell[name] for name in ("state_size", "init", "constraint")}
        return RTFConfig(name="rtf", denominators=1, **own)
    return SGConvConfig(name="sgconv") if cell["family"] == "sgconv" else TNOConfig(decay=cell["decay"])


def convert_by_family(model: Model, family: str, length: int) -> Recurrent:
    """A converted copy of ``model``, right at all lags below ``length``.

    Raises:
        UserError: if none of the family's methods can.
    """
    found = kernels(model)
    refused = []
    for method in FAMILY_METHODS[family]:
        try:
            _, layers = convert_kernels(found, length, ConversionConfig(method=method, horizon=length))
        except UserError as error:
            refused.append(f"{method}: {error}")
            continue
        return Recurrent(attach(model, [layer.params for layer in layers]), layers, "; ".join(refused))
    raise UserError("; ".join(refused))


def answers_by_steps(model: Model, inputs: Tensor, last: int) -> Tensor:
    """What a converted model gives at the ``last`` positions of inputs (B, L), read one after the other."""
    state: Any = model.init_state(len(inputs))
    outputs = []
    for t in range(inputs.shape[1]):
        y, state = model.step(inputs[:, t], state)
        outputs.append(y)
    return torch.stack(outputs[-last:], dim=1)


def _stream(seed: int, batch: int) -> np.random.Generator:
    return np.random.default_rng((seed, batch))
