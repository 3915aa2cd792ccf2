"""Checks of one GPU: every part at tiny sizes, missing packages, and runs that crash, hang or are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
from gpu_checks import training
from gpu_checks.arithmetic import arithmetic_record
from gpu_checks.correctness import marked_files
from gpu_checks.decoding import _engine, step_bytes
from gpu_checks.gpt2 import GPT2
from gpu_checks.report import failed, markdown, record, tables
from gpu_checks.rows import append_row, read_rows
from gpu_checks.runner import Outcome, Part, StopSignals, run_parts, status_row
from gpu_checks.shapes import DEMO, FILES, MEDIUM, Setting, tiny
from gpu_checks.worker import PARTS, command, run
from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config
from tnnlm.errors import UserError, run_script
from tnnlm.ops import conv_backends
from tnnlm.training.memory import estimate_memory

ABOUT = ("python tools/gpu_check.py", "2026-11-28", "abc")
PYTHON_PARTS = [part for part in PARTS if part.name != "tests"]
HIDDEN = ("lightning", "numpy", "omegaconf", "safetensors", "tokenizers", "tqdm", "transformers", "triton")
"""Packages that are hidden one at a time."""
ALSO = (
    "datasets",
    "filelock",
    "huggingface_hub",
    "pandas",
    "psutil",
    "pyarrow",
    "rich",
    "torchmetrics",
    "yaml",
)
"""Packages that are hidden together with those."""


def fake(code: str) -> Callable[[Part, Path, float], list[str]]:
    """Return a launcher of parts that write one row, ``ready``, and then run ``code``."""
    row = json.dumps({"kind": "card", "name": "copy", "bytes_per_second": 1.0})

    def launch(part: Part, rows: Path, seconds: float) -> list[str]:
        written = f"open({str(rows)!r}, 'a').write({row!r} + chr(10))"
        return [sys.executable, "-c", f"{written}\n{code if part.name == 'bad' else ''}"]

    return launch


def outcomes_of(code: str, tmp_path: Path, **options: Any) -> list[Outcome]:
    parts = [Part(name, "", 1000) for name in ("first", "bad", "last")]
    return run_parts(
        parts, fake(code), tmp_path, 1e6, lambda found: None, options.pop("stop", StopSignals()), **options
    )


@pytest.mark.parametrize("part", PYTHON_PARTS, ids=lambda part: part.name)
def test_every_part_measures_tiny_models_on_a_cpu(part: Part, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert run(part.function, path, "cpu", 5.0, True) == 0
    rows = read_rows(path)
    assert rows
    assert not any("failed" in row or row["kind"] == "status" for row in rows), rows
    assert not failed([Outcome(part.name, "measured", 1.0, rows)])
    for row in rows:
        if row["kind"] in ("training", "decoding"):
            assert row["tokens_per_second"] > 0
            assert row["bytes_per_second" if row["kind"] == "decoding" else "flops"] > 0


CODE = """
import os, sys
import torch
from pathlib import Path
folder, hidden, functions = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[4:]
everything = {"all": [*hidden, *sys.argv[3].split(",")]}
for name, names in ({one: [one] for one in hidden} | everything).items():
    if os.fork():
        assert os.wait()[1] == 0, name
        continue
    for known in list(sys.modules):
        if known.partition(".")[0] in names:
            del sys.modules[known]
    sys.modules.update(dict.fromkeys(names))
    from gpu_checks.worker import run
    for function in functions:
        run(function, folder / f"{name}.jsonl", "cpu", 1.0, True)
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_only_torch_is_needed_and_a_missing_package_skips_a_part(tmp_path: Path) -> None:
    functions = [part.function for part in PARTS if part.name in ("demo", "decode-48m")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CODE, str(tmp_path), ",".join(HIDDEN), ",".join(ALSO), *functions]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in (*HIDDEN, "all"):
        kinds = {row["kind"] for row in read_rows(tmp_path / f"{name}.jsonl")}
        skipped = [row for row in read_rows(tmp_path / f"{name}.jsonl") if row["kind"] == "status"]
        assert kinds >= {"training", "decoding"} or skipped, name
        assert all(row["status"].startswith("skipped: needs the package ") for row in skipped)
        assert name in ("all", "numpy") or not skipped, (name, skipped)


def test_a_part_whose_package_is_missing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert run("gpu_checks.correctness:repository_tests", tmp_path / "rows.jsonl", "cpu", 1.0, True) == 0
    assert read_rows(tmp_path / "rows.jsonl") == [status_row("skipped: needs the package pytest")]


