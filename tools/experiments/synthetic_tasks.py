"""Synthetic memory tasks of the RTF paper (arXiv 2405.06147, section 4.2), and their models.

Copying (Arjovsky et al., arXiv 1511.06464): symbols, then blanks, then as many markers as symbols, at which
the model outputs the symbols in order. Delay (Gu et al., arXiv 2206.12037): a band-limited white signal,
which the model outputs some steps later. Every batch is sampled from the seed and its number.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from experiments.frame import Record
from tnnlm.config.schema import ConversionConfig, ModelConfig
from tnnlm.conversion import convert_kernels
from tnnlm.conversion.source import LayerConversion
from tnnlm.errors import UserError
from tnnlm.kernels import KernelConfig, RTFConfig, SGConvConfig, TNOConfig, build_kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops.recurrence import State

BLANK = 0
"""Token id of blanks; the last id is the marker, the ids in between are symbols."""
FAMILY_METHODS = {"rtf": ("companion", "window"), "tnn": ("balanced", "etsc"), "sgconv": ("window",)}
"""Conversion methods by family; the first one that succeeds is used."""


class Batch(NamedTuple):
    """Inputs (B, L), and targets of the last positions, (B, at most L)."""

    inputs: Tensor
    targets: Tensor


def copying(seed: int, batch: int, *, rows: int, symbols: int, vocab_size: int, blanks: int = 0) -> Batch:
    """Sample a batch of the copying task, which depends on the arguments only.

    Args:
        seed: Seed of the stream of batches.
        batch: Number of the batch in the stream.
        rows: Batch size B.
        symbols: Number of symbols to remember, M.
        vocab_size: Number of token ids for blank, marker and symbols, at least 3.
        blanks: Number of blanks between the symbols and the first marker.

    Returns:
        Token ids (B, 2 M + ``blanks``), and the symbols (B, M), targets of the last M positions.

    Raises:
        ValueError: If the vocabulary has no symbols.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size {vocab_size}: has no symbols besides blank and marker; use at least 3")
    sampled = _stream(seed, batch).integers(BLANK + 1, vocab_size - 1, size=(rows, symbols))
    told = torch.from_numpy(sampled)
    rest = torch.full((rows, blanks + symbols), BLANK)
    rest[:, blanks:] = vocab_size - 1
    return Batch(torch.cat((told, rest), dim=1), told)


def delay(
    seed: int, batch: int, *, rows: int, length: int, lag: int, cutoff: float = 0.25, rms: float = 0.5
) -> Batch:
    """Sample a batch of the delay task, which depends on the arguments only.

    Args:
        seed: Seed of the stream of batches.
        batch: Number of the batch in the stream.
        rows: Batch size B.
        length: Length L of the signals.
        lag: Delay in steps, below L.
        cutoff: Highest frequency of the signal, in cycles per step, at most 0.5.
        rms: RMS of the signal, before its first value is subtracted so that it starts at zero.

    Returns:
        Signals (B, L) in float32, and the signals delayed by ``lag`` steps, (B, L), zero before.

    Raises:
        ValueError: If ``lag`` is not below ``length``, or no frequency is below the cut-off.
    """
    if not 0 < lag < length:
        raise ValueError(f"lag {lag}: must be from 1 to below the length, {length}")
    frequencies = np.fft.rfftfreq(length)
    kept = (frequencies > 0) & (frequencies <= cutoff)
    if not kept.any():
        raise ValueError(f"cutoff {cutoff}: is below the lowest frequency; use at least {frequencies[1]:g}")
    noise = _stream(seed, batch).standard_normal((rows, length))
    signal = np.fft.irfft(np.fft.rfft(noise) * kept, n=length)
    # Every frequency except the Nyquist frequency counts twice.
    share = np.where(frequencies[kept] < 0.5, 2, 1).sum() / length
    signal *= rms / np.sqrt(share)
    inputs = torch.from_numpy(signal - signal[:, :1]).float()
    return Batch(inputs, torch.nn.functional.pad(inputs[:, :-lag], (lag, 0)))


class SignalModel(nn.Module):
    """Linear model of signals: a projection to E channels, a long convolution, and a projection to one.

    The RTF paper uses it for the delay task: one layer without norm, residual and activation.
    """

    conv: LongConv | RecurrentConv

    def __init__(self, n_channels: int, conv: LongConv | RecurrentConv) -> None:
        super().__init__()
        self.in_proj = nn.Linear(1, n_channels)
        self.conv = conv
        self.out_proj = nn.Linear(n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals (B, L) to signals (B, L)."""
        y: Tensor = self.out_proj(self.conv(self.in_proj(x.unsqueeze(-1))))
        return y.squeeze(-1)

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first value."""
        return self.conv.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Process one value per row, (B,): return the outputs (B,) and the state."""
        y, state = self.conv.step(self.in_proj(x.unsqueeze(-1)), state)
        return self.out_proj(y).squeeze(-1), state


Model: TypeAlias = CausalLM | SignalModel


class Recurrent(NamedTuple):
    """A converted model with the conversions of its layers."""

    model: Model
    layers: list[LayerConversion]
    refused: str
    """Messages of the methods that were refused before."""


def build_model(cell: Record) -> Model:
    """Build the model of a cell in its parallel form, initialised with the seed of the cell."""
    torch.manual_seed(cell["seed"])
    kernel, width = kernel_config(cell), cell["d_model"]
    if cell["task"] == "delay":
        return SignalModel(width, LongConv(build_kernel(kernel, width, cell["length"])))
    sizes = {"n_layers": cell["layers"], "vocab_size": cell["vocab_size"], "max_length": cell["length"]}
    return CausalLM(ModelConfig(d_model=width, expand=1, kernel=kernel, **sizes))


def kernel_config(cell: Record) -> KernelConfig:
    """Return the kernel of a cell; RTF has one denominator for all channels of a layer, as published."""
    if cell["family"] == "rtf":
        own = {name: cell[name] for name in ("state_size", "init", "constraint")}
        return RTFConfig(name="rtf", denominators=1, **own)
    return SGConvConfig(name="sgconv") if cell["family"] == "sgconv" else TNOConfig(decay=cell["decay"])


def convert_by_family(model: Model, family: str, length: int) -> Recurrent:
    """Return a converted copy of ``model`` for the horizon ``length``.

    Raises:
        UserError: If all methods of the family refuse it.
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
    """Return the outputs of a converted model, step by step, at the ``last`` positions of inputs (B, L)."""
    state: Any = model.init_state(len(inputs))
    outputs = []
    for t in range(inputs.shape[1]):
        y, state = model.step(inputs[:, t], state)
        outputs.append(y)
    return torch.stack(outputs[-last:], dim=1)


def _stream(seed: int, batch: int) -> np.random.Generator:
    return np.random.default_rng((seed, batch))
