"""Exported models: the same logits, states and tokens as the model, in processes that can't import tnnlm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tests.support.models import FAMILIES, tiny_config
from tests.support.scripts import ROOT
from tests.support.training_runs import tiny_run, write_text
from tnnlm.checkpoints.converted import ConvertedModel, load_converted, model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.inference import export
from tnnlm.inference.export import PREFILL_CHUNK, export_onnx, export_torch
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.modules import RecurrentConv
from tnnlm.ops.ssm import SSMParams
from tnnlm.tokenizer import TextTokenizer, train_bpe
from tnnlm.training.run import train

METHODS = {"balanced": "tno", "window": "sgconv", "companion": "rtf"}
STEPS = 50
LIMIT = 1e-4
"""Absolute tolerance of logits around 1, in float32."""
PAGE = (ROOT / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "tnnlm" not in code]
ALONE = "import sys\nsys.modules['tnnlm'] = None  # any import of it fails\n"


class Exported(NamedTuple):
    """Converted model and the folder into which it was exported."""

    model: CausalLM
    folder: Path


def tokenizer() -> TextTokenizer:
    return train_bpe(["the cat sat on the mat"], 300, "<eos>", 1, False)


def whole(model: CausalLM) -> ConvertedModel:
    return ConvertedModel(model, tokenizer(), model_fingerprint(model))


@pytest.fixture(scope="module", params=METHODS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export a model of each method in both formats."""
    torch.manual_seed(0)
    kernel = FAMILIES[METHODS[request.param]]()
    trained = CausalLM(tiny_config(kernel=kernel, d_model=32, vocab_size=320)).eval()
    model = convert_model(trained, method=request.param)
    folder = tmp_path_factory.mktemp(request.param)
    export_torch(whole(model), folder)
    export_onnx(whole(model), folder)
    return Exported(model, folder)


def state_parts(state: ModelState) -> list[Tensor]:
    return [part for part in tree_flatten(state)[0] if part.numel()]


