"""Ids that a model has but its tokenizer lacks: none has a probability, wherever one is computed.

A vocabulary may be padded, or smaller than ``model.vocab_size``, or have gaps. The ids are those of
:meth:`tnnlm.tokenizer.TextTokenizer.missing_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mask_missing(logits: Tensor, missing: Sequence[int] | Tensor) -> Tensor:
    """Return logits (..., V) in which those of the ids ``missing`` are minus infinity.

    The logits themselves are returned if no id is missing.
    """
    if len(missing) == 0:
        return logits
    index = torch.as_tensor(missing, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, index, -math.inf)
