"""Damaged, swapped and hostile files are refused in one line, or make no difference; none is used silently.

`make nightly` runs all cases: ``python -m tests.support.fuzz``. Here every kind of file gets a few.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the harness forks, and reads /proc", allow_module_level=True)

from tests.support.artefacts import subjects
from tests.support.fuzz import fuzz


def test_a_few_damages_of_every_kind_of_file_are_refused_or_harmless() -> None:
    faults, kinds = [], 0
    for subject in subjects(transformers=False):
        faults += fuzz(subject, cuts=2, bits=4).faults
        kinds += 1
    assert kinds >= 25
    assert not faults, "\n".join(faults)
