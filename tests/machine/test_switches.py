"""TNNLM_WITHOUT disables a library everywhere, as the verbose log of the library itself shows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support.scripts import ROOT
from tnnlm.machine.capabilities import WITHOUT, capability

CODE = """
import sys, tempfile
from pathlib import Path
import torch
from tests.support.models import FAMILIES, tiny_config
from tnnlm.machine.capabilities import capability
from tnnlm.inference.aot import CompiledModel, compile_step, load_row_step
from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.models.causal_lm import CausalLM

def converted(method, family):
    torch.manual_seed(0)
    return convert_model(CausalLM(tiny_config(kernel=FAMILIES[family](), d_model=32)).eval(), method=method)

def decode(model, rows, prompt=20):
    tokens = torch.randint(300, (rows, prompt))
    state = model.prefill(tokens, model.init_state(rows))[1]
    for _ in range(3):
        state = model.step(tokens[:, 0], state)[1]

with torch.inference_mode():
    forms = {"balanced": "tno", "window": "sgconv", "companion": "rtf", "multirate": "sgconv"}
    for method, family in forms.items():
        decode(converted(method, family), 2)
        for dtype in ("float32", "bfloat16", "int8"):
            model = optimize_for_decoding(converted(method, family), dtype)
            decode(model, 1)
            decode(model, 2)
if "compile" in sys.argv:
    model = converted("balanced", "tno")
    with tempfile.TemporaryDirectory() as folder:
        fingerprint = model_fingerprint(model)
        compile_step(converted("balanced", "tno"), Path(folder), "float32", fingerprint)
        row = load_row_step(model, Path(folder), "float32", fingerprint)
        compiled = CompiledModel(optimize_for_decoding(model), row)
        with torch.inference_mode():
            decode(compiled, 1)
"""


def onednn_calls(without: str, *words: str) -> list[str]:
    """Return the log lines of the primitives that oneDNN executed."""
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tools"))),
        "ONEDNN_VERBOSE": "1",
        WITHOUT: without,
    }
    command = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if ",exec," in line]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_that_is_switched_off_runs_nowhere() -> None:
    if capability("onednn_float32"):
        assert any(",convolution," in line for line in onednn_calls(""))
    compiler = capability("cpp_compiler").available
    # Without FBGEMM the int8 layers multiply many rows in bfloat16 of PyTorch where that is fast.
    without = "onednn_float32 onednn_bfloat16 bfloat16_arithmetic"
    assert onednn_calls(without, *(["compile"] if compiler else [])) == []
