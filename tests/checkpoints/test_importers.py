"""Import of checkpoints of other implementations: logits, damaged and hostile files, and output folders."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.imported import tnn_weights, write_fairseq, write_tokenizer
from tests.support.reference import reference
from tnnlm.checkpoints.importers.formats import Imported, import_checkpoint
from tnnlm.checkpoints.importers.run import write_run
from tnnlm.checkpoints.importers.source import read_weights
from tnnlm.checkpoints.importers.vocabulary import load_tokenizer
from tnnlm.checkpoints.locate import load_trained
from tnnlm.errors import CheckpointError, UserError
from tnnlm.models.causal_lm import CausalLM


def model_of(imported: Imported) -> CausalLM:
    model = CausalLM(imported.config.model).eval()
    model.load_state_dict(imported.weights, assign=True)
    return model


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prefix", ["decoder.", "", "model.decoder."])
def test_tnn_has_the_logits_of_the_authors(prefix: str, dtype: torch.dtype, atol: float) -> None:
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    save_file({key: tensor.to(dtype) for key, tensor in tnn_weights(prefix).items()}, "tnn.safetensors")
    imported = import_checkpoint(Path("tnn.safetensors"))
    assert imported.format == "tnn"
    logits = model_of(imported)(tensors["tokens"].long())
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), tensors["logits"], rtol=0, atol=atol)


def test_fairseq_checkpoint_is_read_and_its_settings_are_those_of_the_authors() -> None:
    imported = import_checkpoint(write_fairseq(), overrides=["model.max_length=77"])
    model = imported.config.model
    assert (model.vocab_size, model.d_model, model.n_layers, model.expand) == (31, 8, 2, 3)
    assert (model.final_norm, model.embed_scale, model.max_length) == ("layer", True, 77)
    assert imported.config.model.kernel.decay == pytest.approx(0.99)  # type: ignore[attr-defined]


class Call:
    """Object whose pickle calls a function when it is loaded without protection."""

    def __init__(self, function: Callable[..., Any], *words: Any) -> None:
        self.call = function, words

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (builtins.eval, "eval"), (Path, "Path"), (os.mkdir, "mkdir")],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_not_called(
    function: Callable[..., Any], name: str, nested: bool, protocol: int
) -> None:
    word = "open('called', 'w')" if name == "eval" else "touch called" if name == "system" else "called"
    inner = Call(function, word)
    data = {"args": Namespace(hook=inner) if nested else inner, "model": tnn_weights()}
    torch.save(data, "hostile.pt", pickle_protocol=protocol)
    before = sorted(os.listdir())
    with pytest.raises(CheckpointError) as refused:
        read_weights(Path("hostile.pt"))
    if protocol == 2:  # torch reads no name from a later protocol, which it refuses as a whole
        assert name in str(refused.value), refused.value
    assert "\n" not in str(refused.value)
    assert sorted(os.listdir()) == before


def test_code_in_a_plain_pickle_is_not_called() -> None:
    Path("plain.pt").write_bytes(pickle.dumps({"model": Call(os.system, "touch called")}))
    with pytest.raises(CheckpointError):
        read_weights(Path("plain.pt"))
    assert not Path("called").exists()


def damaged(change: Callable[[dict[str, Tensor]], Any]) -> str:
    weights = tnn_weights()
    change(weights)
    save_file(weights, "damaged.safetensors")
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(Path("damaged.safetensors"))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("damaged.safetensors: ")
    return message


def test_missing_unexpected_and_misshapen_keys_are_listed() -> None:
    bias, norm = "decoder.layers.1.token_mixer.o.bias", "decoder.layer_norm.weight"
    assert damaged(lambda weights: weights.pop(bias)).endswith(f"it lacks {bias}")
    assert damaged(lambda weights: weights.pop(norm)).endswith(f"it lacks {norm}")
    assert "lacks decoder.embed_tokens.weight" in damaged(lambda w: w.pop("decoder.embed_tokens.weight"))
    extra = {"decoder.layers.1.self_attn.k_proj.weight": torch.ones(2)}
    assert next(iter(extra)) in damaged(lambda weights: weights.update(extra))
    message = damaged(lambda weights: weights.update({bias: torch.ones(5), **extra}))
    assert f"{bias} ([5] instead of [8])" in message
    assert "unexpected" in message
    part = "decoder.layers.0.feature_mixer.l2.bias"
    assert "layers.0.feature_mixer.l1.bias" in damaged(lambda weights: weights.update({part: torch.ones(3)}))


def test_weights_that_are_not_finite_and_untied_heads_are_refused() -> None:
    key = "decoder.layers.0.token_mixer.o.bias"
    assert f"{key} is not finite" in damaged(lambda weights: weights[key].fill_(torch.nan))
    head = {"decoder.output_projection.weight": torch.ones(31, 8, dtype=torch.float64)}
    assert "only tied heads" in damaged(lambda weights: weights.update(head))


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(name: str, share: float) -> None:
    path = Path(name)
    if path.suffix == ".pt":
        write_fairseq(path)
    else:
        save_file(tnn_weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)


def test_changed_byte_of_a_weight_is_noticed() -> None:
    path = write_fairseq()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(path)


def test_files_without_known_weights_are_refused() -> None:
    torch.save({"step": 3, "names": ["a"]}, "none.pt")
    torch.save([1, 2], "list.pt")
    save_file({"encoder.attention.weight": torch.ones(2, 2)}, "other.safetensors")
    for name, reason in (
        ("none.pt", "holds no weights"),
        ("list.pt", "holds no weights"),
        ("other.safetensors", "encoder.attention.weight"),
        ("absent.pt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            import_checkpoint(Path(name))


def test_two_imports_to_one_folder_have_one_winner() -> None:
    source = write_fairseq()
    tokenizer = load_tokenizer("tnn", write_tokenizer(31), None)
    results: list[str] = []
    start = threading.Barrier(2)

    def write() -> None:
        start.wait()
        try:
            write_run(Path("runs/tnn"), source, import_checkpoint(source), tokenizer)
            results.append("written")
        except UserError as error:
            results.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("written") == 1
    assert "runs/tnn" in next(result for result in results if result != "written")
    assert load_trained("runs/tnn").model.config.n_layers == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tnn"]


def test_run_records_the_origin_of_its_weights() -> None:
    source = write_fairseq()
    tokenizer = load_tokenizer("tnn", write_tokenizer(31), None)
    write_run(Path("runs/tnn"), source, import_checkpoint(source), tokenizer)
    record = json.loads(Path("runs/tnn/import.json").read_text())
    assert (record["format"], record["source"], len(record["sha256"])) == ("tnn", source.name, 64)
