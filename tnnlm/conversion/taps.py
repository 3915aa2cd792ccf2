"""Public function that converts the taps of any long convolution to a recurrence with a certificate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tnnlm.checkpoints.certificate import ConversionReport
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.certify import certify
from tnnlm.conversion.convert import REACH
from tnnlm.conversion.horizon import ROUNDING, tail_energy
from tnnlm.conversion.methods import check_taps, convert
from tnnlm.conversion.source import Source
from tnnlm.conversion.tails import decay_tail
from tnnlm.errors import UserError, one_line
from tnnlm.ops.ssm import SSMParams


def convert_taps(
    k: Tensor | ArrayLike,
    *,
    method: str = "balanced",
    tolerance: float = 1e-3,
    order: int | None = None,
    horizon: int | None = None,
    decay: float | Tensor | ArrayLike | None = None,
    poles: str = "shared",
    window_taps: int = 0,
    finite: bool = False,
    **options: Any,
) -> tuple[SSMParams, ConversionReport]:
    """Convert the taps of any long convolution to a linear recurrence.

    Args:
        k: Taps (E, L), or (L,) for a single channel, index = lag, as a tensor or anything that numpy can
            convert to an array. L should cover the kernel until it has decayed, if it decays.
        method: Conversion method: ``balanced``, ``auto``, ``etsc``, ``window`` or ``gradient``.
        tolerance: Largest relative error ||k - k^|| / ||k|| for ``balanced`` and ``auto``.
        order: Real state numbers per channel, used instead of a tolerance.
        horizon: Number of lags to match; taps from there on are used to measure errors only. None
            matches all taps.
        decay: Decay per lag, a scalar or one value per channel, that ETSC moves into the poles.
        poles: ``shared`` for one set of poles for all channels, ``channel`` for one set per channel.
        window_taps: Number of first lags that ``balanced`` reproduces exactly, by a window of the last
            inputs.
        finite: Whether the kernel is zero past the given taps, even if the last ones are large.
        options: Further fields of :class:`tnnlm.config.schema.ConversionConfig`.

    Returns:
        Recurrence with methods ``init_state``, ``prefill`` and ``step``, in float64 if the taps are
        float64 or integers, else in float32, and its measured certificate.

    Raises:
        UserError: If the taps are empty, complex or not finite, the order is outside 1 .. horizon, the
            tolerance can't be met, or a decay is outside (0, 1].
    """
    taps = _as_tensor(k, "taps")
    taps = taps.unsqueeze(0) if taps.dim() == 1 else taps
    taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
    check_taps(taps)
    lags = taps.shape[1] if horizon is None else horizon
    if not 1 <= lags <= taps.shape[1]:
        raise UserError(f"horizon {lags}: must be from 1 to the number of taps, {taps.shape[1]}")
    recipe = ConversionConfig(
        method=method, tolerance=tolerance, order=order, poles=poles, window_taps=window_taps, **options
    )
    # Past a horizon that was set below the length of the kernel, nothing is promised.
    covered = tail_energy(taps, lags) <= ROUNDING**2
    reach = max(REACH * lags if finite else 0, taps.shape[1])
    with torch.no_grad():
        source = Source(
            taps[:, :lags], _per_channel(decay, taps), None, finite, taps, reach if covered else 0
        )
        converted = convert(source, recipe)
        assert isinstance(converted.params, SSMParams)  # Other kinds of recurrences come from kernels only.
        return converted.params, certify(taps, converted, lags, tail=_tail(taps, source), reach=reach)


def _tail(taps: Tensor, source: Source) -> Tensor | None:
    """Return upper bounds of the l1 norm past the given taps, None if nothing is known of those lags."""
    if source.finite:
        return taps.new_zeros(len(taps), dtype=torch.float64)
    return None if source.decay is None else decay_tail(taps, source.decay)


def _as_tensor(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return real numbers as a tensor without gradients, floats in their precision and others in float64.

    Raises:
        UserError: If they are no real numbers, or rows differ in length.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
        if not tensor.is_floating_point() and not tensor.is_complex():
            tensor = tensor.double()
    else:
        try:
            array = np.asarray(values)
            if not np.iscomplexobj(array):
                # Torch has no wider floats, no foreign byte order and no negative strides.
                narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 8
                with np.errstate(over="ignore"):
                    array = np.array(
                        array, array.dtype.newbyteorder("=") if narrow else np.float64, order="C"
                    )
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: not an array of numbers ({one_line(error)})") from None
    if tensor.is_complex():
        raise UserError(f"{name}: must be real, not complex", "pass their real part")
    return tensor


def _per_channel(decay: float | Tensor | ArrayLike | None, k: Tensor) -> Tensor | None:
    if decay is None:
        return None
    rate = _as_tensor(decay, "decay").to(device=k.device, dtype=torch.float64)
    return rate.expand(k.shape[0]) if rate.numel() == 1 and rate.dim() <= 1 else rate
