"""Choice among recurrences by their measured errors and their cost, for method ``auto``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.source import LayerConversion, Source, ToleranceError, largest_error
from tnnlm.errors import UserError
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params

NEAR = 1.25
"""States of up to this multiple of the smallest one count as equally large: among them, the recurrence with
the fewest multiply-adds is chosen."""


class Attempt(NamedTuple):
    """Conversion to try."""

    method: str
    """Method, of which the cheapest attempt that meets the tolerance counts."""
    label: str
    """Method with its variant, for messages."""
    run: Callable[[], Params]
    """Function that returns the recurrence, or raises a ``UserError``."""
    sample: Callable[[], Params] | None = None
    """Function that converts a few channels only, in little time. If an earlier attempt of the method has met
    the tolerance, this one is made only if the sample takes a smaller state per channel."""


def choose(
    source: Source, tolerance: float, attempts: Sequence[Attempt], progress: Progress = silent
) -> LayerConversion:
    """Return the recurrence with the smallest state among those that meet the tolerance.

    Every recurrence is measured as it will be stored, on the horizon and, if ``source.reach`` is set, on that
    many lags. Multiply-adds decide between states that are nearly equal.

    Args:
        source: Convolution to convert.
        tolerance: Largest relative error of the taps.
        attempts: Conversions to try, in this order.
        progress: Progress bar, which names the conversion that is measured.

    Raises:
        UserError: If none meets the tolerance; the message states which came closest.
    """
    met: dict[str, Params] = {}
    missed: dict[str, float] = {}
    passed_over: list[str] = []
    for attempt in _named(attempts, progress):
        known = met.get(attempt.method)
        if known is not None and not _promising(attempt, known):
            continue
        try:
            params = attempt.run()
        except UserError as error:
            passed_over.append(f"{attempt.label}: {error.reason}")
            if isinstance(error, ToleranceError):
                missed[attempt.label] = error.reached
            continue
        reached, lags = largest_error(source, params)
        if reached <= tolerance:
            forms = {"known": params if known is None else known, "new": params}
            met[attempt.method] = forms[_cheapest(forms)[0]]
        else:
            missed[attempt.label] = reached
            passed_over.append(f"{attempt.label}: has a relative error of {reached:.1e} over {lags} lags")
    if not met:
        closest = min(missed, key=lambda label: missed[label])
        raise UserError(
            f"method auto: no method meets the tolerance {tolerance:g}; {closest} comes closest with a "
            f"relative error of {missed[closest]:.1e}",
            "raise the tolerance, or set the horizon, to which the tolerance is then limited",
        )
    best, decided = _cheapest(met)
    table = ", ".join(
        f"{name} {recurrence.state_bytes(params) / 1024:,.0f} KiB"
        for name, params in sorted(met.items(), key=lambda item: recurrence.state_bytes(item[1]))
    )
    reason = f"{decided} at tolerance {tolerance:g}: {table}"
    return LayerConversion(met[best], best, "; ".join([reason, *passed_over]))


def _named(attempts: Sequence[Attempt], progress: Progress) -> Iterator[Attempt]:
    """Yield each attempt under a progress bar with its label."""
    for number, attempt in enumerate(attempts, 1):
        yield from progress([attempt], f"method {number} of {len(attempts)}, {attempt.label}")


def _promising(attempt: Attempt, known: Params) -> bool:
    """Return whether a sample of an attempt takes a smaller state per channel than a known recurrence."""
    if attempt.sample is None:
        return False
    try:
        few = attempt.sample()
    except UserError:
        return False
    sizes = (recurrence.state_bytes(params) / len(params.taps(1)) for params in (few, known))
    return next(sizes) < next(sizes)


def _cheapest(met: dict[str, Params]) -> tuple[str, str]:
    """Return the name of the cheapest recurrence, and what decided: the state or the multiply-adds."""
    size = {name: recurrence.state_bytes(params) for name, params in met.items()}
    smallest = min(size.values())
    near = [name for name in met if size[name] <= NEAR * smallest]
    best = min(near, key=lambda name: (met[name].multiply_adds(), size[name]))
    if size[best] == smallest:
        return best, "smallest state"
    return best, f"fewest multiply-adds among states up to {NEAR:g} times the smallest"
