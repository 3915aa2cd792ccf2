"""Decode benchmark: every model runs, rows have all fields, and tables and plots are written."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from benchmarks import conversion, serving, train_step
from benchmarks.installed import default_subject
from benchmarks.levels import LEVELS, level_table, levels_here, time_levels
from benchmarks.limits import model_products, product_seconds
from benchmarks.llama_cpp import llama_cpp
from benchmarks.onnx_runtime import OnnxModel
from benchmarks.prefill import LIMIT, with_shares
from benchmarks.ratios import ratio_table
from benchmarks.report import plot, table
from benchmarks.serving import PROMPT
from benchmarks.subjects import CONVERSIONS, PEERS, InPlaceSteps, ours, peer
from benchmarks.train_step import NAMES, OURS, peak_bytes, trainee
from experiments.timing import Effort, read_bandwidth, time_prefill, time_steps
from tests.support.commands import check_arguments
from tests.support.models import tiny_config
from tests.support.scripts import ROOT
from tests.support.servers import tiny_converted
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.converted import ConvertedModel
from tnnlm.conversion import convert_model
from tnnlm.errors import run_script
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import train_bpe
from tnnlm.training.run import train

SHAPE = tiny_config(d_model=64, n_layers=2, glu_dim=64)
LITTLE = Effort(rounds=2, settle=1, steps=2)
FIELDS = {"name", "dtype", "batch", "context", "seconds_per_token", "tokens_per_second", "spread"}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tnnlm_models_step_and_prefill_at_every_context(conversion: str, dtype: str, tmp_path: Path) -> None:
    subject = ours(conversion, "packed", dtype, SHAPE, tmp_path)
    assert subject.name == f"tnnlm-{conversion}-packed"
    # Six products per layer, and the language model head.
    block = 64 * (2 * 192 + 192 + 2 * 64 + 64)
    assert subject.weight_bytes == (2 * block + 300 * 64) * {"float32": 4, "int8": 1}[dtype]
    bandwidth, rows = time_steps([subject], [(1, 5), (3, 9)], LITTLE)
    assert bandwidth > 0
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 5), (3, 9)]
    assert rows[0].keys() >= FIELDS | {"state_bytes", "bandwidth_share"}
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0
    assert [row["context"] for row in time_prefill([subject], [3, 600], 300, LITTLE)] == [3, 600]


@pytest.mark.parametrize("conversion", ["balanced", "window512"])
def test_onnxruntime_runs_exported_steps(conversion: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = convert_model(CausalLM(SHAPE).eval(), **CONVERSIONS[conversion])
    whole = ConvertedModel(model, train_bpe([" "], 257, "<eos>", 1, False), "")
    other = OnnxModel(whole, tmp_path)
    state = expected_state = model.init_state(2)
    for tokens in torch.randint(300, (5, 2)):
        logits, state = other.step(tokens, state)
        expected, expected_state = model.step(tokens, expected_state)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_steps_of_onnxruntime_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    subject = ours("balanced", "onnxruntime", "float32", SHAPE, tmp_path)
    assert time_steps([subject], [(1, 5), (3, 9)], LITTLE)[1][1]["name"] == "tnnlm-balanced-onnxruntime"


@pytest.mark.parametrize("kind", PEERS)
def test_baselines_have_as_many_weights_and_keep_their_context(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    subject = peer(kind, "float32", SHAPE, 64)
    target = ours("balanced", "eager", "float32", SHAPE, tmp_path).weight_bytes
    assert abs(subject.weight_bytes - target) <= 0.25 * target
    stepper = subject.step_at(2, 7)
    with torch.inference_mode():
        for _ in range(3):
            stepper.step()
            stepper.undo()
    assert subject.state_at(7) > 0
    _, rows = time_steps([subject], [(1, 5), (1, 65)], LITTLE)
    assert [row["context"] for row in rows] == [5], "a context longer than its window is skipped"


def test_llama_cpp_has_as_many_weights_and_keeps_its_context(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    target = ours("balanced", "eager", "float32", SHAPE, tmp_path).weight_bytes
    for dtype, width in (("float32", 4), ("int8", 34 / 32)):
        subject = llama_cpp(dtype, SHAPE, 64, 2, tmp_path)
        assert abs(subject.weight_bytes / width - target / 4) <= 0.25 * target / 4
        stepper = subject.step_at(2, 7)
        for _ in range(3):
            stepper.step()
            stepper.undo()
        assert time_prefill([subject], [20], 300, LITTLE)[0]["tokens_per_second"] > 0


def test_tables_and_plots(tmp_path: Path) -> None:
    rows = [
        {
            "name": name,
            "dtype": "float32",
            "batch": 1,
            "context": context,
            "seconds_per_token": 1e-3 * (index + 1),
            "tokens_per_second": 1e3 / (index + 1),
            "spread": 0.1,
            "bandwidth_share": 0.5,
        }
        for index, name in enumerate(("tnnlm-balanced-packed", "transformers-llama"))
        for context in (128, 512)
    ]
    result = {"mode": "decode", "results": rows}
    assert "| tnnlm-balanced-packed | float32 | 1.00 (50%) | 1.00 (50%) |" in table(result)
    for mode in ("decode", "batch", "prefill"):
        plot({"mode": mode, "results": rows}, tmp_path / "times.png")
        assert (tmp_path / "times.png").stat().st_size > 5_000


@pytest.mark.parametrize("rows", [1, 2])
@torch.inference_mode()
def test_the_default_model_steps_in_place_as_in_generation(rows: int, tmp_path: Path) -> None:
    subject, engine = default_subject(tiny_converted(tmp_path / "converted"))
    assert (subject.name, subject.dtype) == ("tnnlm-default", "float32")
    assert "packed" in engine
    step, undo = subject.step_at(rows, 5)
    assert isinstance(step, InPlaceSteps)
    assert undo is None
    step()
    step()


def test_prefill_is_relative_to_the_products_of_its_dtype() -> None:
    cases = (("tnnlm-a", "float32", 150), ("tnnlm-a", "bfloat16", 1), ("llama", "float32", 3))
    alone = {"name": LIMIT, "dtype": "float32", "context": 8, "tokens_per_second": 200}
    rows = [{"name": n, "dtype": d, "context": 8, "tokens_per_second": rate} for n, d, rate in cases]
    shown = with_shares([*rows, alone])
    assert shown == [rows[0] | {"product_share": 0.75}, *rows[1:], alone]
    assert "| tnnlm-a | float32 | 150 (75%) |" in table({"mode": "prefill", "results": shown})


def test_trainees_learn_and_hold_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(300, (2, 17))
    monkeypatch.setattr(train_step, "RECOMPUTED", 16)
    model = trainee(OURS, SHAPE, 16, compiled=False)
    losses = [model.step(rows) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert peak_bytes("tnn-pytorch", SHAPE, 16, False) > 4 * trainee("tnn-pytorch", SHAPE, 16, False).params


def test_bandwidth_is_that_of_a_memory() -> None:
    assert 0.1 < read_bandwidth() < 100_000


def tool_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tool: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_constant_measures_a_converted_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=2"), None)
    assert script("convert", "runs/tiny").code == 0
    words = ["runs/tiny", "--quick", "--contexts", "4", "8", "--json", "c.json", "--png", "c.png"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "constant", *words])
    assert run_script(tool_of("benchmark").main) == 0
    assert "state bytes" in capsys.readouterr().out
    rows = json.loads(Path("c.json").read_text())["results"]
    assert [row["context"] for row in rows] == [4, 8]
    assert rows[0].keys() >= FIELDS | {"state_bytes", "prefill_seconds"}
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0
    assert Path("c.png").stat().st_size > 5_000
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "decode", "runs/tiny"])
    assert run_script(tool_of("benchmark").main) == 2


def test_tool_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tool_of("benchmark")
    # Every engine and every model runs at a tiny size, because the timings do not matter here.
    monkeypatch.setattr(tool, "SHAPE", SHAPE)
    small = ["--quick", "--d-model", "32", "--peers", "--json", "out.json", "--png", "out.png"]
    for mode, words in (
        ("decode", ["--contexts", "8"]),
        ("batch", ["--batches", "2"]),
        ("prefill", ["--contexts", "8"]),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", mode, *small, *words])
        assert run_script(tool.main) == 0
        data = json.loads(Path("out.json").read_text())
        assert data["bandwidth_gbs"] > 0
        assert all(row.keys() >= FIELDS for row in data["results"])
        assert "tnnlm-balanced-packed" in capsys.readouterr().out
        limited = {row["dtype"] for row in data["results"] if row["name"] == LIMIT}
        assert {row["dtype"] for row in data["results"] if "product_share" in row} == limited
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", *small, "--contexts", "16"])
    assert run_script(tool.main) == 0
    data = json.loads(Path("out.json").read_text())
    assert [row["name"] for row in data["results"]] == list(NAMES)
    for row in data["results"]:
        assert row.keys() >= FIELDS
        assert row["peak_bytes"] > 0
        assert 0 < row["flop_share"] < 1
    sizes = {row["name"]: row["params"] for row in data["results"]}
    assert sizes["tnn-pytorch"] == sizes["tnnlm-tno"]
    assert "convolution's share" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "decode", "--contexts", "0"])
    assert run_script(tool.main) == 2


class _Events(BaseHTTPRequestHandler):
    """Server that answers every request with two events and the number of tokens."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(body["prompt"]) == PROMPT
        events: list[dict[str, Any]] = [
            {"choices": [{"text": "a", "finish_reason": None}]},
            {"choices": [{"text": "b", "finish_reason": "length"}]},
            {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}},
        ]
        self.send_response(200)
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *words: Any) -> None:
        pass


