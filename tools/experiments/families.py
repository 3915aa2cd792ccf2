"""Bits per byte of TNN, SGConv, RTF and a Transformer at equal parameters and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev

from experiments.frame import Claim, Experiment, Files, Record, Section, select
from experiments.report import PALETTE, Line, Panel, Table, line
from experiments.scoring import held_out_bits
from experiments.sizing import text_models
from experiments.training import train_family

NAMES = {"tnn": "TNN", "sgconv": "SGConv", "rtf": "RTF", "transformer": "Transformer"}
PUBLISHED = {
    "tnn": "24.67 against 24.78 (test perplexity, WikiText-103, TNN paper)",
    "rtf": "Hyena-RTF 18.0 against Hyena 18.5 (perplexity, WikiText-103, RTF paper)",
}
_STEPS = {"tiny": 60, "small": 400, "paper": 0}
_SEEDS = {"tiny": (0,), "small": (0, 1, 2), "paper": (0, 1, 2)}
_VAL_TOKENS = {"tiny": 1 << 10, "small": 1 << 17, "paper": 1 << 18}
_NOTE = (
    ", and its learning rate is the best of 1e-3, 2e-3 and 4e-3. docs/families.md has more channels, a "
    "second text, and the cost of decoding"
)


def families(files: Mapping[str, Path] | None = None) -> Experiment:
    """Train all on the same tokens in the same order, score all on the same held-out text.

    Args:
        files: by name, families beside those of ``NAMES``: the files that their kernels are read from.
    """
    own = tuple((files or {}).items())
    section = Section(
        grid=partial(_grid, own),
        measure=partial(_measure, own),
        claims=_claims,
        tables=_tables,
        panels=_panels,
    )
    return Experiment(name="families", title="Families at equal parameters and tokens", sections=(section,))


def _grid(files: tuple[tuple[str, Path], ...], size: str) -> list[Record]:
    """Every family on every seed; of a file what it says is part of the cell."""
    given = [{"family": name} for name in NAMES]
    given += [{"family": name, "settings": path.read_text(encoding="utf-8")} for name, path in files]
    return [
        {**family, "seed": seed, "size": size, "steps": _STEPS[size]}
        for seed in _SEEDS[size]
        for family in given
    ]


def _measure(files: tuple[tuple[str, Path], ...], cell: Record, data: Files) -> Record:
    """Train one and score it at the training length."""
    names = (*NAMES, *(name for name, _ in files))
    models = text_models(names, cell["size"], cell["steps"], data, files)
    family = models.families[cell["family"]]
    model, trained = train_family(family, models.rows, cell["seed"])
    bits = held_out_bits(model, models.corpus, family.config, _VAL_TOKENS[cell["size"]])
    return {
        "bits_per_byte": bits,
        "ppl": math.exp(bits * math.log(2) * models.corpus.val.bytes_per_token),
        "params": family.params,
        "width": family.config.model.glu_dim,
        "lr": family.config.optim.lr,
        **trained,
    }


def _bits(own: list[Record]) -> list[float]:
    return [record["bits_per_byte"] for record in own]


def _by_family(records: list[Record]) -> dict[str, list[Record]]:
    names = dict.fromkeys(record["family"] for record in records)
    return {name: select(records, family=name) for name in names}


def _claims(records: list[Record]) -> list[Claim]:
    """Who is ahead of whom, by means over the seeds."""
    bits = {name: fmean(_bits(own)) for name, own in _by_family(records).items()}
    peer = bits.pop("transformer")
    sizes = [record["params"] for record in records]
    ours = [bits[name] for name in NAMES if name in bits]
    return [
        *(
            Claim(
                f"{NAMES.get(name, name)} is at least as good as the Transformer",
                PUBLISHED.get(name, "-"),
                f"{own:.4f} against {peer:.4f} bits per byte ({own / peer - 1:+.1%})",
                own <= peer,
            )
            for name, own in bits.items()
        ),
        Claim(
            "TNN, SGConv and RTF are within 5 % of each other",
            "-",
            f"{min(ours):.4f} to {max(ours):.4f} bits per byte",
            max(ours) <= 1.05 * min(ours),
        ),
        Claim(
            "parameters are equal to 3 %, and tokens to the last one",
            "-",
            f"{min(sizes):,} to {max(sizes):,} parameters; {records[0]['tokens']:,} tokens",
            max(sizes) <= 1.03 * min(sizes) and len({record["tokens"] for record in records}) == 1,
        ),
    ]


def _tables(records: list[Record]) -> list[Table]:
    """Quality and speed by family, means over the seeds."""

    def shown(own: list[Record]) -> str:
        bits = _bits(own)
        return f"{fmean(bits):.4f}" + (f" ± {stdev(bits):.4f}" if len(bits) > 1 else "")

    columns = {
        "family": lambda own: NAMES.get(own[0]["family"], own[0]["family"]),
        "parameters": lambda own: f"{own[0]['params']:,}",
        "learning rate": lambda own: f"{own[0]['lr']:g}",
        "bits per byte": shown,
        "perplexity": lambda own: f"{fmean(record['ppl'] for record in own):.2f}",
        "training tokens/s": lambda own: f"{median(record['tokens_per_second'] for record in own):,.0f}",
    }
    note = (
        f"± standard deviation over the seeds. {records[0]['tokens']:,} tokens, the same in the same order "
        "for all; parallel form, at the training length. The Transformer has rotary positions"
    )
    note += (_NOTE if records[0]["size"] == "small" else "") + "."
    return [Table("## Quality", columns, list(_by_family(records).values()), after=note)]


def _panels(records: list[Record]) -> list[Panel]:
    """Learning curves, and bits per byte of every seed."""
    curves, points = [], []
    for place, (name, own) in enumerate(_by_family(records).items()):
        windows = zip(*(record["curve"] for record in own), strict=True)
        mean = [(window[0][0], fmean(loss for _, loss in window)) for window in windows]
        curves.append(line(NAMES.get(name, name), mean, name, marker=None))
        bits, style = _bits(own), {"color": PALETTE.get(name)}
        points.append(Line("", [place] * len(bits), bits, style | {"marker": "o", "linestyle": ""}))
        points.append(Line("", [place - 0.25, place + 0.25], [fmean(bits)] * 2, style))
    names = [NAMES.get(name, name) for name in _by_family(records)]
    labels = {"xlabel": "tokens read", "ylabel": "training loss, nats per token", "xscale": "log"}
    return [
        Panel("training", curves, axes=labels),
        Panel("held out", points, axes={"ylabel": "bits per byte"}, ticks=dict(enumerate(names))),
    ]
