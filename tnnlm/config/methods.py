"""Settings of a conversion by the methods that use them, for train.py and convert.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.errors import ConfigError


class Use(NamedTuple):
    """Methods that use a setting of a conversion."""

    methods: tuple[str, ...]
    """Methods that always use it."""
    without_order: tuple[str, ...] = ()
    """Methods that use it if ``order`` is null."""

    def holds(self, method: str, order: int | None) -> bool:
        """Return whether the setting has an effect with a method and an order."""
        return method in self.methods or (order is None and method in self.without_order)


USED_BY = {
    "tolerance": Use(("auto",), without_order=("balanced",)),
    "order": Use(("balanced", "gradient")),
    "poles": Use(("balanced",)),
    "window_taps": Use(("balanced", "auto")),
    "gradient_steps": Use(("gradient",)),
    "gradient_lr": Use(("gradient",)),
}
"""Methods by the setting of :class:`ConversionConfig` that they use; all methods use the other settings."""
_ELSEWHERE = ("tolerance",)
"""Settings that a training also uses for its metrics."""


def check_effective_settings(config: Config, given: Callable[[str], str | None]) -> None:
    """Raise an error for a setting of the conversion that the method ignores.

    A default value is accepted, because a complete file of settings has one for every setting.

    Args:
        config: Configuration, whose ``conversion.method`` is settled.
        given: Function that returns the place where a user gave a setting, for the end of an error message;
            None if it has its default, or comes from a saved run.

    Raises:
        ConfigError: If a setting has no effect; the message names it.
    """
    recipe, default = config.conversion, ConversionConfig()
    for name, use in USED_BY.items():
        value, unset = getattr(recipe, name), getattr(default, name)
        place = given(f"conversion.{name}")
        if place is None or value == unset or name in _ELSEWHERE or use.holds(recipe.method, recipe.order):
            continue
        raise ConfigError(
            f"conversion.{name}={value}: only applies to conversion.method={' and '.join(use.methods)}, not "
            f"{recipe.method}{place}",
            f"set it to {'null' if unset is None else unset}, or conversion.method={use.methods[0]}",
        )
