"""Limits of the conversions: error against length, depth, decay, precision, initialisation and kind of taps.

The ETSC paper (arXiv 2311.08756) has no such analysis. The experiment measures the error of the taps of each
recurrence, as the certificate does, and that of its outputs on white noise, step by step in float32: within
the horizon, where rounding accumulates, and after four, where the truncated part of the kernel shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.etsc import VANDERMONDE_LENGTH, vandermonde
from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, grouped, select
from experiments.report import PALETTE, Line, Panel, Table, line, smallest_shown
from experiments.taps import make_taps
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import certify, convert_model
from tnnlm.conversion.certify import EXTENT, horizon_warning
from tnnlm.conversion.source import LayerConversion, relative_error
from tnnlm.conversion.taps import convert_taps
from tnnlm.errors import UserError
from tnnlm.kernels import TNOConfig
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.ssm import SSMParams

FAILED = 0.1
"""Relative error of the outputs above which a conversion is useless."""
ROUNDING = 1e-4
"""Relative error of the outputs in float32 below which a conversion counts as exact."""
DEAD = 1e-7
"""Share of a kernel's norm past the horizon below which it has decayed."""
TEXTS = Declarations("stability")
SETTINGS: dict[str, str] = TEXTS.named("settings")
"""Varied setting, by sweep."""
LABELS: dict[str, str] = TEXTS.named("labels")
"""Description of the varied setting, by sweep."""
TAP_METHODS: tuple[str, ...] = ("etsc", "balanced", "window", "vandermonde")
"""Methods for single kernels. Whole models use all but the last, which tnnlm does not have."""


def _grid(size: str) -> list[Record]:
    """Return cells that vary one setting of a TNO kernel at a time, and whole models by number of layers."""
    sizes = TEXTS.sizes(size)
    cells: list[Record] = []
    for sweep, setting in SETTINGS.items():
        base, methods = sizes["kernel"], TAP_METHODS
        if sweep == "poles":
            base = base | {"source": "resonances"}
        elif sweep == "layers":
            base, methods = {"decay": base["decay"]}, TAP_METHODS[:-1]
        varied = ({setting: value, "method": m} for value in sizes[sweep] for m in methods)
        cells += [{"sweep": sweep} | base | change for change in varied]
    return cells


@torch.no_grad()
def _measure(cell: Record, data: Files) -> Record:
    """Measure both errors, and record the message to the user."""
    return _measure_model(cell) if cell["sweep"] == "layers" else _measure_taps(cell)


def _measure_taps(cell: Record) -> Record:
    n, stored = cell["n"], getattr(torch, cell["stored"])
    k = make_taps(cell, EXTENT * n)
    kept = torch.float64 if stored == torch.float64 else torch.float32
    if cell["method"] == "vandermonde" and n > VANDERMONDE_LENGTH:
        return {"told": f"skipped above {VANDERMONDE_LENGTH} taps"}
    try:
        params = _convert(k.to(kept), cell)
    except UserError as error:
        return {"refused": True, "told": str(error)}
    if stored == torch.bfloat16:
        params = SSMParams(*(tensor.to(stored).to(tensor.dtype) for tensor in params))
    measured = {"refused": False, **_output_errors(params, k, n, kept)}
    if cell["method"] == "vandermonde":  # not a method of tnnlm, so that it has no certificate
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
    """Return the relative RMS error of outputs on uniform noise in the second half of the horizon and in the
    last horizon of k (E, T), and the largest error over the L1 norm of the taps, which the certificate
    bounds."""
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
    """Compare recurrent and parallel logits of an untrained model over four horizons."""
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


def _claims(records: list[Record]) -> Iterator[Claim]:
    told = [record for record in records if "l1_error" in record]
    ordinary = [r for r in told if r["sweep"] in ("length", "depth", "initialisation", "decay")]
    exact = select(ordinary, method="etsc")
    rounded = all(r["tap_error"] <= 1e-5 and r["inside_error"] <= ROUNDING for r in exact)
    taps, outputs = _largest(exact, "tap_error"), _largest(exact, "inside_error")
    yield TEXTS.claim("exact", rounded, taps=taps, outputs=outputs)
    dead = [record for record in exact if record["tail"] <= DEAD]
    stays = bool(dead) and all(record["output_error"] <= ROUNDING for record in dead)
    yield TEXTS.claim("dead", stays, outputs=_largest(dead, "output_error"), count=len(dead))
    alive = [record for record in exact if record["tail"] > DEAD]
    failed, outputs = sum(map(_failed, alive)), _largest(alive, "output_error")
    yield TEXTS.claim("alive", failed=failed, count=len(alive), outputs=outputs)
    reduced = [r for r in select(records, method="balanced") if r["sweep"] != "precision"]
    made = [record for record in reduced if "tap_error" in record]
    met, refused = all(record["tap_error"] <= 1.001e-3 for record in made), len(reduced) - len(made)
    yield TEXTS.claim("balanced", met, made=len(made), taps=_largest(made, "tap_error"), refused=refused)
    yield TEXTS.claim("poles", largest=max((record["largest_pole"] for record in told), default=0.0))
    failing = [r["n"] for r in select(records, method="vandermonde", sweep="length") if _failed(r)]
    useless = f"from {min(failing)} taps" if failing else "not at these lengths"
    yield TEXTS.claim("eigenvalues", bool(failing), found=useless)
    unsaid = [record for record in told if _failed(record) and not record["told"]]
    warned = f"a warning in all {sum(map(_failed, told))} cells"
    if unsaid:
        warned = f"no warning in {len(unsaid)} cells; first {_name(unsaid[0])}"
    yield TEXTS.claim("warned", not unsaid, found=warned)
    # The tolerance is the rounding error of outputs in float32, relative to the largest possible output.
    silent = [record for record in told if not record["bounded_error"] <= record["l1_error"] + 1e-5]
    bound = f"not in {len(silent)} cells; first {_name(silent[0])}" if silent else f"all {len(told)} cells"
    yield TEXTS.claim("bound", not silent, found=bound)


