"""The public function for any long convolution: taps in, recurrence and certificate out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tnnlm.checkpoints.certificate import ConversionReport
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.certify import certify
from tnnlm.conversion.methods import Source, check_taps, convert
from tnnlm.errors import UserError
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
    """Turn the taps of any long convolution into a linear recurrence.

    Args:
        k: taps, (E, L) or (L,) for a single channel, index = lag; a tensor or anything numpy reads.
            Give enough of them: until the kernel has died out, if it does.
        method: ``balanced``, ``auto``, ``etsc``, ``window`` or ``gradient``.
        tolerance: largest relative error ||k - k^|| / ||k|| for ``balanced`` and ``auto``.
        order: real state numbers per channel instead of a tolerance.
        horizon: lags to match; the rest of ``k`` is only compared with. None: all of them.
        decay: factor per lag, one or one per channel, that ETSC moves into the poles.
        poles: ``shared`` by all channels, or a set per ``channel``.
        window_taps: first lags that ``balanced`` keeps exactly, in a window of the last inputs.
        finite: the kernel is zero past the lags given, however large the last of them.
        options: more fields of :class:`tnnlm.config.schema.ConversionConfig`.

    Returns:
        the recurrence (with methods ``init_state``, ``prefill``, ``step``), in float32 unless
        the taps are float64, and what was measured on them.

    Raises:
        UserError: for empty or non-finite taps, an order outside 1 .. horizon, a tolerance that
            can't be met, a decay outside (0, 1].
    """
    taps = k if isinstance(k, Tensor) else torch.from_numpy(np.asarray(k))
    if not taps.is_floating_point():
        taps = taps.to(torch.float64) if not taps.is_complex() else taps
    if taps.is_complex():
        raise UserError("the taps are complex", "convert their real part")
    taps = taps.unsqueeze(0) if taps.dim() == 1 else taps
    taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
    check_taps(taps)
    lags = taps.shape[1] if horizon is None else horizon
    if not 1 <= lags <= taps.shape[1]:
        raise UserError(f"horizon {lags}: must be from 1 to the number of taps, {taps.shape[1]}")
    recipe = ConversionConfig(
        method=method, tolerance=tolerance, order=order, poles=poles, window_taps=window_taps, **options
    )
    with torch.no_grad():
        converted = convert(Source(taps[:, :lags], _per_channel(decay, taps), finite=finite), recipe)
        assert isinstance(converted.params, SSMParams)  # only kernels have a recurrence of another form
        return converted.params, certify(taps, converted, lags)


def _per_channel(decay: float | Tensor | ArrayLike | None, k: Tensor) -> Tensor | None:
    if decay is None:
        return None
    rate = decay if isinstance(decay, Tensor) else torch.from_numpy(np.asarray(decay, dtype=np.float64))
    rate = rate.to(device=k.device, dtype=torch.float64).expand(k.shape[0])
    if not bool(((rate > 0) & (rate <= 1)).all()):
        raise UserError("decay: must be above 0 and at most 1")
    return rate
