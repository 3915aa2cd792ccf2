"""Bits per byte of TNN, SGConv, RTF and a Transformer with equal parameters and training tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev

from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, grouped, mean_of
from experiments.report import PALETTE, Line, Panel, Table, line
from experiments.sizing import text_models
from experiments.training import held_out_bits, train_family

NAMES = {"tnn": "TNN", "sgconv": "SGConv", "rtf": "RTF", "transformer": "Transformer"}
TEXTS = Declarations("families")


def families(files: Mapping[str, Path] | None = None) -> Experiment:
    """Return the experiment that trains all families on the same tokens and scores them on the same text.

    Args:
        files: Configuration files of the kernels of custom families, by name.
    """
    own = tuple((files or {}).items())
    sections = (
        Section(grid=partial(_grid, own), measure=partial(_measure, own)),
        Section(claims=_claims, tables=_tables, panels=_panels),
    )
    return Experiment(sections=sections, **TEXTS.named("experiment"))


def _grid(files: tuple[tuple[str, Path], ...], size: str) -> list[Record]:
    """Return a cell per family and seed; the cell of a custom family contains its file."""
    given = [{"family": name} for name in NAMES]
    given += [{"family": name, "settings": path.read_text(encoding="utf-8")} for name, path in files]
    sizes = TEXTS.sizes(size)
    return [
        {**family, "seed": seed, "size": size, "steps": sizes["steps"]}
        for seed in sizes["seeds"]
        for family in given
    ]


def _measure(files: tuple[tuple[str, Path], ...], cell: Record, data: Files) -> Record:
    """Train a family and score it at the training length."""
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


def _claims(records: list[Record]) -> Iterator[Claim]:
    """Compare the families by their means over the seeds."""
    bits = {name: mean_of(own, "bits_per_byte") for name, own in grouped(records, "family").items()}
    peer = bits.pop("transformer")
    for name, own in bits.items():
        published = TEXTS.text(name) if name in ("tnn", "rtf") else "-"
        shown = {"family": NAMES.get(name, name), "own": own, "peer": peer, "gap": own / peer - 1}
        yield TEXTS.claim("ahead", published=published, **shown)
    ours = [bits[name] for name in NAMES if name in bits]
    sizes = [record["params"] for record in records]
    tokens = {record["tokens"] for record in records}
    least, most = min(ours), max(ours)
    yield TEXTS.claim("near", least=least, most=most, ratio=most / least)
    least, most = min(sizes), max(sizes)
    same = len(tokens) == 1
    yield TEXTS.claim("equal", same, least=least, most=most, ratio=most / least, tokens=records[0]["tokens"])


def _tables(records: list[Record]) -> Iterator[Table]:
    items = []
    for name, own in grouped(records, "family").items():
        bits = [record["bits_per_byte"] for record in own]
        deviation = f" ± {stdev(bits):.4f}" if len(bits) > 1 else ""
        speed = median(record["tokens_per_second"] for record in own)
        means = {"bits": f"{fmean(bits):.4f}{deviation}", "ppl": mean_of(own, "ppl"), "speed": speed}
        items.append(own[0] | {"label": NAMES.get(name, name)} | means)
    yield TEXTS.table("quality", items, **records[0])


def _panels(records: list[Record]) -> Iterator[Panel]:
    """Plot learning curves, and bits per byte of every seed."""
    curves, points = [], []
    labels = {name: NAMES.get(name, name) for name in grouped(records, "family")}
    for place, (name, own) in enumerate(grouped(records, "family").items()):
        windows = zip(*(record["curve"] for record in own), strict=True)
        mean = [(window[0][0], fmean(loss for _, loss in window)) for window in windows]
        curves.append(line(labels[name], mean, name, marker=None))
        bits, style = [record["bits_per_byte"] for record in own], {"color": PALETTE.get(name)}
        points.append(Line("", [place] * len(bits), bits, style | {"marker": "o", "linestyle": ""}))
        points.append(Line("", [place - 0.25, place + 0.25], [fmean(bits)] * 2, style))
    yield TEXTS.panel("training", curves)
    yield TEXTS.panel("held_out", points, ticks=dict(enumerate(labels.values())))
