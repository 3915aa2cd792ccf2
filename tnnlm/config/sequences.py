"""Settings of data that consists of labelled sequences: ListOps and the Long Range Arena."""

from __future__ import annotations

from dataclasses import dataclass

from tnnlm.fields import choice, number


@dataclass(kw_only=True)
class ListOpsConfig:
    """Generated ListOps expressions; the defaults are those of the Long Range Arena (arXiv 2011.04006)."""

    min_length: int = number(501, low=1, high=1 << 20)
    """Minimum length of an expression in symbols."""
    max_length: int = number(1999, low=4, high=1 << 20)
    """Maximum length of an expression in symbols, at most ``model.max_length``."""
    max_depth: int = number(10, low=2, high=100)
    """Maximum nesting depth of an expression, where a digit alone has depth 1."""
    max_args: int = number(10, low=2, high=1_000)
    """Maximum number of arguments of an operator, sampled uniformly from 2 upwards."""
    train_rows: int = number(96_000, low=1, high=1_000_000_000)
    """Number of training expressions."""
    val_rows: int = number(2_000, low=1, high=1_000_000_000)
    """Number of validation expressions, all different from the training expressions."""
    test_rows: int = number(2_000, low=1, high=1_000_000_000)
    """Number of test expressions, which are scored when the run ends."""


@dataclass(kw_only=True)
class ArchiveConfig:
    """Task of the Long Range Arena (arXiv 2011.04006), read from the published files."""

    task: str = choice("listops", "listops", "text", "retrieval", "image", "pathfinder", "pathx")
    """Task to train on. The files that each task needs are listed in tnnlm/data/sequences/lra.py."""
    folder: str | None = None
    """Folder of the unpacked lra_release, which must also hold aclImdb (for text) and cifar-10-batches-py
    (for image)."""
