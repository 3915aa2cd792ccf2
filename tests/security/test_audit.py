"""Audit hooks over every command that loads a model: no file of a stranger's folder runs, whatever it is.

The folder is the current one, and has a bait of every kind: modules named as libraries, in packages and in
configurations, bytecode hooks, pickles, native code, and templates. Each bait leaves a trace when it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hostile import write_run
from tests.support.scripts import ROOT
from tnnlm.checkpoints.hf_files import SHIM, code_files
from tnnlm.checkpoints.locate import load_trained
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.deployment.save import save
from tnnlm.inference import aot_package

MODULES = (
    "torch", "lightning", "tokenizers", "safetensors", "omegaconf", "datasets", "transformers", "uvicorn",
    "yaml", "jinja2", "sitecustomize", "usercustomize", "conftest", "setup", "__init__", "evil_kernel",
)  # fmt: skip
"""Names of the modules in the folder."""
TEMPLATE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch TRACE') }}"
)


class Pickled:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (self.trace, 0o700)


def traces() -> Path:
    return Path("traces").absolute()


def write_baits(folder: Path) -> None:
    """Write one bait of every kind into a folder."""
    traces().mkdir(exist_ok=True)
    for name in MODULES:
        trace = str(traces() / name)
        (folder / f"{name}.py").write_text(f"open({trace!r}, 'w').close()\nraise SystemExit(9)\n")
    (folder / "evil.pth").write_text(f"import os; os.mkdir({str(traces() / 'pth')!r})\n")
    torch.save({"model": {"a": Pickled(str(traces() / "pickle"))}}, folder / "evil.pt")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Pickled(str(traces() / name)), folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("TRACE", str(traces() / "jinja")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(f"open({str(traces() / 'custom')!r}, 'w').close()\n")


def change(path: Path, **entries: Any) -> dict[str, Any]:
    """Change entries of a JSON file, which may not exist."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | entries))
    return data


@pytest.fixture
def hostile(run_here: Path) -> Path:
    """Fill the current folder, a run in it and its converted model with baits; return the model's folder."""
    trained = load_trained(run_here)
    folder = save(trained.model, trained.tokenizer, run_here / "converted", method="etsc")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["kernel"] |= {"module": "evil_kernel.py", "module_sha256": "0" * 64}
    change(folder / "config.json", model=config["model"])
    write_checksums(folder)  # an attacker writes the checksums of what he changes
    change(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    template = TEMPLATE.replace("TRACE", str(traces() / "template"))
    change(folder / "tokenizer_config.json", chat_template=template, tokenizer_class="TokenizersBackend")
    outside = {"weight_map": {"embedding.weight": "../../../outside.safetensors"}}
    change(folder / "model.safetensors.index.json", **outside)
    for name in ("float32", "bfloat16", "int8"):
        (folder / f"step-{name}.pt2").write_bytes(b"native code")
        (folder / f"step-{name}.json").write_text(json.dumps(aot_package._made_for(config["model_sha256"])))
    (folder / SHIM).write_text(f"open({str(traces() / 'shim')!r}, 'w').close()\nraise SystemExit(9)\n")
    for place in (Path(), run_here, run_here / "checkpoints", folder):
        write_baits(place)
    write_run(Path("named"), name="theirs", module="evil_kernel.py", module_sha256="0" * 64)
    write_run(Path("pickle"))
    torch.save(Pickled(str(traces() / "checkpoint")), "pickle/checkpoints/last.ckpt")
    (Path("tokenizer.json")).write_text(trained.tokenizer.to_json())
    return folder


def audited(what: str, scratch: Path) -> dict[str, Any]:
    """Run :mod:`tests.support.audited` in the current folder; return the exit codes of its commands."""
    scratch.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(scratch),
        "HF_HOME": str(scratch),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": str(scratch),
    }
    program = ROOT / "tests/support/audited.py"
    done = subprocess.run(
        [sys.executable, str(program), str(Path.cwd()), what], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # Transformers may write to other caches; what counts is what it does with the folder.
    ours = what == "commands"
    assert [entry for entry in result["found"] if ours or str(Path.cwd().resolve()) in entry] == []
    assert not list(traces().iterdir())
    codes: dict[str, int] = result["codes"]
    return codes


def test_no_command_runs_anything_of_a_folder(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    codes = audited("commands", tmp_path_factory.mktemp("audit") / "scratch")
    refused = {name for name, code in codes.items() if code == 2}
    assert refused == {name for name in codes if name.endswith(("named", "pickle", "compiled", "graph"))}
    assert {code for name, code in codes.items() if name not in refused} == {0}


def test_transformers_runs_nothing_of_a_folder_that_this_package_can_refuse(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("transformers")
    shim = Path("shim")
    shim.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (shim / name).write_bytes((hostile / name).read_bytes())
    for name, text in code_files().items():
        (shim / name).write_text(text, encoding="utf-8")
    config = json.loads((shim / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "evil_model.TnnlmForCausalLM"
    change(shim / "config.json", auto_map=config["auto_map"])
    (shim / "evil_model.py").write_text(f"open({str(traces() / 'model')!r}, 'w').close()\n")
    codes = audited("transformers", tmp_path_factory.mktemp("audit") / "scratch")
    assert codes == {"not trusted": 2, "other module": 2, "registered": 0, "trusted": 0}


def test_current_folder_is_no_place_for_modules(hostile: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ("generate", "--model", "runs/tiny/converted", "--prompt", "The ", "--max-new-tokens", "1")
    done = subprocess.run([sys.executable, "-m", "tnnlm", *words], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    # Python itself looks for these two there if nothing else has them, before the command starts.
    assert not {path.name for path in traces().iterdir()} - {"sitecustomize", "usercustomize"}


def test_environment_does_not_appear_in_settings_of_a_run(
    monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    run = write_run(Path("theirs"))
    text = (run / "config.yaml").read_text()
    asked = text.replace("sample_prompt: ", "sample_prompt: '${oc.env:SECRET} ${seed} ${oc.decode:1}' # ")
    assert asked != text
    (run / "config.yaml").write_text(asked)
    shown = script("train", "--resume", "theirs", "--dry-run")
    assert shown.code == 2
    assert "s3cret" not in shown.out + shown.err
    assert shown.err.startswith("error: trainer.sample_prompt=${oc.env:SECRET} ${seed}")
    assert "theirs/config.yaml, line" in shown.err
    for words in (
        ("convert", "theirs"),
        ("generate", "--model", "theirs", "--prompt", "x"),
        ("train", "--init-from", "theirs"),
    ):
        done = script(*words)
        assert done.code == 2
        assert "theirs/config.yaml, line" in done.err
