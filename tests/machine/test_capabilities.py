"""The table of capabilities: operators that raise, return wrong results or are disabled, and the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.scripts import ROOT
from tests.support.simulated import NO_BFLOAT16
from tnnlm.errors import UserError
from tnnlm.inference import aot_package as compiled
from tnnlm.inference.aot import load_row_step, package_path
from tnnlm.machine.capabilities import PROBES, capability, capability_table, cpu_fingerprint, describe_cpu
from tnnlm.models.causal_lm import CausalLM


@pytest.mark.parametrize("machine", ["no-avx512"], indirect=True)
def test_operator_that_raises_is_unavailable_with_its_reason(machine: str) -> None:
    assert capability("onednn_bfloat16") == (False, NO_BFLOAT16)
    assert not capability("bfloat16_arithmetic")


@pytest.mark.parametrize("machine", ["this-machine"], indirect=True)
def test_operator_that_gives_wrong_results_is_unavailable(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, w, s: torch.zeros(len(x), len(w)))
    found = capability("int8")
    assert not found
    assert "wrong results" in found.reason


def test_capabilities_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TNNLM_WITHOUT", "int8, cpp_compiler")
    assert capability("int8") == (False, "disabled by TNNLM_WITHOUT")
    assert not capability("cpp_compiler")
    monkeypatch.setenv("TNNLM_WITHOUT", "int4")
    with pytest.raises(UserError, match="TNNLM_WITHOUT: unknown capability int4; choose from onednn_float32"):
        capability("int8")
    monkeypatch.delenv("TNNLM_WITHOUT")
    with pytest.raises(KeyError):
        capability("int9")


def test_table_names_everything_and_prints() -> None:
    table = capability_table()
    assert PROBES.keys() <= table.keys()
    assert table["threads"] == torch.get_num_threads()
    assert table["cpu_level"] in describe_cpu()
    done = subprocess.run(
        [sys.executable, "-m", "tnnlm.machine.capabilities"],
        cwd=ROOT,
        env={**os.environ, "TNNLM_WITHOUT": "int8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    as_json = [sys.executable, "-m", "tnnlm.machine.capabilities", "--json"]
    data = json.loads(subprocess.run(as_json, cwd=ROOT, capture_output=True, check=True).stdout)
    assert data.keys() == table.keys()
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(PROBES)
    assert any(line.startswith("int8 ") and "disabled by" in line for line in lines)


def test_compiled_step_of_a_cpu_with_other_instructions_is_left_alone(
    tiny_model: CausalLM,
) -> None:
    # The CPU has the same level but another model, and native code may use instructions that it lacks.
    Path("out").mkdir()
    path = package_path(Path("out"), "float32")
    path.write_bytes(b"native code")
    made_for = compiled._made_for("abc") | {"cpu_instructions": "0123456789abcdef"}
    path.with_suffix(".json").write_text(json.dumps(made_for), encoding="utf-8")
    with pytest.raises(UserError, match="another machine"):
        load_row_step(tiny_model, Path("out"), "float32", "abc")
    assert len(cpu_fingerprint()) == 16