def _tables(records: list[Record]) -> Iterator[Table]:
    yield TEXTS.table("factors", failed=FAILED)
    for sweep, setting in SETTINGS.items():
        items = [
            {setting: _shown(value)} | {record["method"]: _cell(record) for record in own}
            for value, own in grouped(select(records, sweep=sweep), setting).items()
        ]
        yield TEXTS.table("factor", items, label=LABELS[sweep].capitalize())
    rows = [
        _thresholds(sweep, method, own)
        for sweep in SETTINGS
        for method, own in grouped(select(records, sweep=sweep), "method").items()
        if method != "vandermonde"
    ]
    yield TEXTS.table("thresholds", rows, failed=FAILED)


def _thresholds(sweep: str, method: str, own: list[Record]) -> Record:
    """Return the settings at which a method fails, and the message to the user at the first of them."""
    row: Record = {"factor": LABELS[sweep], "method": method, "told": ""}
    for key in ("inside_error", "output_error", "refused"):
        failing = [record for record in own if _above(record, key)]
        named = ", ".join(_shown(record[SETTINGS[sweep]]) for record in failing) or "-"
        row[key] = "all" if len(failing) == len(own) > 1 else named
    failing = [record for record in own if _failed(record) or _above(record, "inside_error")]
    return row | ({"told": f"`{failing[0].get('told') or 'nothing'}`"} if failing else {})


def _panels(records: list[Record]) -> Iterator[Panel]:
    """Plot the error against every numeric setting, within the horizon (top) and after four (bottom)."""
    limit = Line("", y=[FAILED], style={"color": PALETTE["limit"], "linestyle": ":"})
    for name, key in (("inside", "inside_error"), ("outside", "output_error")):
        for sweep in ("length", "decay", "depth", "poles", "layers"):
            lines = []
            for method in grouped(records, "method"):
                own = select(records, sweep=sweep, method=method)
                finite = [record for record in own if math.isfinite(record.get(key, math.nan))]
                lines.append(line(method, [(_position(r), smallest_shown(r[key])) for r in finite]))
            below = "1 - decay (1e-5: no decay)" if sweep == "decay" else LABELS[sweep]
            first = (name, sweep) == ("inside", "length")
            yield TEXTS.panel(name, [*lines, limit], {"below": below}, legend=first)


def _position(record: Record) -> float:
    value = float(record[SETTINGS[record["sweep"]]])
    return max(1 - value, 1e-5) if record["sweep"] == "decay" else value


def _above(record: Record, key: str) -> bool:
    """Return whether a conversion was refused, or its error is above ``FAILED`` or NaN."""
    return bool(record.get(key)) if key == "refused" else key in record and not record[key] <= FAILED


def _failed(record: Record) -> bool:
    """Return whether a conversion failed; refused ones count as failed, skipped ones do not."""
    return _above(record, "refused") or _above(record, "output_error")


def _cell(record: Record) -> str:
    if record.get("refused"):
        return "refused"
    errors = [record[key] for key in ("inside_error", "output_error") if key in record]
    shown = (f"{error:.1e}" if error <= FAILED else f"**{error:.1e}**" for error in errors)
    return " / ".join(shown) if "output_error" in record else "-"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _largest(records: Iterable[Record], key: str) -> str:
    worst = max(records, key=lambda record: float(record[key]), default=None)
    return "not measured" if worst is None else f"{worst[key]:.1e} ({_name(worst)})"


def _name(record: Record) -> str:
    return f"{record['method']}, {record['sweep']} {record[SETTINGS[record['sweep']]]}"


_SECTION = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
STABILITY = Experiment(sections=(_SECTION,), **TEXTS.named("experiment"))
