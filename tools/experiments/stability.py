"""Where conversions fail: error against length, depth, decay, precision, initialisation and bad taps.

The boundary analysis that ETSC's paper (arXiv 2311.08756) leaves open. Measured of every recurrence: the
error of its taps, as the certificate does, and that of its outputs to white noise, one step after the other
in float32: within the horizon, where rounding piles up, and after four, where what was left out shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.ablations import vandermonde
from experiments.frame import Experiment, Files, Record, Section
from experiments.stability_claims import TEXTS, claims, panels, tables
from experiments.taps import DISTRIBUTIONS, INITIALISATIONS, make_taps
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import certify, convert_model
from tnnlm.conversion.certify import EXTENT, horizon_warning
from tnnlm.conversion.methods import LayerConversion, relative_error
from tnnlm.conversion.taps import convert_taps
from tnnlm.errors import UserError
from tnnlm.kernels import TNOConfig
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.ssm import SSMParams

METHODS = ("etsc", "balanced", "window", "vandermonde")
PRECISIONS = ("float64", "float32", "bfloat16")
"""that poles and residues are rounded to"""
LARGEST_VANDERMONDE = 512
"""taps: its system has as many unknowns"""


def _grid(size: str) -> list[Record]:
    """One factor at a time around a TNO kernel of 512 taps, decay 0.99."""
    sweep = TEXTS.sizes(size)
    base: Record = {"source": "tno", "n": sweep["taps"], "decay": 0.99}
    base |= {"init": "default", "depth": 3, "stored": "float32"}
    changes: list[tuple[str, Record]] = [("length", {"n": value}) for value in sweep["length"]]
    changes += [("decay", {"decay": value}) for value in sweep["decay"]]
    changes += [("depth", {"depth": value}) for value in sweep["depth"]]
    changes += [("initialisation", {"init": value}) for value in INITIALISATIONS]
    changes += [("precision", {"stored": value}) for value in PRECISIONS]
    changes += [("taps", {"source": value}) for value in DISTRIBUTIONS]
    changes += [("poles", {"source": "resonances", "distance": value}) for value in sweep["distance"]]
    cells = [{"sweep": name, "method": m, **base, **change} for name, change in changes for m in METHODS]
    layers = [{"sweep": "layers", "layers": value, "decay": 0.99} for value in sweep["layers"]]
    return cells + [{**cell, "method": m} for cell in layers for m in ("etsc", "balanced", "window")]


@torch.no_grad()
def _measure(cell: Record, data: Files) -> Record:
    """Both errors, and what the user is told."""
    return _measure_model(cell) if cell["sweep"] == "layers" else _measure_taps(cell)


def _measure_taps(cell: Record) -> Record:
    n, stored = cell["n"], getattr(torch, cell["stored"])
    k = make_taps(cell, EXTENT * n)
    kept = torch.float64 if stored == torch.float64 else torch.float32
    if cell["method"] == "vandermonde" and n > LARGEST_VANDERMONDE:
        return {"told": f"left out above {LARGEST_VANDERMONDE} taps"}
    try:
        params = _convert(k.to(kept), cell)
    except UserError as error:
        return {"refused": True, "told": str(error)}
    if stored == torch.bfloat16:
        params = SSMParams(*(tensor.to(stored).to(tensor.dtype) for tensor in params))
    measured = {"refused": False, **_output_errors(params, k, n, kept)}
    if cell["method"] == "vandermonde":  # no method of the package's: it has no certificate
        return measured | {"tap_error": relative_error(k[:, :n], params)}
    report = certify(k, LayerConversion(params, cell["method"], ""), n)
    return measured | {
        "tap_error": report.relative_tap_error,
        "l1_error": report.l1_error,
        "tail": report.tail_energy**0.5,
        "largest_pole": report.largest_pole,
        "order": report.order,
        "told": horizon_warning([report], n),
    }


def _convert(k: Tensor, cell: Record) -> SSMParams:
    n = cell["n"]
    if cell["method"] == "vandermonde":
        return vandermonde(k[:, :n].double(), "real")[0].to_dtype(k.dtype)
    decay = cell["decay"] if cell["source"] == "tno" else None
    return convert_taps(k, method=cell["method"], horizon=n, decay=decay)[0]


def _output_errors(params: SSMParams, k: Tensor, n: int, dtype: torch.dtype) -> Record:
    """Relative RMS of outputs to uniform noise in the second half of the horizon and in the last horizon of
    k (E, T); and the largest of all, over the taps' L1 norm, which the certificate bounds."""
    length = k.shape[1]
    x = 2 * torch.rand(length, len(k), generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    size = 2 * length
    spectrum = torch.fft.rfft(x.T, n=size) * torch.fft.rfft(k, n=size)
    expected = torch.fft.irfft(spectrum, n=size)[:, :length].T
    params = params.to_dtype(dtype)
    state = params.init_state(1)
    outputs = []
    for t in range(length):
        y, state = params.step(x[t : t + 1].to(dtype), state)
        outputs.append(y[0].double())
    off = torch.stack(outputs) - expected
    tiny = torch.finfo(torch.float64).tiny

    def relative(part: slice) -> float:
        return float(off[part].norm() / expected[part].norm().clamp(min=tiny))

    bounded = off.abs().amax(0) / k.abs().sum(1).clamp(min=tiny)
    return {
        "inside_error": relative(slice(n // 2, n)),
        "output_error": relative(slice(length - n, length)),
        "bounded_error": float(bounded.max()),
    }


def _measure_model(cell: Record) -> Record:
    """Logits of an untrained model of so many layers, recurrent against parallel, at four horizons."""
    torch.manual_seed(0)
    kernel = TNOConfig(decay=cell["decay"], rpe_dim=16, rpe_layers=2)
    layers = cell["layers"]
    config = ModelConfig(d_model=32, n_layers=layers, vocab_size=256, max_length=128, kernel=kernel)
    model = CausalLM(config).eval()
    tokens = torch.randint(256, (1, 512))
    expected = model(tokens)
    try:
        converted = convert_model(model, method=cell["method"])
    except UserError as error:
        return {"refused": True, "told": str(error)}
    logits, _ = converted.prefill(tokens, converted.init_state(1))
    off = float((logits - expected).norm() / expected.norm())
    return {"refused": False, "output_error": off}


STABILITY = Experiment(
    name="stability",
    title="Where conversions fail",
    sections=(Section(grid=_grid, measure=_measure, claims=claims, tables=tables, panels=panels),),
    columns=5,
    panel_size=(3.4, 3.2),
)
