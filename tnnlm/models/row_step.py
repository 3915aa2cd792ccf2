"""Decoding step of a single row with few operators, for machines without a C++ compiler.

A step of one row takes a few milliseconds, of which starting hundreds of operators would be a third. The
recurrence s = lam s + u, y = Re sum c s equals

    r = lam s            y = Re sum c r + (Re sum c) u            s = r + u

of which all but the terms with u is computed for all layers at once, before the first layer. Earlier inputs
in the window add to y in the same way. Dimensions: R rows of modes or taps of all layers, E channels, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences
from tnnlm.modules.block import Block
from tnnlm.modules.glu import GLU
from tnnlm.modules.mixer import GatedMixer
from tnnlm.modules.norm import SimpleRMSNorm
from tnnlm.ops.ssm import SSMParams

_EPSILON = 1e-8
"""Term of the norm's denominator, see :mod:`tnnlm.ops.norm`."""
_MOST_MODES = 64
"""Largest number of modes of a layer: with more, the terms cancel, and their order would matter."""
_MOST_NUMBERS = 1 << 19
"""Largest size of a part of the state of all layers, R E; larger ones don't stay in the cache of a core."""


class RowStep:
    """Step of a single row of a converted model.

    It takes and returns flat lists of tensors, as a compiled step does (:mod:`tnnlm.inference.flat_step`).
    """

    def __init__(self, model: CausalLM) -> None:
        """Set up the step of a converted model on the CPU for which :meth:`covers` holds."""
        self._model = model
        params = [part for part in recurrences(model) if isinstance(part, SSMParams)]
        self._real, self._imag = (_Joined([part.residues.shape[2] for part in params]) for _ in range(2))
        self._inputs = _Joined([max(part.window.shape[1] - 1, 0) for part in params])
        self._taps = torch.cat([part.window[:, 1:].mT for part in params])
        self._residues = torch.cat([part.residues.permute(1, 2, 0) for part in params], dim=1).contiguous()
        poles = [part.poles if part.poles.dim() == 3 else part.poles[None] for part in params]
        widest = max(len(part) for part in poles)
        exact = torch.cat([part.expand(widest, -1, -1).permute(1, 2, 0) for part in poles], dim=1)
        coarse = exact.float().contiguous()
        # As in tnnlm.ops.ssm, poles are split into two numbers, of which the finer is multiplied first.
        self._coarse, self._fine = coarse, (exact - coarse).float().contiguous()
        self._layers = [_Layer.of(block, part) for block, part in zip(model.layers, params, strict=True)]
        self._epsilon = torch.tensor(_EPSILON)

    @staticmethod
    def covers(model: CausalLM) -> bool:
        """Return whether the model is built of layers and recurrences that the step covers."""
        params = recurrences(model)
        layers = all(
            isinstance(block, Block)
            and type(block.mixer) is GatedMixer
            and type(block.glu) is GLU
            and type(block.norm) is type(block.glu_norm) is SimpleRMSNorm
            for block in model.layers
        )
        if not layers or not all(isinstance(part, SSMParams) for part in params):
            return False
        states = model.init_state(1).tensors
        sizes = [part.numel() for part in states]
        return (
            max(part.shape[-1] for part in states[1::3]) <= _MOST_MODES
            and max(sum(sizes[i::3]) for i in range(3)) <= _MOST_NUMBERS
            and all(part.dtype == torch.float32 for part in states)
        )

    def __call__(self, tokens: Tensor, *parts: Tensor) -> list[Tensor]:
        """Return the logits (1, V) and the parts of the next state, after a token (1,)."""
        window, real, imag = (
            joined.whole(parts[i::3]) for i, joined in enumerate((self._inputs, self._real, self._imag))
        )
        real, imag, products = self._free_response(real, imag)
        y = self._real.sums(products)
        if len(window):
            y += self._inputs.sums(window * self._taps)
        states = self._real.parts(real)
        x, inputs = self._model._embed(tokens), []
        for layer, response, state in zip(self._layers, y.split(1), states, strict=True):
            gate, u = silu(layer.mixer_in(self._normed(x))).chunk(2, -1)
            inputs.append(u)
            state += u
            x = x + layer.mixer_out(response.addcmul_(layer.gain, u).mul_(gate))
            gate, value = layer.glu_in(self._normed(x)).chunk(2, -1)
            x = x + layer.glu_out(silu(gate).mul_(value))
        windows = self._inputs.parts(self._moved(window, inputs))
        changed = zip(windows, states, self._imag.parts(imag), strict=True)
        return [self._model.logits(x), *(part for layer in changed for part in layer)]

    def _free_response(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return lam s as planes (R, E), and the terms of Re sum c lam s, (R, E)."""
        (re, im), (re_fine, im_fine) = self._coarse, self._fine
        after_re = (re_fine * real).addcmul_(im_fine, imag, value=-1)
        after_re = after_re.addcmul_(re, real).addcmul_(im, imag, value=-1)
        after_im = (re_fine * imag).addcmul_(im_fine, real).addcmul_(re, imag).addcmul_(im, real)
        c_re, c_im = self._residues
        return after_re, after_im, (after_re * c_re).addcmul_(after_im, c_im, value=-1)

    def _normed(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.add(self._epsilon, norm, alpha=x.shape[-1] ** -0.5)

    def _moved(self, window: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Return the last inputs of all layers (R, E), newest first, after those of a token, (1, E) each."""
        if not len(window):
            return window
        olds = window.split(self._inputs.counts)
        pieces = [piece for u, old in zip(inputs, olds, strict=True) if len(old) for piece in (u, old[:-1])]
        return torch.cat(pieces)


class _Layer(NamedTuple):
    """Linear layers of a block, without the overhead of calling modules, and the gain of its recurrence."""

    mixer_in: Callable[[Tensor], Tensor]
    mixer_out: Callable[[Tensor], Tensor]
    glu_in: Callable[[Tensor], Tensor]
    glu_out: Callable[[Tensor], Tensor]
    gain: Tensor
    """Effective tap of lag 0, (E,)."""

    @classmethod
    def of(cls, block: Block, params: SSMParams) -> _Layer:
        assert isinstance(block.mixer, GatedMixer)
        assert isinstance(block.glu, GLU)
        mixer, glu = block.mixer, block.glu
        gain = params.residues[:, 0].double().sum(-1) + params.window[:, :1].double().sum(-1)
        return cls(
            mixer.in_proj.forward,
            mixer.out_proj.forward,
            glu.in_proj.forward,
            glu.out_proj.forward,
            gain.float(),
        )


class _Joined:
    """Parts of the state of all layers, (1, R of the layer, E), stored as one tensor (R, E)."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self._layers = torch.zeros(len(counts), sum(counts))
        start = 0
        for row, count in zip(self._layers, counts, strict=True):
            row[start : start + count] = 1
            start += count
        self._whole, self._addresses = torch.empty(0), list[int]()

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return parts as one tensor, without a copy if they are those that :meth:`parts` returned last."""
        if [part.data_ptr() for part in parts] == self._addresses:
            return self._whole
        return torch.cat([part.squeeze(0) for part in parts])

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return the parts of one tensor, which are views of it."""
        found = [part.unsqueeze(0) for part in whole.split(self.counts)]
        # The tensor is kept, so that its addresses belong to no other.
        self._whole, self._addresses = whole, [part.data_ptr() for part in found]
        return found

    def sums(self, terms: Tensor) -> Tensor:
        """Return the sum of the rows (R, E) of each layer, (L, E)."""
        return self._layers @ terms
