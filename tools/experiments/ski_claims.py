"""Claims, tables and panels of the experiment on the frequency-domain TNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median

from experiments.frame import Claim, Declarations, Record, Section, grouped, mean_of, select
from experiments.report import Line, Panel, Table, line, smallest_shown

ACTIVATIONS = ("gelu", "silu", "relu")
GONE = 1e-6
"""Share of a kernel's norm below which it has decayed."""
SHOWN = ("4", "16", "64", "256", "512", "1024")
"""Lags of the table of decay."""
SKI_TEXTS = Declarations("ski")


def _trained(records: list[Record]) -> dict[str, list[Record]]:
    """Return the records of trained models by variant, one per seed."""
    return grouped(select(records, kind="train"), "variant")


def _speedups(record: Record, key: str) -> dict[str, float]:
    """Return the speed of each model relative to the TNN, the median over the rounds."""
    times = dict(record[key])
    base = times.pop("tnn")
    return {
        name: median(first / own for first, own in zip(base, seconds, strict=True))
        for name, seconds in times.items()
    }


def reach(tails: dict[str, float]) -> float:
    """Return the first power of two after which at most ``GONE`` of the norm remains, or infinity."""
    return min((float(lag) for lag, left in tails.items() if left <= GONE), default=float("inf"))


def _listed(values: Mapping[str, float], style: str) -> str:
    return ", ".join(f"{name} {value:{style}}" for name, value in values.items())


def _quality_claims(records: list[Record]) -> Iterator[Claim]:
    models = _trained(records)
    bits = {name: mean_of(own, "bits_per_byte") for name, own in models.items()}
    yield SKI_TEXTS.claim("equal", ratio=bits["fd gelu"] / bits["tnn"], bits=_listed(bits, ".3f"))
    pair = {name: bits[name] for name in ("tnn, decay 0.9", "fd gelu")}
    ratio = pair["fd gelu"] / pair["tnn, decay 0.9"]
    yield SKI_TEXTS.claim("short", ratio=ratio, bits=_listed(pair, ".3f"))
    ppl = {name: [list(record["ppl"].values()) for record in own] for name, own in models.items()}
    rises = {name: max(max(values) / values[0] - 1 for values in own) for name, own in ppl.items()}
    times = 1 << len(ppl["tnn"][0]) - 1
    yield SKI_TEXTS.claim("flat", times=times, rises=_listed(rises, "+.1%"), most=max(rises.values()))


def _quality_tables(records: list[Record]) -> Iterator[Table]:
    items = []
    for own in _trained(records).values():
        ppl = {f"ppl at {int(length):,}": f"{value:.2f}" for length, value in own[0]["ppl"].items()}
        each = ", ".join(f"{record['bits_per_byte']:.4f}" for record in own)
        means = {"bits": mean_of(own, "bits_per_byte"), "speed": mean_of(own, "tokens_per_second")}
        items.append(own[0] | {"each": each, "*": ppl} | means)
    yield SKI_TEXTS.table("quality", items)


def _speed_claims(records: list[Record]) -> Iterator[Claim]:
    for name in ("step", "kernel"):
        ratios = {r["length"]: _speedups(r, f"{name}_seconds") for r in select(records, kind="time")}
        shown = "; ".join(f"{length:,} tokens {_listed(own, '.2f')}" for length, own in ratios.items())
        faster = min(own["fd relu"] for own in ratios.values())
        yield SKI_TEXTS.claim(name, ratios=shown, least=faster)


def _speed_tables(records: list[Record]) -> Iterator[Table]:
    items = [
        record
        | {"speed": record["tokens"] / median(record["step_seconds"]["tnn"])}
        | {"ms": 1e3 * median(record["kernel_seconds"]["tnn"])}
        | {name: _speedups(record, f"{name}_seconds") for name in ("step", "kernel")}
        for record in select(records, kind="time")
    ]
    yield SKI_TEXTS.table("speed", items)


def _speed_panels(records: list[Record]) -> Iterator[Panel]:
    timed = select(records, kind="time")
    lines = [Line("", y=[1], style={"color": "#636363"})]
    for key, what, style in (("step_seconds", "step", "-"), ("kernel_seconds", "kernel alone", ":")):
        for name in _speedups(timed[0], key):
            points = [(record["length"], _speedups(record, key)[name]) for record in timed]
            lines.append(line(f"{name}, {what}", points, name, linestyle=style))
    yield SKI_TEXTS.panel("speed", lines)


