"""Modal filters of StripedHyena (arXiv 2310.18780) as recurrences; whole models can't be imported.

A filter is stored as poles and residues, h[i] = Re sum_m residue[m] pole[m]^i, plus a skip connection D at
lag 0. It is a diagonal recurrence already, and nothing has to be converted. Other layers of the models are
attention, which has no recurrent form of a fixed size.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from tnnlm.checkpoints.importers.keys import Keys
from tnnlm.errors import CheckpointError
from tnnlm.ops.ssm import SSMParams

MARK = r"blocks\.\d+\.filter\.(poles|residues)$"
"""Key that only this format has, after a prefix."""


def plan(keys: Keys) -> NoReturn:
    """Refuse a whole model.

    Raises:
        CheckpointError: Always; the message names the function for its filters.
    """
    raise CheckpointError(
        f"{keys.path}: is a StripedHyena, whose attention layers have no recurrent form of a fixed size",
        "convert its filters alone, with tnnlm.checkpoints.importers.stripedhyena.modal_recurrence",
    )


def modal_recurrence(poles: Tensor, residues: Tensor, skip: Tensor) -> SSMParams:
    """Return the recurrence of a modal filter.

    Args:
        poles: Poles as stored, ``blocks.N.filter.poles``, (S, N, 1, 2), real and imaginary part last. S is
            the number of systems: E, or 1 if all channels share one.
        residues: Residues as stored, ``blocks.N.filter.residues``, (S, N, 1, 2).
        skip: Skip connection, ``blocks.N.filter.D``, (E,).

    Raises:
        CheckpointError: If the shapes don't fit together.
    """
    systems = len(poles)
    if poles.dim() != 4 or poles.shape != residues.shape or poles.shape[2:] != (1, 2):
        raise CheckpointError(
            f"poles and residues: have the shapes {list(poles.shape)} and {list(residues.shape)}, "
            "but both must be (systems, modes, 1, 2)"
        )
    if systems not in (1, len(skip)):
        raise CheckpointError(f"poles: are of {systems} systems, but D has {len(skip)} channels")
    planes = (part[:, :, 0].transpose(1, 2).expand(len(skip), -1, -1) for part in (poles.double(), residues))
    return SSMParams(skip[:, None].contiguous(), *(part.contiguous() for part in planes))
