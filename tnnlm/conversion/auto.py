"""Choice among recurrences by their measured errors and their cost, for method ``auto``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.source import LayerConversion, Source, ToleranceError, largest_error
from tnnlm.errors import UserError
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params

NEAR = 1.25
"""States of up to this multiple of the smallest one count as equally large: among them, the recurrence with
the fewest multiply-adds is chosen."""


class Cost(NamedTuple):
    """Cost of a recurrence, by which those that meet the tolerance are compared."""

    state: float
    """Size of the state in bytes per sequence."""
    multiply_adds: float
    """Multiply-adds of one step."""


class Attempt(NamedTuple):
    """Conversion to try.

    The argument of its functions is the largest order that would be chosen among the recurrences that are
    known to meet the tolerance; None without such a limit.
    """

    method: str
    """Method, of which the cheapest attempt that meets the tolerance counts."""
    label: str
    """Method with its variant, for messages."""
    run: Callable[[int | None], Params]
    """Function that returns the recurrence, or raises a ``UserError``."""
    sample: Callable[[int | None], Params] | None = None
    """Function that converts a few channels only, in little time. If an earlier attempt of the method has met
    the tolerance, this one is made only if the sample is cheaper per channel than all that have met it."""
    window: int = 0
    """Number of window taps that its order includes."""


def choose(
    source: Source, tolerance: float, attempts: Sequence[Attempt], progress: Progress = silent
) -> LayerConversion:
    """Return the recurrence with the smallest state, or nearly so, among those that meet the tolerance.

    Multiply-adds decide between states that are nearly equal. Every recurrence that would be chosen among
    those that have met the tolerance so far is measured as it will be stored, on the horizon and, if
    ``source.reach`` is set, on that many lags. Others are passed over for good: near the bound between nearly
    equal and larger states, the choice can thus depend on the order of the attempts.

    Args:
        source: Convolution to convert.
        tolerance: Largest relative error of the taps.
        attempts: Conversions to try, in this order; cheap ones first limit the orders of later ones.
        progress: Progress bar, which names the conversion that is measured.

    Raises:
        UserError: If none meets the tolerance; the message states which came closest.
    """
    met: dict[str, Params] = {}
    missed: dict[str, float] = {}
    passed_over: list[str] = []
    for attempt in _named(attempts, progress):
        costs = {name: _cost(params) for name, params in met.items()}
        limit = _largest_order(costs, source.k, attempt.window)
        if attempt.method in met and not _promising(attempt, limit, costs, len(source.k)):
            continue
        try:
            params = attempt.run(limit)
        except UserError as error:
            passed_over.append(f"{attempt.label}: {error.reason}")
            if isinstance(error, ToleranceError):
                missed[attempt.label] = error.reached
            continue
        cost = _cost(params)
        if not _wins(cost, costs):
            passed_over.append(f"{attempt.label}: costs more, with {_kib(cost)}")
            continue
        reached, lags = largest_error(source, params)
        if reached <= tolerance:
            met[attempt.method] = params
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
    costs = {name: _cost(params) for name, params in met.items()}
    best, decided = _cheapest(costs)
    table = ", ".join(
        f"{name} {_kib(cost)}" for name, cost in sorted(costs.items(), key=lambda item: item[1])
    )
    reason = f"{decided} at tolerance {tolerance:g}: {table}"
    return LayerConversion(met[best], best, "; ".join([reason, *passed_over]))


def _cost(params: Params) -> Cost:
    return Cost(recurrence.state_bytes(params), params.multiply_adds())


def _kib(cost: Cost) -> str:
    return f"{cost.state / 1024:,.0f} KiB"


def _named(attempts: Sequence[Attempt], progress: Progress) -> Iterator[Attempt]:
    """Yield each attempt under a progress bar with its label."""
    for number, attempt in enumerate(attempts, 1):
        yield from progress([attempt], f"method {number} of {len(attempts)}, {attempt.label}")


def _promising(attempt: Attempt, limit: int | None, costs: dict[str, Cost], channels: int) -> bool:
    """Return whether an attempt, as its sample has it, is cheaper than the known recurrences."""
    if attempt.sample is None:
        return False
    try:
        few = attempt.sample(limit)
    except UserError:
        return False
    share = channels / len(few.taps(1))
    return _wins(Cost(*(share * number for number in _cost(few))), costs)


def _largest_order(costs: dict[str, Cost], k: Tensor, window: int) -> int | None:
    """Return the largest order, at least 1, at which modes after a window would be chosen; None if any would.

    Args:
        costs: Recurrences that meet the tolerance.
        k: Taps (E, T).
        window: Number of window taps that the order includes.
    """
    if not costs:
        return None

    def too_large(order: int) -> bool:
        # A pair of poles counts 2 in the order, takes two numbers of state and 6 multiply-adds.
        state, work = order - min(window, 1), 3 * (order - window) + window
        return not _wins(Cost(len(k) * k.element_size() * state, len(k) * work), costs)

    return max(1, window + bisect_left(range(window + 1, k.shape[1] + 1), True, key=too_large))


def _wins(cost: Cost, costs: dict[str, Cost]) -> bool:
    """Return whether a recurrence of this cost would be chosen among these, were it to meet the tolerance.

    If it would not, neither would one that costs more.
    """
    return _cheapest({**costs, "": cost})[0] == ""


def _cheapest(costs: dict[str, Cost]) -> tuple[str, str]:
    """Return the name of the cheapest recurrence, and what decided: the state or the multiply-adds."""
    smallest = min(cost.state for cost in costs.values())
    near = [name for name, cost in costs.items() if cost.state <= NEAR * smallest]
    best = min(near, key=lambda name: (costs[name].multiply_adds, costs[name].state))
    if costs[best].state == smallest:
        return best, "smallest state"
    return best, f"fewest multiply-adds among states up to {NEAR:g} times the smallest"
