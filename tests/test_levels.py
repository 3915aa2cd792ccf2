"""Invariants and bitwise equality on CPUs with fewer instructions, each in a separate process.

Environment variables limit the instructions that PyTorch, oneDNN and MKL use, because they select them when
they are loaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import pick_vec_isa

from tests.support.scripts import ROOT
from tests.support.simulated import LEVELS, level_environment
from tests.support.steps import assert_steps_round_the_weights_alone, compile_converted, converted, whole
from tnnlm.inference.engine import open_engine
from tnnlm.machine.capabilities import capability, cpu_level

INVARIANTS = (
    "tests/ops/test_toeplitz.py",
    "tests/ops/test_recurrence.py",
    "tests/test_invariants.py::test_step_prefill_and_forward_agree",
    "tests/test_invariants.py::test_padded_batch_equals_single_prompts",
    "tests/test_machines.py::test_linear_layer_equals_the_product_with_rounded_weights",
    "tests/test_machines.py::test_scripts_work_and_report_what_ran[this-machine]",
)
"""Invariants of a model in both forms, every linear layer, and the scripts."""
BITS = (
    "tests/test_machines.py::test_row_has_the_same_bits_in_any_batch_where_that_is_promised",
    "tests/serving/test_scheduler.py::test_text_is_the_same_under_any_load",
    "tests/training/test_run.py::test_resume_is_exact[crash-2]",
)
"""Tests of bitwise equality in batches and after resuming."""


@pytest.mark.parametrize("level", LEVELS)
def test_invariants_and_bitwise_equality_hold_at_every_level(level: str) -> None:
    if level == "avx2" and "AVX512" not in cpu_level():
        pytest.skip(f"this CPU has no AVX-512 ({cpu_level()}), so the whole test suite runs at this level")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *BITS]
    if level != "two-threads":  # threads change the summation order, not the computation
        command += INVARIANTS
    done = subprocess.run(command, cwd=ROOT, env=level_environment(level), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(("bits", "dtype"), [(256, "float32"), (256, "int8"), (1, "float32")])
def test_compiled_step_is_right_at_every_vector_width(bits: int, dtype: str) -> None:
    """A width of 1 bit makes PyTorch use no vectors."""
    if not capability("cpp_compiler"):
        pytest.skip("no C++ compiler")
    if bits == pick_vec_isa().bit_width():
        pytest.skip("tests/inference/test_engine.py covers the vector width of this CPU")
    with inductor_config.patch({"cpp.simdlen": bits}):
        compile_converted(dtype)
    engine, info = open_engine(whole(converted()), Path("out"), dtype=dtype)
    assert info.name == "compiled"
    assert_steps_round_the_weights_alone(engine, dtype)
