"""What the experiment on the frequency-domain TNN says: verdicts. Tables and picture are made by
:mod:`experiments.ski_tables` and :mod:`experiments.ski_plot`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from experiments.experiment import Row, Verdict

CLOSE = 0.01
"""relative difference of bits per byte, or rise of a perplexity, that counts as none"""
FASTER = 1.02
"""ratio of speeds that is told from noise"""
GONE = 1e-6
"""share of a kernel's norm that counts as nothing left"""
BASE = "tnn"
SHORT = "tnn, decay 0.9"
SMOOTH = "fd gelu"
KINKED = "fd relu"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What holds and what does not."""
    return [*_quality(rows), *_speed(rows), *_decay(rows), *_converting(rows)]


def trained(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of trained models by variant, one per seed."""
    own = [row for row in rows if row["kind"] == "train"]
    names = dict.fromkeys(row["variant"] for row in own)
    return {name: [row for row in own if row["variant"] == name] for name in names}


def speedups(row: Row, key: str) -> dict[str, float]:
    """Seconds of the TNN over those of each other model, the median over the turns."""
    times = row[key]
    return {
        name: statistics.median(base / own for base, own in zip(times[BASE], seconds, strict=True))
        for name, seconds in times.items()
        if name != BASE
    }


def mean_bits(rows: Iterable[Row]) -> float:
    return statistics.mean(row["bits_per_byte"] for row in rows)


def _quality(rows: list[Row]) -> list[Verdict]:
    models = trained(rows)
    bits = {name: mean_bits(own) for name, own in models.items()}
    lengths = len(next(iter(models.values()))[0]["ppl"])
    rises = {name: max(_rise(row["ppl"]) for row in own) for name, own in models.items()}
    return [
        Verdict(
            "FD-TNN (GELU of the cosine) learns as well as TNN, at equal parameters and tokens",
            "minimal degradation (abstract, Long Range Arena)",
            f"bits per byte: {_listed(bits, '.3f')}",
            bits[SMOOTH] <= (1 + CLOSE) * bits[BASE],
        ),
        Verdict(
            "FD-TNN (GELU of the cosine) learns as well as a TNN of decay 0.9, whose memory is as short",
            "-",
            f"bits per byte: {SHORT} {bits[SHORT]:.3f}, {SMOOTH} {bits[SMOOTH]:.3f}",
            bits[SMOOTH] <= (1 + CLOSE) * bits[SHORT],
        ),
        Verdict(
            "perplexity of TNN and FD-TNN does not rise past the training length",
            "-",
            f"to {1 << lengths - 1} training lengths: {_listed(rises, '+.1%')}",
            all(rise <= CLOSE for rise in rises.values()),
        ),
    ]


def _listed(values: dict[str, float], style: str) -> str:
    return ", ".join(f"{name} {value:{style}}" for name, value in values.items())


def _rise(ppl: dict[str, float]) -> float:
    values = list(ppl.values())
    return max(values) / values[0] - 1


def _speed(rows: list[Row]) -> list[Verdict]:
    timed = [row for row in rows if row["kind"] == "time"]
    steps = {row["length"]: speedups(row, "step_seconds") for row in timed}
    alone = {row["length"]: speedups(row, "kernel_seconds") for row in timed}
    return [
        Verdict(
            "a causal FD-TNN (ReLU, as the TNN) trains faster than the TNN",
            "an absolute speedup (abstract)",
            "step, times as fast: " + _ratios(steps),
            all(found[KINKED] >= FASTER for found in steps.values()),
        ),
        Verdict(
            "the kernel of FD-TNN (ReLU) is faster to make than the TNN's",
            "no decay to multiply by",
            "kernel, times as fast: " + _ratios(alone),
            all(found[KINKED] >= FASTER for found in alone.values()),
        ),
    ]


def _ratios(found: dict[int, dict[str, float]]) -> str:
    parts = (f"{length:,} tokens {_listed(ratios, '.2f')}" for length, ratios in found.items())
    return "; ".join(parts)


def reach(tails: dict[str, float]) -> float:
    """First power of two from which on at most ``GONE`` is left; infinite if there is none."""
    return min((float(lag) for lag, left in tails.items() if left <= GONE), default=float("inf"))


def _decay(rows: list[Row]) -> list[Verdict]:
    found = {
        (row["input"], row["norm"], row["activation"]): reach(row["tails"])
        for row in rows
        if row["kind"] == "decay"
    }

    def told(given: str, norm: bool) -> str:
        own = {key[2]: lag for key, lag in found.items() if key[:2] == (given, norm)}
        return ", ".join(
            f"{name} by {lag:g}" if lag < float("inf") else f"{name} never" for name, lag in own.items()
        )

    def ordered(given: str, norm: bool) -> bool:
        gelu, silu, relu = (found[given, norm, name] for name in ("gelu", "silu", "relu"))
        return gelu < relu and silu < relu

    theorem = "GELU super-exponential, SiLU super-polynomial, ReLU square summable"
    gone = f"share of the norm below {GONE:g}: "
    return [
        Verdict(
            "kernels of smooth activations die out sooner than ReLU's: plain networks of the cosine",
            theorem,
            gone + told("cosine", False),
            ordered("cosine", False),
        ),
        Verdict(
            "kernels of GELU die out sooner than those of SiLU",
            "super-exponential before super-polynomial",
            gone + told("cosine", False),
            found["cosine", False, "gelu"] < found["cosine", False, "silu"],
        ),
        Verdict(
            "kernels of smooth activations die out sooner than ReLU's: normalised features, as trained",
            theorem,
            gone + told("cosine", True),
            ordered("cosine", True),
        ),
        Verdict(
            "kernels of smooth activations die out sooner than ReLU's: networks of the frequency itself",
            theorem,
            gone + told("angle", True),
            ordered("angle", True),
        ),
    ]


def _converting(rows: list[Row]) -> list[Verdict]:
    models = trained(rows)
    state = {
        name: statistics.mean(row["conversions"]["auto 1e-3"]["state_bytes"] for row in own)
        for name, own in models.items()
    }
    every = [made for own in models.values() for row in own for made in row["conversions"].values()]
    refused = sum("refused" in made for made in every)
    gaps = {
        method: max(_gap(row["conversions"][method]) for own in models.values() for row in own)
        for method in ("balanced 1e-3", "auto 1e-3", "window")
    }
    ends = {name: max(_gap(row["conversions"]["etsc"]) for row in own) for name, own in models.items()}
    return [
        Verdict(
            "an FD-TNN (GELU of the cosine) converts to no more state than the TNN (auto, 1e-3)",
            "-",
            f"bytes: {_listed(state, ',.0f')}",
            state[SMOOTH] <= state[BASE],
        ),
        Verdict(
            "TNN and FD-TNN keep the parallel form's perplexity at a tolerance of 1e-3, at every length",
            "-",
            f"largest gap: {_listed(gaps, '.0e')}; {refused} conversions of {len(every)} refused",
            all(gap <= 1e-3 for gap in gaps.values()),
        ),
        Verdict(
            "ETSC serves an FD-TNN past the training length as it serves a TNN",
            "exact conversion (arXiv 2311.08756)",
            "largest gap: " + _listed(ends, ".0e"),
            all(gap <= 1e-3 for gap in ends.values()),
        ),
    ]


def _gap(conversion: Row) -> float:
    """Largest modulus over the lengths; 0 where the conversion was refused."""
    return max((abs(gap) for gap in conversion.get("gaps", {}).values()), default=0.0)