class _Peer:
    """Baseline on ``_Events`` in place of llama.cpp's server."""

    name, context = "llama-server-F32", 512

    @contextmanager
    def running(self, slots: int) -> Iterator[str]:
        with ThreadingHTTPServer(("127.0.0.1", 0), _Events) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()


def test_serve_measures_every_server_with_the_same_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp")
    folder = tiny_converted(tmp_path / "converted")
    tool = tool_of("benchmark")
    words = ["serve", str(folder), "--quick", "--streams", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--llama-server", "nothing"])
    assert run_script(tool.main) == 2
    assert "nothing: no such program" in capsys.readouterr().err
    monkeypatch.setattr(serving, "_peer", lambda *_: _Peer())
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--record", "serve.json", "--png", "s.png"])
    assert run_script(tool.main) == 0
    printed = capsys.readouterr().out
    assert "tnnlm-serve / llama-server-F32" in printed
    assert "over that of generate.py" in printed
    data = json.loads(Path("serve.json").read_text())
    assert data["command"] == f"python tools/benchmark.py {' '.join(words)}"
    assert data["values"]["slot_context"] == 512
    names = {(row["name"], row["batch"]) for row in data["result"]["results"]}
    assert names == {
        *(("tnnlm-serve", n) for n in (1, 2)),
        *(("llama-server-F32", n) for n in (1, 2)),
        ("tnnlm-generate", 1),
    }
    for row in data["result"]["results"]:
        assert row.keys() >= FIELDS | {"limit_share", "first_token_ms", "between_tokens_ms"}
        assert row["tokens_per_second"] > 0
    assert Path("s.png").stat().st_size > 5_000


def test_convert_times_calls_that_the_script_accepts(
    run_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def called(script: str, *words: str) -> None:
        check_arguments(script, [*words])
        calls.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir()
        (out / "conversion.json").write_text('{"seconds": 0.25}', encoding="utf-8")

    monkeypatch.setattr(conversion, "run_command", called)
    words = ["convert", str(run_here), "--quick", "--json", "c.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    assert run_script(tool_of("benchmark").main) == 0
    assert [row["name"] for row in json.loads(Path("c.json").read_text())["results"]] == [
        *conversion.CALLS,
        conversion.IMPORT,
    ]
    assert len(calls) == len(conversion.CALLS)
    assert "of these, the conversion itself" in capsys.readouterr().out


def test_products_alone_are_those_of_the_converted_model(tmp_path: Path) -> None:
    weights: list[torch.Size] = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        weights.append(weight.shape)

    layers, _ = model_products(SHAPE, make)
    assert [width for width, _ in layers] == [shape[1] for shape in weights[:-1]]
    converted = ours("balanced", "eager", "float32", SHAPE, tmp_path)
    assert 4 * sum(shape.numel() for shape in weights) == converted.weight_bytes


def test_products_alone_are_a_limit_of_every_batch() -> None:
    seconds = product_seconds(SHAPE, "float32", (1, 3))
    assert list(seconds) == [1, 3]
    assert min(seconds.values()) > 0


def test_ratios_compare_with_the_first_baseline_of_a_dtype() -> None:
    rows = [
        {"name": name, "dtype": "float32", "batch": 1, "context": 128, "seconds_per_token": seconds}
        for name, seconds in (("tnnlm-default", 1.0), ("transformers-gpt2", 4.0), ("llama.cpp-F32", 2.0))
    ]
    assert "| tnnlm-default / llama.cpp-F32 | 0.50 |" in ratio_table({"mode": "decode", "results": rows})
    assert ratio_table({"mode": "decode", "results": rows[:1]}) == ""


def test_levels_are_timed_in_separate_processes() -> None:
    before = dict(os.environ)
    rows = time_levels(SHAPE, 2, rounds=1, steps=1, decoded=SHAPE)
    assert [row["level"] for row in rows] == levels_here()
    assert rows[-1]["cpu_level"] == "DEFAULT"
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert all(row["decoding"]["bfloat16"]["linear"] for row in rows)
    assert level_table({"results": rows}).count("\n") == 1 + len(rows)
    assert dict(os.environ) == before
    assert LEVELS["native"] == {}
