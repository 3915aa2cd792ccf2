"""Converted folders where tnnlm is not installed: the code in the folder gives the same results."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.hf_folders import FORMS, open_folder, some_tokens, write_folder
from tests.support.models import tiny_config
from tnnlm import __version__
from tnnlm.checkpoints.bundle import standalone_code
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.hf_files import STANDALONE
from tnnlm.conversion import convert_model
from tnnlm.hf import TnnlmForCausalLM
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences

NOT_INSTALLED = (
    "tnnlm", "omegaconf", "xxhash", "lightning", "datasets", "jinja2", "rich", "matplotlib", "torchmetrics"
)  # fmt: skip
"""Packages that tnnlm needs and neither PyTorch nor Transformers does, and tnnlm itself."""
PROGRAM = """
import builtins, copy, dis, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in NAMES else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens, mask = torch.load(sys.argv[1])
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    whole = model(tokens, attention_mask=mask)
    cache = model(tokens[:, :20], attention_mask=mask[:, :20]).past_key_values
    fork = copy.copy(cache)
    later = model(tokens[:, 20:], attention_mask=mask, past_key_values=cache).logits
    one = model(tokens[:, 20:21], attention_mask=mask[:, :21], past_key_values=fork).logits
    written = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    beams = model.generate(tokens, attention_mask=mask, max_new_tokens=4, num_beams=2, do_sample=False)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    kept = {buffer.dtype for buffer in half.buffers()}
    found[folder] = [whole.logits, later, one, written, beams, half(tokens).logits, kept]
    model.save_pretrained(folder + "-again")
def codes(code):
    yield code
    for part in code.co_consts:
        if hasattr(part, "co_code"):
            yield from codes(part)
module = sys.modules[type(model).__module__]
code = compile(open(module.__file__, encoding="utf-8").read(), "standalone", "exec")
steps = (step for part in codes(code) for step in dis.get_instructions(part))
loaded = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
unknown = sorted(name for name in loaded if not hasattr(module, name) and not hasattr(builtins, name))
assert not unknown, unknown
assert not [name for name in sys.modules if name.split(".")[0] in NAMES]
torch.save(found, sys.argv[2])
"""
LIBRARIES = {"torch", "transformers"}


def alone(code: str, *words: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program where neither tnnlm nor what only tnnlm needs can be imported."""
    code = code.replace("NAMES", repr(NOT_INSTALLED))
    command = [sys.executable, "-I", "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_code_is_the_same_each_time_and_imports_only_pytorch_and_transformers() -> None:
    code = standalone_code(__version__)
    assert standalone_code.__wrapped__(__version__) == code
    assert "SPDX-License-Identifier: Apache-2.0" in code[:100]
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [str(node.module)]
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names | LIBRARIES, name


def test_folder_gives_the_same_without_the_package(tmp_path: Path) -> None:
    made = {name: FORMS[name] for name in ("tno-balanced", "rtf-companion", "sgconv-multirate")}
    folders = {name: write_folder(tmp_path / name, *form) for name, form in made.items()}
    tokens, mask = some_tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    torch.save((tokens, mask), tmp_path / "tokens.pt")
    done = alone(PROGRAM, tmp_path / "tokens.pt", tmp_path / "found.pt", *folders.values(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for folder in folders.values():
        whole, later, one, written, beams, half, kept = found[str(folder)]
        ours = open_folder(folder).model
        assert type(ours) is TnnlmForCausalLM  # installed, the package comes first
        assert torch.equal(whole, ours(tokens, attention_mask=mask).logits)
        torch.testing.assert_close(later, whole[:, 20:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one, whole[:, 20:21], rtol=1e-3, atol=1e-3)
        assert torch.equal(
            written, ours.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        )
        options = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        assert torch.equal(beams, ours.generate(tokens, **options))
        assert half.dtype == torch.bfloat16
        assert torch.bfloat16 not in kept
        # What it saves, it and this package read.
        again = Path(f"{folder}-again")
        (again / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        assert (again / STANDALONE).read_text() == (folder / STANDALONE).read_text()
        assert load_converted(again).fingerprint == load_converted(folder).fingerprint
        assert torch.equal(open_folder(again).model(tokens, attention_mask=mask).logits, whole)


@pytest.mark.parametrize("wiring", ["hyena", "s4_glu"])
def test_other_wirings_are_in_the_code(wiring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = convert_model(CausalLM(tiny_config(block=wiring, expand=1)).eval(), method="window", horizon=20)
    module = ModuleType("standalone_tnnlm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(standalone_code(__version__), "standalone_tnnlm.py", "exec"), vars(module))
    shapes = [
        {name: list(tensor.shape) for name, tensor in params._asdict().items()}
        for params in recurrences(model)
    ]
    copy = module.TnnlmForCausalLM(module.TnnlmConfig(model=asdict(model.config), recurrences=shapes))
    copy.model.load_state_dict(model.state_dict())
    tokens = some_tokens(2, 30)
    with torch.no_grad():
        expected, _ = model.prefill(tokens, model.init_state(2))
    assert torch.equal(copy(tokens).logits, expected)


def test_damaged_weights_are_found_without_the_package(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "tno", "balanced")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    sizes = json.loads((folder / "config.json").read_text())
    sizes["model"].pop("d_model")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text(json.dumps(sizes))
    program = PROGRAM.partition("tokens, mask")[0] + (
        "for folder in sys.argv[1:]:\n"
        "    try:\n        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    except ValueError as error:\n        print(type(error).__name__, error)\n"
    )
    done = alone(program, folder, broken, cwd=tmp_path)
    first, second = done.stdout.splitlines()
    assert first.startswith("CheckpointError")
    assert "the weights are damaged or were replaced" in first
    assert second.startswith("CheckpointError config.json: is damaged")