def empty_state(interface: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """Return the initial state that the interface description specifies."""
    inputs = [part for part in interface["step"]["inputs"] if "initial" in part]
    return {part["name"]: torch.full((rows, *part["shape"][1:]), part["initial"]) for part in inputs}


@pytest.mark.parametrize("rows", [1, 3])
def test_exported_step_gives_logits_and_states_of_the_model(exported: Exported, rows: int) -> None:
    model, folder = exported
    interface = json.loads((folder / "export/interface.json").read_text())
    step = torch.export.load(folder / "export/step.pt2").module()
    state, expected_state = [*empty_state(interface, rows).values()], model.init_state(rows)
    with torch.inference_mode():
        for tokens in torch.randint(320, (STEPS, rows)):
            logits, *state = step(tokens, *state)
            expected, expected_state = model.step(tokens, expected_state)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for part, reference in zip(state, state_parts(expected_state), strict=True):
        torch.testing.assert_close(part, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_exported_prefill_takes_ragged_chunks_and_a_nonzero_state(exported: Exported, rows: int) -> None:
    model, folder = exported
    interface = json.loads((folder / "export/interface.json").read_text())
    prefill = torch.export.load(folder / "export/prefill.pt2").module()
    state, expected_state = [*empty_state(interface, rows).values()], model.init_state(rows)
    with torch.inference_mode():
        for lengths in ([PREFILL_CHUNK] * rows, [5, 0, PREFILL_CHUNK][:rows], [1, 64, 33][:rows]):
            tokens, own = torch.randint(320, (rows, PREFILL_CHUNK)), torch.tensor(lengths)
            logits, *state = prefill(tokens, own, *state)
            expected, expected_state = model.prefill(tokens, expected_state, own, keep=1)
            read = own > 0
            torch.testing.assert_close(logits[read], expected[read, 0], rtol=0, atol=LIMIT)
            for part, reference in zip(state, state_parts(expected_state), strict=True):
                torch.testing.assert_close(part, reference, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("rows", [1, 3])
def test_onnx_step_gives_logits_states_and_greedy_tokens_of_the_model(exported: Exported, rows: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, folder = exported
    interface = json.loads((folder / "onnx/interface.json").read_text())
    session = onnxruntime.InferenceSession(folder / "onnx/step.onnx")
    for found, told in zip(session.get_inputs(), interface["step"]["inputs"], strict=True):
        assert (found.name, found.shape) == (told["name"], told["shape"])
        assert found.type == {"int64": "tensor(int64)", "float32": "tensor(float)"}[told["dtype"]]
    for found, told in zip(session.get_outputs(), interface["step"]["outputs"], strict=True):
        assert (found.name, found.shape) == (told["name"], told["shape"])
    feeds = [part["feeds"] for part in interface["step"]["outputs"][1:]]
    state = {name: part.numpy() for name, part in empty_state(interface, rows).items()}
    expected_state = model.init_state(rows)
    tokens = own = torch.randint(320, (rows,))
    with torch.inference_mode():
        for _ in range(STEPS):
            logits, *after = session.run(None, {"tokens": tokens.numpy(), **state})
            state = dict(zip(feeds, after, strict=True))
            expected, expected_state = model.step(own, expected_state)
            np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=LIMIT)
            tokens, own = torch.from_numpy(logits).argmax(1), expected.argmax(1)
            assert torch.equal(tokens, own)
    for part, reference in zip(state.values(), state_parts(expected_state), strict=True):
        np.testing.assert_allclose(part, reference.numpy(), rtol=0, atol=LIMIT)


def test_exported_multirate_step_gives_the_logits_of_the_model(tmp_path: Path) -> None:
    trained = CausalLM(tiny_config(kernel=FAMILIES["sgconv"](), d_model=32, n_layers=1)).eval()
    model = convert_model(trained, method="multirate")
    export_torch(whole(model), tmp_path)
    interface = json.loads((tmp_path / "export/interface.json").read_text())
    step = torch.export.load(tmp_path / "export/step.pt2").module()
    state, expected_state = [*empty_state(interface, 3).values()], model.init_state(3)
    with torch.inference_mode():
        for tokens in torch.randint(300, (STEPS, 3)):
            logits, *state = step(tokens, *state)
            expected, expected_state = model.step(tokens, expected_state)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    # The step in ONNX is the same, of the same window.
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(export_onnx(whole(model), tmp_path) / "step.onnx")
    feeds = {part.name: np.zeros([3, *part.shape[1:]], np.float32) for part in session.get_inputs()[1:]}
    logits, *_ = session.run(None, {"tokens": np.array([1, 2, 3]), **feeds})
    expected, _ = model.step(torch.tensor([1, 2, 3]), model.init_state(3))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=LIMIT)


def test_interface_lists_what_decoding_needs(exported: Exported) -> None:
    model, folder = exported
    for form, functions in (("export", {"step", "prefill"}), ("onnx", {"step"})):
        interface = json.loads((folder / form / "interface.json").read_text())
        assert interface["vocab_size"] == 320
        assert interface["tokenizer_size"] == tokenizer().size < 320
        assert interface["eos_id"] == tokenizer().eos_id
        assert interface["model_sha256"] == model_fingerprint(model)
        assert functions == {"step", "prefill"} & interface.keys()
        assert (folder / form / "tokenizer.json").read_text() == tokenizer().to_json()
        parts = empty_state(interface, 1)
        assert [part.numel() * 4 for part in parts.values()]
        assert [part.shape for part in parts.values()] == [p.shape for p in state_parts(model.init_state(1))]
        assert not any(part.any() for part in parts.values())


def test_onnx_of_poles_per_channel_holds_no_float64() -> None:
    onnx = pytest.importorskip("onnx")
    channels, modes = 1536, 16
    poles = torch.polar(torch.rand(channels, modes).double() * 0.9, torch.rand(channels, modes).double())
    residues = torch.randn(channels, 2, modes)
    params = SSMParams(torch.randn(channels, 4), torch.stack((poles.real, poles.imag), 1), residues)
    model = CausalLM(tiny_config(d_model=512, n_layers=1), [RecurrentConv(params)]).eval()
    written = onnx.load(export_onnx(whole(model), Path("out")) / "step.onnx")
    onnx.checker.check_model(written)
    assert not [p.name for p in written.graph.initializer if p.data_type == onnx.TensorProto.DOUBLE]
    assert "Cast" not in {node.op_type for node in written.graph.node}


def test_layers_without_a_state_have_no_inputs() -> None:
    def layer(taps: int) -> RecurrentConv:
        return RecurrentConv(
            SSMParams(torch.randn(96, taps), torch.zeros(2, 0).double(), torch.zeros(96, 2, 0))
        )

    for taps, names in (((1, 1), []), ((1, 3), ["layer1_window"])):
        model = CausalLM(tiny_config(d_model=32), [layer(number) for number in taps]).eval()
        folder = export_torch(whole(model), Path("out"))
        inputs = json.loads((folder / "interface.json").read_text())["step"]["inputs"]
        assert [part["name"] for part in inputs] == ["tokens", *names]
        step = torch.export.load(folder / "step.pt2").module()
        state = [torch.zeros(3, *part["shape"][1:]) for part in inputs[1:]]
        logits, *_ = step(torch.tensor([1, 2, 3]), *state)
        expected, _ = model.step(torch.tensor([1, 2, 3]), model.init_state(3))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def run_alone(code: str) -> str:
    """Return the output of a program that can't import tnnlm."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", ALONE + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_documented_programs_generate_the_same_text_without_tnnlm(script: Any) -> None:
    pytest.importorskip("onnxruntime")
    train(tiny_run("name=demo", "trainer.max_steps=20"), None)
    folder = Path("runs/demo/converted")
    # The export runs together with the conversion, or later on a converted folder.
    done = script("convert", "runs/demo", "--onnx")
    assert done.code == 0, done.err
    assert f"wrote {folder / 'onnx'}\n" in done.out
    assert script("convert", str(folder), "--export") == (0, f"wrote {folder / 'export'}\n", "")
    names = {"interface.json", "tokenizer.json"}
    assert {path.name for path in (folder / "export").iterdir()} == names | {"step.pt2", "prefill.pt2"}
    assert {path.name for path in (folder / "onnx").iterdir()} == names | {"step.onnx"}
    generator = TextGenerator(*load_converted(folder))
    prompt = "The statement is a statement. " * 20  # longer than one chunk
    record, pieces = generator.stream(generator.prefill([prompt]), 40, SamplingParams(temperature=0.0))
    "".join(pieces)
    assert len(SNIPPETS) == 2
    for snippet in SNIPPETS:
        printed = run_alone(snippet.replace("The first ", prompt) + "print(written)\n")
        assert printed == f"{record.text}\n{record.tokens}\n"
    # A new conversion deletes the exports of the old one.
    assert script("convert", "runs/demo", "--force").code == 0
    assert not (folder / "export").exists()
    assert not (folder / "onnx").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("out", "--export", "--verify"), "out: is already converted, --verify has no effect"),
        (("out", "--onnx", "--window-taps", "4"), "--window-taps has no effect"),
        (("out",), "add --compile, --export or --onnx"),
        (("text.txt", "--export"), "text.txt: is not a checkpoint"),
        (("elsewhere", "--export"), "elsewhere: no such run"),
    ],
)
def test_exports_that_cannot_be_made_are_reported(script: Any, words: tuple[str, ...], said: str) -> None:
    write_text()
    Path("out").mkdir()
    for name in ("config.json", "conversion.json"):
        (Path("out") / name).write_text("{}")
    done = script("convert", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_damaged_model_is_reported_and_not_exported(script: Any) -> None:
    Path("out").mkdir()
    for name in ("config.json", "conversion.json"):
        (Path("out") / name).write_text("{}")
    done = script("convert", "out", "--export")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is missing; convert again" in done.err
    assert not (Path("out") / "export").exists()


def test_missing_extra_is_reported_before_any_work(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--onnx: needs onnx and onnxscript; run: pip install"):
        export.check_onnx()
    done = script("convert", "runs/none", "--onnx")
    assert done.code == 2
    assert "-e '.[onnx]'" in done.err
