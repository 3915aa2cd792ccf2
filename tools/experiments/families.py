"""Bits per byte of TNN, SGConv, RTF and a Transformer at equal parameters and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev

from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, select
from experiments.report import PALETTE, Line, Panel, Table, line
from experiments.scoring import held_out_bits
from experiments.sizing import text_models
from experiments.training import train_family

NAMES = {"tnn": "TNN", "sgconv": "SGConv", "rtf": "RTF", "transformer": "Transformer"}
TEXTS = Declarations("families")


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
    sizes = TEXTS.sizes(size)
    return [
        {**family, "seed": seed, "size": size, "steps": sizes["steps"]}
        for seed in sizes["seeds"]
        for family in given
    ]


def _measure(files: tuple[tuple[str, Path], ...], cell: Record, data: Files) -> Record:
    """Train one and score it at the training length."""
    names = (*NAMES, *(name for name, _ in files))
    models = text_models(names, cell["size"], cell["steps"], data, files)
    family = models.families[cell["family"]]
    model, trained = train_family(family, models.rows, cell["seed"])
    bits = held_out_bits(model, models.corpus, family.config, TEXTS.sizes(cell["size"])["tokens"])
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
    found = []
    for name, own in bits.items():
        published = TEXTS.text(name) if name in ("tnn", "rtf") else "-"
        shown = {"family": NAMES.get(name, name), "own": own, "peer": peer, "gap": own / peer - 1}
        found.append(TEXTS.claim("ahead", own <= peer, published=published, **shown))
    near, least, most = max(ours) <= 1.05 * min(ours), min(sizes), max(sizes)
    tokens = {record["tokens"] for record in records}
    equal = most <= 1.03 * least and len(tokens) == 1
    return [
        *found,
        TEXTS.claim("near", near, least=min(ours), most=max(ours)),
        TEXTS.claim("equal", equal, least=least, most=most, tokens=records[0]["tokens"]),
    ]


def _tables(records: list[Record]) -> list[Table]:
    """Quality and speed by family, means over the seeds."""

    def shown(own: list[Record]) -> str:
        bits = _bits(own)
        return f"{fmean(bits):.4f}" + (f" ± {stdev(bits):.4f}" if len(bits) > 1 else "")

    items = [
        own[0]
        | {
            "label": NAMES.get(name, name),
            "bits": shown(own),
            "ppl": fmean(record["ppl"] for record in own),
            "speed": median(record["tokens_per_second"] for record in own),
        }
        for name, own in _by_family(records).items()
    ]
    tried = TEXTS.text("tried") if records[0]["size"] == "small" else ""
    return [TEXTS.table("quality", items, tokens=records[0]["tokens"], tried=tried)]


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