def _decay_claims(records: list[Record]) -> Iterator[Claim]:
    def found(claim: str, given: str, norm: bool, holds: Callable[..., bool], which: str = "") -> Claim:
        own = select(records, kind="decay", input=given, norm=norm)
        lags = {record["activation"]: reach(record["tails"]) for record in own}
        reaches = (f"{name} {lag:g}" if lag < float("inf") else f"{name} never" for name, lag in lags.items())
        return SKI_TEXTS.claim(claim, holds(**lags), which=which, gone=GONE, reaches=", ".join(reaches))

    def smooth(gelu: float, silu: float, relu: float) -> bool:
        return gelu < relu and silu < relu

    yield found("smooth", "cosine", False, smooth, "plain MLP of the cosine")
    yield found("gelu", "cosine", False, lambda gelu, silu, relu: gelu < silu)
    yield found("smooth", "cosine", True, smooth, "normalised MLP of the cosine, as trained")
    yield found("smooth", "angle", True, smooth, "MLP of the frequency")


def _longest(records: list[Record]) -> dict[str, dict[str, float]]:
    """Return the largest share at every lag over the layers of the first seed's model, by variant."""
    layers = {name: own[0]["tails"] for name, own in _trained(records).items()}
    return {name: {lag: max(layer[lag] for layer in own) for lag in own[0]} for name, own in layers.items()}


def _decay_tables(records: list[Record]) -> Iterator[Table]:
    shares = {}
    for r in select(records, kind="decay"):
        kind = "normalised" if r["norm"] else "plain"
        shares[f"untrained: {r['activation']} of the {r['input']}, {kind}"] = r["tails"]
    shares |= {f"trained: {name}, worst layer": tails for name, tails in _longest(records).items()}
    items = [
        {"kernel": label} | {lag: f"{tails[lag]:.1e}" for lag in SHOWN if lag in tails}
        for label, tails in shares.items()
    ]
    yield SKI_TEXTS.table("decay", items)


def _decay_panels(records: list[Record]) -> Iterator[Panel]:
    def curve(label: str, tails: dict[str, float], name: str, style: str = "-") -> Line:
        points = [(int(lag), smallest_shown(left)) for lag, left in tails.items()]
        return line(label, points, name, linestyle=style, marker=None)

    untrained = [
        curve(f"{r['activation']} of the {r['input']}", r["tails"], f"fd {r['activation']}", style)
        for given, style in (("cosine", "-"), ("angle", ":"))
        for r in select(records, kind="decay", norm=True, input=given)
    ]
    yield SKI_TEXTS.panel("untrained", untrained)
    yield SKI_TEXTS.panel("trained", [curve(name, tails, name) for name, tails in _longest(records).items()])


def _conversion_claims(records: list[Record]) -> Iterator[Claim]:
    models = _trained(records)
    made = {name: [record["conversions"] for record in own] for name, own in models.items()}
    state = {name: mean_of([one["auto 1e-3"] for one in own], "state_bytes") for name, own in made.items()}
    ratio = state["fd gelu"] / state["tnn"]
    yield SKI_TEXTS.claim("state", ratio=ratio, bytes=_listed(state, ",.0f"))
    every = [one for own in made.values() for methods in own for one in methods.values()]
    gaps = {
        method: max(_gap(own, method) for own in models.values())
        for method in ("balanced 1e-3", "auto 1e-3", "window")
    }
    shown = {"refused": sum("refused" in one for one in every), "every": len(every)}
    yield SKI_TEXTS.claim("gaps", gaps=_listed(gaps, ".0e"), most=max(gaps.values()), **shown)
    ends = {name: _gap(own, "etsc") for name, own in models.items()}
    yield SKI_TEXTS.claim("ends", gaps=_listed(ends, ".0e"), most=max(ends.values()))


def _gap(own: list[Record], method: str) -> float:
    """Return the largest perplexity gap over lengths and seeds; 0 for refused conversions."""
    conversions = (record["conversions"][method].get("gaps", {}) for record in own)
    return max((abs(gap) for gaps in conversions for gap in gaps.values()), default=0.0)


def _conversion_tables(records: list[Record]) -> Iterator[Table]:
    refused = {"orders": "refused"} | dict.fromkeys(("state", "tap", "l1", "gap"), "-")
    items = []
    for name, own in _trained(records).items():
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
    yield SKI_TEXTS.table("conversion", items, size=records[0]["size"])


def _conversion_panels(records: list[Record]) -> Iterator[Panel]:
    models = {name: own[0]["conversions"] for name, own in _trained(records).items()}
    methods = list(models["tnn"])
    lines = []
    for name, own in models.items():
        made = [(at, own[method]) for at, method in enumerate(methods) if "refused" not in own[method]]
        lines.append(line(name, [(at, one["state_bytes"] / 1024) for at, one in made], linestyle=""))
    yield SKI_TEXTS.panel("conversion", lines, ticks=dict(enumerate(methods)))


SAYS = (
    Section(claims=_quality_claims, tables=_quality_tables),
    Section(claims=_speed_claims, tables=_speed_tables, panels=_speed_panels),
    Section(claims=_decay_claims, tables=_decay_tables, panels=_decay_panels),
    Section(claims=_conversion_claims, tables=_conversion_tables, panels=_conversion_panels),
)