def test_marked_tests_are_found() -> None:
    names = {path.name for path in marked_files()}
    assert names >= {"test_cuda_graph.py", "test_sharding.py"}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise ValueError('broken')", "failed: ValueError: broken"),
        ("import os; os.abort()", "failed: ended by signal 6"),
        ("raise SystemExit(3)", "failed: exit code 3"),
    ],
)
def test_a_part_that_crashes_keeps_its_rows_and_the_next_one_runs(
    code: str, status: str, tmp_path: Path
) -> None:
    first, bad, last = outcomes_of(code, tmp_path)
    assert (first.status, bad.status, last.status) == ("measured", status, "measured")
    assert len(first.rows) == len(bad.rows) == len(last.rows) == 1
    assert failed([bad])


def test_a_part_that_hangs_is_stopped_and_keeps_its_rows(tmp_path: Path) -> None:
    def clock() -> float:  # the limit passes when the part has written its row
        return 2000.0 if (tmp_path / "bad.jsonl").exists() and not (tmp_path / "last.log").exists() else 0.0

    _, bad, last = outcomes_of("import time; time.sleep(3600)", tmp_path, clock=clock)
    assert (bad.status, len(bad.rows)) == ("stopped: out of time", 1)
    assert last.status == "measured"


def test_parts_without_time_are_not_started(tmp_path: Path) -> None:
    found = run_parts(PARTS, fake(""), tmp_path, 5.0, lambda outcomes: None, StopSignals(), lambda: 0.0)
    assert {one.status for one in found} == {"not started: out of time"}
    assert not failed(found)


