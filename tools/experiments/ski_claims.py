"""What the experiment on the frequency-domain TNN says: claims, tables, a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import mean, median

from experiments.frame import Claim, Declarations, Record, select
from experiments.report import Line, Panel, Table, line, smallest_shown

ACTIVATIONS = ("gelu", "silu", "relu")
CLOSE = 0.01
"""relative difference of bits per byte, or rise of a perplexity, that counts as none"""
FASTER = 1.02
"""ratio of speeds that is told from noise"""
GONE = 1e-6
"""share of a kernel's norm that counts as nothing left"""
SHOWN = ("4", "16", "64", "256", "512", "1024")
"""lags of the table of decay"""
SKI_TEXTS = Declarations("ski")


def trained(records: list[Record]) -> dict[str, list[Record]]:
    """Records of trained models by variant, one per seed."""
    own = select(records, kind="train")
    return {name: select(own, variant=name) for name in dict.fromkeys(record["variant"] for record in own)}


def speedups(record: Record, key: str) -> dict[str, float]:
    """Seconds of the TNN over those of each other model, the median over the turns."""
    times = dict(record[key])
    base = times.pop("tnn")
    return {
        name: median(first / own for first, own in zip(base, seconds, strict=True))
        for name, seconds in times.items()
    }


def reach(tails: dict[str, float]) -> float:
    """First power of two from which on at most ``GONE`` is left; infinite if there is none."""
    return min((float(lag) for lag, left in tails.items() if left <= GONE), default=float("inf"))


def _mean(records: Iterable[Record], key: str) -> float:
    return mean(record[key] for record in records)


def _listed(values: Mapping[str, float], style: str) -> str:
    return ", ".join(f"{name} {value:{style}}" for name, value in values.items())


def quality_claims(records: list[Record]) -> list[Claim]:
    models = trained(records)
    bits = {name: _mean(own, "bits_per_byte") for name, own in models.items()}
    ppl = {name: [list(record["ppl"].values()) for record in own] for name, own in models.items()}
    rises = {name: max(max(values) / values[0] - 1 for values in own) for name, own in ppl.items()}
    pair = {name: bits[name] for name in ("tnn, decay 0.9", "fd gelu")}
    times = 1 << len(ppl["tnn"][0]) - 1
    return [
        SKI_TEXTS.claim("equal", bits["fd gelu"] <= (1 + CLOSE) * bits["tnn"], bits=_listed(bits, ".3f")),
        SKI_TEXTS.claim(
            "short", bits["fd gelu"] <= (1 + CLOSE) * bits["tnn, decay 0.9"], bits=_listed(pair, ".3f")
        ),
        SKI_TEXTS.claim(
            "flat", all(x <= CLOSE for x in rises.values()), times=times, rises=_listed(rises, "+.1%")
        ),
    ]


def quality_tables(records: list[Record]) -> list[Table]:
    items = []
    for own in trained(records).values():
        ppl = {f"ppl at {int(length):,}": f"{value:.2f}" for length, value in own[0]["ppl"].items()}
        each = ", ".join(f"{record['bits_per_byte']:.4f}" for record in own)
        means = {"bits": _mean(own, "bits_per_byte"), "speed": _mean(own, "tokens_per_second")}
        items.append(own[0] | {"each": each} | means | ppl)
    return [SKI_TEXTS.table("quality", items, ppl)]


def speed_claims(records: list[Record]) -> list[Claim]:
    found = []
    for name in ("step", "kernel"):
        ratios = {r["length"]: speedups(r, f"{name}_seconds") for r in select(records, kind="time")}
        shown = "; ".join(f"{length:,} tokens {_listed(own, '.2f')}" for length, own in ratios.items())
        faster = all(own["fd relu"] >= FASTER for own in ratios.values())
        found.append(SKI_TEXTS.claim(name, faster, ratios=shown))
    return found


def speed_tables(records: list[Record]) -> list[Table]:
    items = [
        record
        | {"speed": record["tokens"] / median(record["step_seconds"]["tnn"])}
        | {"ms": 1e3 * median(record["kernel_seconds"]["tnn"])}
        | {name: speedups(record, f"{name}_seconds") for name in ("step", "kernel")}
        for record in select(records, kind="time")
    ]
    return [SKI_TEXTS.table("speed", items)]


def speed_panels(records: list[Record]) -> list[Panel]:
    timed = select(records, kind="time")
    lines = [Line("", y=[1], style={"color": "#636363"})]
    for key, what, style in (("step_seconds", "step", "-"), ("kernel_seconds", "kernel alone", ":")):
        for name in speedups(timed[0], key):
            points = [(record["length"], speedups(record, key)[name]) for record in timed]
            lines.append(line(f"{name}, {what}", points, name, linestyle=style))
    axes = {"xscale": "log", "xlabel": "tokens a row"}
    return [Panel("training speed over the TNN's", lines, axes=axes, base=2)]


