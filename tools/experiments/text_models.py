"""Families of language models on one text, as the experiments train them.

Settings are those of ``configs/``, so that what is measured is what a user gets: at small size the demo's
with fewer channels, so that more tokens are read; at paper size those of WikiText-103, which reads the hub
unless files are given.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from experiments.sizing import PEERS, Family, load_families
from tnnlm.config.schema import Config
from tnnlm.data.packing import PackedCorpus, PackedRows, prepare
from tnnlm.data.tasks import open_rows
from tnnlm.errors import UserError
from tnnlm.kernels import TNOConfig

CONFIGS = Path(__file__).parents[2] / "configs"
"""experiments run from a clone, as their tool does"""
TRAINED = 512
"""length at which the published decay is set"""
_KINDS = {"tnn": "", "sgconv": "sgconv_", "rtf": "rtf_"}
_WORDS = {
    "tiny": (
        *("model.d_model=32", "model.n_layers=2", "model.vocab_size=400", "model.max_length=32"),
        *("data.batch_size=8", "data.val_fraction=0.1", "optim.warmup_steps=5", "trainer.precision=32-true"),
    ),
    "small": (*("model.d_model=128", "model.n_layers=3", "model.vocab_size=2048"),),
    "paper": (),
}
_PEER_LR = {"tiny": 1e-2, "small": 2e-3, "paper": 5e-4}
"""of Transformers; small: the best of 1e-3, 2e-3 and 4e-3; paper: the published one, of all models"""


class TextModels(NamedTuple):
    """What is trained, and on what."""

    base: Config
    families: dict[str, Family]
    corpus: PackedCorpus
    rows: PackedRows
    """of the training split"""


@functools.cache
def text_models(names: tuple[str, ...], size: str, steps: int, data: tuple[str, ...]) -> TextModels:
    """Families of equal parameters, and the text.

    Args:
        names: of tnn, sgconv, rtf and ``PEERS``.
        size: of ``SIZES``.
        steps: optimizer steps; 0: as the configuration says.
        data: text files or globs; none: the configuration's own text.

    Raises:
        UserError: if a family or the text can't be used.
    """
    files = {name: None if name in PEERS else _file(name, size) for name in names}
    words = list(_WORDS[size])
    if steps:
        words.append(f"trainer.max_steps={steps}")
    words += text_words(data)
    lrs = dict.fromkeys(PEERS, _PEER_LR[size])
    base, families, left_out = load_families(files, _file("tnn", size), words, lrs)
    for name, reason in left_out.items():
        raise UserError(f"{name}: {reason}")
    for family in families.values():
        kernel = family.config.model.kernel
        if isinstance(kernel, TNOConfig):  # reaches as many training lengths as the published one does
            kernel.decay **= TRAINED / base.model.max_length
    corpus = prepare(base.data, base.model.vocab_size, base.seed)
    return TextModels(base, families, corpus, open_rows(corpus, base)[0])


def text_words(data: tuple[str, ...]) -> list[str]:
    """Settings ``key=value`` that read the given files or globs; none for none."""
    return ["data.source=files", f"data.files=[{','.join(map(repr, data))}]"] if data else []


def _file(name: str, size: str) -> Path:
    kind = _KINDS[name]
    if size == "paper":
        return CONFIGS / f"{kind or 'tnn_'}wt103.yaml"
    return CONFIGS / f"{kind}demo.yaml"