STOPPED = """
import sys, json
from pathlib import Path
import gpu_check
from gpu_checks.runner import Part
rows = json.dumps({"kind": "card", "name": "copy", "bytes_per_second": 1e9})
def launch(part, path, seconds, device, tiny):
    code = f"open({str(path)!r}, 'a').write({rows!r} + chr(10)); import time; time.sleep(3600)"
    return [sys.executable, "-c", code]
gpu_check.launched = launch
sys.exit(gpu_check.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stopped_run_keeps_what_it_has(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    path = tmp_path / "out/gpu_check.json"
    while process.poll() is None and not (path.exists() and json.loads(path.read_text())["rows"]):
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 128 + number
    assert f"| card | stopped: {name} |" in out
    assert f"| demo | not started: {name} |" in out
    found = json.loads(path.read_text())
    assert found["rows"] == [{"kind": "card", "name": "copy", "bytes_per_second": 1e9}]
    assert found["tables"]["card"][0] == {"rate": "copy", "value": "1", "unit": "GB/s"}
    assert out.startswith(path.with_suffix(".md").read_text())


def test_every_convolution_that_a_gpu_can_run_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(conv_backends, "why_no_windows", lambda device: "")
    monkeypatch.setattr(conv_backends, "why_no_cudnn", lambda device: "not installed")
    monkeypatch.setattr(conv_backends, "use_backend", lambda name: nullcontext(used.append(name)))
    found = training.convolution_backends(torch.device("cuda"))
    assert list(found) == ["tnnlm, backend tiles", "tnnlm, backend windows"]
    assert training.convolution_backends(torch.device("cpu")) == {}
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "convolution_backends", lambda device: found)
    training.medium(Setting(torch.device("cpu"), True, 1.0), rows.append)
    assert used == ["tiles", "windows"]
    assert [row["variant"] for row in rows] == [training.OURS, *found, training.STANDARD]
    assert not any("failed" in row for row in rows)


def test_an_incomplete_last_row_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"kind": "card"})
    with path.open("a") as file:
        file.write('{"kind": "tra')
    assert read_rows(path) == [{"kind": "card"}]
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--minutes", "0"], "--minutes 0: must be at least 0.17 and at most 1440"),
        (["--minutes", "0.1"], "--minutes 0.1: must be at least 0.17"),  # no part would start
        (["--parts", "card", "--out", "there"], "gpu_check.json: already exists; choose another --out"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--arithmetic", "--out", "half"], "gpu_check.md: already exists; choose another --out"),
        pytest.param(
            ["--arithmetic", "--out", "/proc/none"],
            "/proc/none: can't be created; choose another --out",
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a virtual file system"),
        ),
    ],
)
def test_bad_arguments_are_refused(
    words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there").mkdir()
    Path("half").mkdir()
    Path("there/gpu_check.json").write_text("{}")
    Path("half/gpu_check.md").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    assert run_script(gpu_check.main) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["half", "there"]


@pytest.mark.parametrize(
    ("version", "reason"), [("2.7.1+cu128", "torch 2.7.1"), ("2.10.0", "PyTorch finds no GPU")]
)
def test_an_old_torch_and_a_machine_without_a_gpu_are_refused(
    version: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=reason):
        gpu_check.check_torch("cuda")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="is not installed"):
        gpu_check.check_torch("cpu")


@pytest.mark.parametrize("name", FILES)
def test_shapes_are_those_of_the_configurations(name: str) -> None:
    config = load_config(find_config(name), [])
    assert FILES[name].model == config.model
    assert FILES[name].batch_size == config.data.batch_size
    words = ["devices=1", "strategy=auto", "precision=bf16-mixed", "accelerator=cpu", "accumulate=1"]
    one = load_config(find_config(name), [f"trainer.{word}" for word in words])
    found = estimate_memory(FILES[name].config("cpu", "bf16-mixed"))
    assert found.step == estimate_memory(one).step


def test_bytes_of_a_step_are_those_of_its_tensors() -> None:
    shape = tiny(MEDIUM)
    model, _ = _engine(shape.model, torch.device("cpu"))
    state = model.init_state(3)
    states = sum(part.numel() * 4 for layer in state.layers for part in layer)
    residues = sum(layer.mixer.conv.params.residues.numel() * 4 for layer in model.layers)
    inner, width = 3 * 32, 32
    weights = 2 * (2 * 3 * width * (inner + width) + width * 300)
    assert step_bytes(shape.model, 3) == weights + residues + 2 * states


def test_gpt2_is_causal_and_counts_its_operations() -> None:
    model = GPT2(64, 2, 50, 16).double()
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9], rtol=0, atol=1e-12)
    assert not torch.equal(model(tokens)[:, 9:], model(changed)[:, 9:])
    # 12 D^2 weights per layer and the head; 6 L D per layer for half of the scores and values.
    assert model.flops_per_token(16) == 6 * (2 * 12 * 64**2 + 50 * 64) + 2 * 6 * 16 * 64


def test_shares_are_relative_to_the_rates_of_the_card() -> None:
    rows = [
        {"kind": "card", "name": "matrix product, bfloat16", "flops": 4e14},
        {"kind": "card", "name": "copy", "bytes_per_second": 2e12},
        {
            "kind": "training", "shape": "demo", "variant": "tnnlm", "steps": 100, "tokens_per_second": 1e5,
            "flops": 1e14, "bytes_per_second": 1e12,
        },
        {"kind": "training", "shape": "demo", "variant": "large", "failed": "out of memory"},
        {
            "kind": "decoding", "shape": "1.3B", "engine": "graph", "batch": 64, "seconds_per_step": 2e-3,
            "tokens_per_second": 32_000.0, "bytes_per_second": 1.5e12,
        },
        {"kind": "memory", "shape": "demo", "variant": "32-true", "estimated": 3 << 30, "measured": 2 << 30},
        {"kind": "correctness", "name": "a", "error": 1.0, "limit": 1e-5, "passed": False},
    ]  # fmt: skip
    found = tables([Outcome("card", "measured", 2.0, rows)], rows)
    assert found["training"][0]["of the matrix rate"] == "25%"
    assert found["training"][0]["of the copy rate, at least"] == "50%"
    assert found["training"][1]["tokens/s"] == "out of memory"
    assert found["decoding"][0] | {"ms per step": "2", "of the copy rate": "75%"} == found["decoding"][0]
    assert found["memory"][0]["estimated / measured"] == "1.50"
    assert found["correctness"][0]["result"] == "WRONG"
    assert failed([Outcome("agreement", "measured", 1.0, rows)])
    text = markdown(found)
    assert text.index("## Correctness") < text.index("## Training") < text.index("## Decoding")
    assert record([], *ABOUT)["machine"] == "unknown"


def test_arithmetic_states_bounds_for_every_shape() -> None:
    found = arithmetic_record(*ABOUT)["tables"]
    committed = json.loads((ROOT / "docs/records/gpu_arithmetic.json").read_text(encoding="utf-8"))
    assert found == committed["tables"], "python tools/gpu_check.py --arithmetic computes the record again"
    assert [row["model"] for row in found["training"]] == ["demo", "48.7M", "125M", "1.3B"]
    assert [row["batch"] for row in found["decoding"]] == ["1", "64", "256"] * 2
    # 1.31e9 weights of two bytes, without the embedding's second use, at 3.35e12 bytes/s.
    assert float(found["decoding"][3]["H100 SXM: ms per step"]) == pytest.approx(0.8, abs=0.05)


def test_the_command_of_a_part_runs_in_any_folder(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = command(PARTS[0], path, 10.0, "cpu", True)
    subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    assert {row["kind"] for row in read_rows(path)} == {"machine", "card"}
    assert Setting(torch.device("cpu"), False, 1.0).sized(DEMO) is DEMO