def decay_claims(records: list[Record]) -> list[Claim]:
    def found(claim: str, given: str, norm: bool, holds: Callable[..., bool], which: str = "") -> Claim:
        own = select(records, kind="decay", input=given, norm=norm)
        lags = {record["activation"]: reach(record["tails"]) for record in own}
        told = (f"{name} by {lag:g}" if lag < float("inf") else f"{name} never" for name, lag in lags.items())
        return SKI_TEXTS.claim(claim, holds(**lags), which=which, gone=GONE, reaches=", ".join(told))

    def smooth(gelu: float, silu: float, relu: float) -> bool:
        return gelu < relu and silu < relu

    return [
        found("smooth", "cosine", False, smooth, "plain networks of the cosine"),
        found("gelu", "cosine", False, lambda gelu, silu, relu: gelu < silu),
        found("smooth", "cosine", True, smooth, "normalised features, as trained"),
        found("smooth", "angle", True, smooth, "networks of the frequency itself"),
    ]


def _longest(own: list[Record]) -> dict[str, float]:
    """Of the first seed's layers the largest share left at every lag."""
    layers = own[0]["tails"]
    return {lag: max(layer[lag] for layer in layers) for lag in layers[0]}


def decay_tables(records: list[Record]) -> list[Table]:
    rows = [
        (f"untrained: {r['activation']} of the {r['input']}, {'normalised' if r['norm'] else 'plain'}",
         r["tails"])
        for r in select(records, kind="decay")
    ]  # fmt: skip
    rows += [(f"trained: {name}, worst layer", _longest(own)) for name, own in trained(records).items()]

    items = [
        {"label": label} | {lag: f"{tails[lag]:.1e}" if lag in tails else "-" for lag in SHOWN}
        for label, tails in rows
    ]
    return [SKI_TEXTS.table("decay", items, SHOWN)]


def decay_panels(records: list[Record]) -> list[Panel]:
    def drawn(label: str, tails: dict[str, float], name: str, style: str = "-") -> Line:
        points = [(int(lag), smallest_shown(left)) for lag, left in tails.items()]
        return line(label, points, name, linestyle=style, marker=None)

    untrained = [
        drawn(f"{r['activation']} of the {r['input']}", r["tails"], f"fd {r['activation']}", style)
        for given, style in (("cosine", "-"), ("angle", ":"))
        for r in select(records, kind="decay", norm=True, input=given)
    ]
    models = [drawn(name, _longest(own), name) for name, own in trained(records).items()]
    axes = {"xscale": "log", "yscale": "log", "ylim": (1e-9, 2), "xlabel": "lag"}
    label = {"ylabel": "share of the norm from this lag on"}
    return [
        Panel("kernels, untrained", untrained, axes=axes | label, base=2),
        Panel("trained, the layer with the longest memory", models, axes=axes, base=2),
    ]


def conversion_claims(records: list[Record]) -> list[Claim]:
    models = trained(records)
    state = {
        name: mean(record["conversions"]["auto 1e-3"]["state_bytes"] for record in own)
        for name, own in models.items()
    }
    every = [made for own in models.values() for record in own for made in record["conversions"].values()]
    ends = {name: _gap(own, "etsc") for name, own in models.items()}
    gaps = {
        method: max(_gap(own, method) for own in models.values())
        for method in ("balanced 1e-3", "auto 1e-3", "window")
    }
    refused = sum("refused" in made for made in every)
    kept, exact = (all(gap <= 1e-3 for gap in found.values()) for found in (gaps, ends))
    return [
        SKI_TEXTS.claim("state", state["fd gelu"] <= state["tnn"], bytes=_listed(state, ",.0f")),
        SKI_TEXTS.claim("gaps", kept, gaps=_listed(gaps, ".0e"), refused=refused, every=len(every)),
        SKI_TEXTS.claim("ends", exact, gaps=_listed(ends, ".0e")),
    ]


def _gap(own: list[Record], method: str) -> float:
    """Largest modulus over the lengths and seeds; 0 where the conversion was refused."""
    conversions = (record["conversions"][method].get("gaps", {}) for record in own)
    return max((abs(gap) for gaps in conversions for gap in gaps.values()), default=0.0)


def conversion_tables(records: list[Record]) -> list[Table]:
    refused = {"orders": "refused"} | dict.fromkeys(("state", "tap", "l1", "gap"), "-")
    items = []
    for name, own in trained(records).items():
        for method, made in own[0]["conversions"].items():
            shown = refused
            if "refused" not in made:
                shown = {
                    "orders": ", ".join(map(str, made["orders"])),
                    "state": f"{made['state_bytes']:,}",
                    "tap": f"{made['tap_error']:.0e}",
                    "l1": f"{made['l1_error']:.0e}",
                    "gap": " / ".join(f"{gap:+.0e}" for gap in made["gaps"].values()),
                }
            items.append({"variant": name, "method": method} | shown)
    return [SKI_TEXTS.table("conversion", items)]


def conversion_panels(records: list[Record]) -> list[Panel]:
    models = trained(records)
    methods = list(models["tnn"][0]["conversions"])
    lines = []
    for name, own in models.items():
        found = {method: made for method, made in own[0]["conversions"].items() if "refused" not in made}
        points = [(methods.index(method), made["state_bytes"] / 1024) for method, made in found.items()]
        lines += [line(name, points, linestyle="")] if points else []
    ticks: dict[float, str] = dict(enumerate(methods))
    return [Panel("state per sequence, KiB", lines, axes={"yscale": "log"}, ticks=ticks)]


def tried_tables(records: list[Record]) -> list[Table]:
    small = select(records, size="small")
    return [Table("## What was tried", before=SKI_TEXTS.text("tried"))] if small else []
