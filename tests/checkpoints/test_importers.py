"""Import of checkpoints of other implementations: logits, damaged and hostile files, and output folders."""

from __future__ import annotations

import builtins
import json
import math
import os
import pickle
import re
import threading
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.imported import (
    hyenadna_weights,
    stack_weights,
    tnn_weights,
    write_fairseq,
    write_tokenizer,
)
from tests.support.models import run_steps
from tests.support.reference import reference
from tests.support.scripts import ROOT
from tnnlm.checkpoints.importers.formats import Imported, import_checkpoint
from tnnlm.checkpoints.importers.run import write_run
from tnnlm.checkpoints.importers.source import read_weights
from tnnlm.checkpoints.importers.stripedhyena import modal_recurrence
from tnnlm.checkpoints.importers.vocabulary import load_tokenizer
from tnnlm.checkpoints.locate import load_trained
from tnnlm.conversion import convert_model
from tnnlm.errors import CheckpointError, ConfigError, UserError
from tnnlm.models.causal_lm import CausalLM


def model_of(imported: Imported) -> CausalLM:
    model = CausalLM(imported.config.model).eval()
    model.load_state_dict(imported.weights, assign=True)
    return model


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("prefix", ["decoder.", "", "model.decoder."])
def test_tnn_has_the_logits_of_the_authors(prefix: str, dtype: torch.dtype, atol: float) -> None:
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    save_file({key: tensor.to(dtype) for key, tensor in tnn_weights(prefix).items()}, "tnn.safetensors")
    imported = import_checkpoint(Path("tnn.safetensors"))
    assert imported.format == "tnn"
    logits = model_of(imported)(tensors["tokens"].long())
    assert logits.dtype == dtype
    largest = float(tensors["logits"].abs().max())
    torch.testing.assert_close(logits.double(), tensors["logits"], rtol=0, atol=atol * largest)


def test_fairseq_checkpoint_is_read_and_its_settings_are_those_of_the_authors() -> None:
    imported = import_checkpoint(write_fairseq(), overrides=["model.max_length=77"])
    model = imported.config.model
    assert (model.vocab_size, model.d_model, model.n_layers, model.expand) == (31, 8, 2, 3)
    assert (model.final_norm, model.embed_scale, model.max_length) == ("layer", True, 77)
    frozen = sum(tensor.numel() for name, tensor in imported.weights.items() if name.endswith(".decays"))
    assert imported.n_params == sum(tensor.numel() for tensor in imported.weights.values()) - frozen
    assert frozen > 0
    assert imported.config.model.kernel.decay == pytest.approx(0.99)  # type: ignore[attr-defined]


def dense(x: Tensor, k: Tensor) -> Tensor:
    """Return the causal convolution of x (B, L, E) with taps k (E, L), by sums over the lags."""
    length = x.shape[1]
    parts = [nn.functional.pad(x, (0, 0, lag, 0))[:, :length] * k[:, lag] for lag in range(k.shape[1])]
    return torch.stack(parts).sum(0)


def hyenadna(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the logits of HyenaDNA, from the formulas of arXiv 2302.10866 and 2306.15794."""

    def of(name: str) -> Tensor:
        return weights[f"model.backbone.{name}"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ of(f"{name}.weight").T + of(f"{name}.bias")

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * of(f"{name}.weight") + of(f"{name}.bias")

    length = tokens.shape[1]
    x = of("embeddings.word_embeddings.weight")[tokens]
    for index in range(2):
        layer, filters = f"layers.{index}", f"layers.{index}.mixer.filter_fn"
        u = linear(f"{layer}.mixer.in_proj", norm(f"{layer}.norm1", x))
        u = dense(u, of(f"{layer}.mixer.short_filter.weight")[:, 0].flip(1))
        x0, x1, v = (u + of(f"{layer}.mixer.short_filter.bias")).chunk(3, dim=-1)
        h = of(f"{filters}.pos_emb.z")[0, :length]
        for module in (0, 2, 4):
            frequency = of(f"{filters}.implicit_filter.{module + 1}.freq")
            h = torch.sin(frequency * linear(f"{filters}.implicit_filter.{module}", h))
        times = of(f"{filters}.pos_emb.t")[0, :length]
        window = torch.exp(-times * of(f"{filters}.modulation.deltas")[0].abs()) + 0.05
        k = (h @ of(f"{filters}.implicit_filter.6.weight").T * window).T
        y = dense(v * x1, k) + of(f"{filters}.bias") * v * x1
        x = x + linear(f"{layer}.mixer.out_proj", x0 * y)
        a = linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x))
        gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + linear(f"{layer}.mlp.fc2", gelu)
    return norm("ln_f", x) @ of("embeddings.word_embeddings.weight").T


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_hyenadna_tiny_has_the_logits_of_its_formulas(dtype: torch.dtype, atol: float) -> None:
    weights = {name: tensor.to(dtype).double() for name, tensor in hyenadna_weights().items()}
    torch.save({"state_dict": {name: t.to(dtype) for name, t in weights.items()}}, "weights.ckpt")
    imported = import_checkpoint(Path("weights.ckpt"))
    assert (imported.format, imported.config.model.max_length) == ("hyenadna", 1026)
    tokens = torch.randint(7, 12, (1, 50))
    logits, expected = model_of(imported)(tokens).double(), hyenadna(weights, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol * float(expected.abs().max()))


def test_hyenadna_converts_and_decodes_with_its_tokenizer() -> None:
    weights = hyenadna_weights(8, length=40, width=6)
    torch.save({"state_dict": weights}, "weights.ckpt")
    model = model_of(import_checkpoint(Path("weights.ckpt")))
    tokens = torch.randint(7, 12, (2, 40))
    converted = convert_model(model, method="window")
    stepped, _ = run_steps(converted, tokens, converted.init_state(2))
    torch.testing.assert_close(stepped, hyenadna(weights, tokens), rtol=0, atol=1e-10)
    tokenizer = load_tokenizer("hyenadna", None, None)
    assert tokenizer.encode("ACGTNacgt") == [7, 8, 9, 10, 11, 6, 6, 6, 6]
    assert (tokenizer.decode([7, 8, 9, 10, 11]), tokenizer.eos_id, tokenizer.size) == ("ACGTN", 1, 12)


def test_hyena_operators_of_another_order_are_refused() -> None:
    weights = hyenadna_weights(8, length=40, width=6)
    weights["model.backbone.layers.0.mixer.in_proj.weight"] = torch.ones(32, 8)
    torch.save(weights, "order3.pt")
    with pytest.raises(CheckpointError, match="order 3, and order 2 is supported"):
        import_checkpoint(Path("order3.pt"))


def stack(weights: dict[str, Tensor], k: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits of a stack of layers in the repository of S4 with the taps k (E, L)."""
    norm = partial(nn.functional.layer_norm, normalized_shape=(len(k),))
    x = weights["encoder.0.weight"][tokens]
    for index in range(2):
        layer = f"model.layers.{index}."
        u = norm(x, weight=weights[f"{layer}norm.norm.weight"], bias=weights[f"{layer}norm.norm.bias"])
        y = nn.functional.gelu(dense(u, k)) @ weights[f"{layer}layer.output_linear.0.weight"].T
        y = y + weights[f"{layer}layer.output_linear.0.bias"]
        x = x + (nn.functional.glu(y) if y.shape[-1] > len(k) else y)
    x = norm(x, weight=weights["model.norm.norm.weight"], bias=weights["model.norm.norm.bias"])
    return x @ weights["encoder.0.weight"].T


@pytest.mark.parametrize(
    ("case", "method", "gated"),
    [
        ("sgconv_pow2", "window", False),
        ("rtf", "companion", True),
        ("rtf_shared", "companion", False),
        ("rtf_odd_length", "companion", True),
    ],
)
def test_stacks_have_the_logits_of_the_authors_kernels_and_decode(
    case: str, method: str, gated: bool
) -> None:
    tensors, metadata = reference(case)
    overrides: list[str] = []
    if case == "sgconv_pow2":
        inner, k = "", tensors["kernel"][0].clone()
        conv = {name.removeprefix("weights."): t for name, t in tensors.items() if "weights" in name}
        k[:, 0] += conv["D"][0]
    else:
        inner, k = "layer.", tensors["kernel"]
        conv = {name: tensors[name] for name in ("ab", "h_0")}
        length = int(metadata["trunc_len"])
        overrides = [f"model.max_length={length + length % 2}"]
    weights = stack_weights({f"{inner}{name}": t for name, t in conv.items()}, len(k), gated=gated)
    torch.save({"state_dict": weights}, "stack.ckpt")
    imported = import_checkpoint(Path("stack.ckpt"), overrides=overrides)
    assert imported.format == case.partition("_")[0]
    tokens = torch.randint(31, (2, k.shape[1]))
    expected = stack(weights, k, tokens)
    model = model_of(imported)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-11)
    single = CausalLM(imported.config.model)
    single.load_state_dict(imported.weights)
    error = (single.eval()(tokens).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6  # float32
    converted = convert_model(model, method=method, horizon=k.shape[1])
    stepped, _ = run_steps(converted, tokens, converted.init_state(2))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-8)


def test_modal_filter_of_stripedhyena_is_a_recurrence() -> None:
    tensors, _ = reference("stripedhyena_modal")
    params = modal_recurrence(tensors["poles"], tensors["residues"], tensors["D"])
    taps = tensors["h"].clone()
    taps[:, 0] += tensors["D"]
    torch.testing.assert_close(params.taps(64), taps, rtol=0, atol=1e-13)
    prefilled, _ = params.prefill(tensors["x"], params.init_state(1))
    torch.testing.assert_close(prefilled, tensors["y"], rtol=0, atol=1e-12)
    state, outputs = params.init_state(1), []
    for x in tensors["x"].unbind(1):
        y, state = params.step(x, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), tensors["y"], rtol=0, atol=1e-12)
    shared = modal_recurrence(tensors["poles"][:1], tensors["residues"][:1], tensors["D"])
    torch.testing.assert_close(shared.taps(9)[2, 1:], tensors["h"][0, 1:9], rtol=0, atol=1e-13)
    with pytest.raises(CheckpointError, match="4 systems"):
        modal_recurrence(tensors["poles"], tensors["residues"], tensors["D"][:3])
    with pytest.raises(CheckpointError, match="must be"):
        modal_recurrence(tensors["poles"][:, :2], tensors["residues"], tensors["D"])


def test_whole_stripedhyena_is_refused_with_the_way_for_its_filters() -> None:
    tensors, _ = reference("stripedhyena_modal")
    save_file({"blocks.0.filter.poles": tensors["poles"]}, "striped.safetensors")
    with pytest.raises(CheckpointError, match="modal_recurrence"):
        import_checkpoint(Path("striped.safetensors"))


def test_length_that_the_weights_do_not_show_is_required() -> None:
    tensors, _ = reference("rtf")
    torch.save(stack_weights({"ab": tensors["ab"], "h_0": tensors["h_0"]}, 6, gated=False), "rtf.pt")
    with pytest.raises(ConfigError, match=r"model\.max_length: is not in the weights of rtf\.pt"):
        import_checkpoint(Path("rtf.pt"))


@pytest.mark.parametrize("key", ["(layers.0.token_mixer.toep.x", f"layers.{9 * 10**20}.token_mixer.toep.x"])
def test_hostile_keys_are_refused(key: str) -> None:
    save_file({key: torch.ones(2), **tnn_weights("")}, "keys.safetensors")
    with pytest.raises(CheckpointError, match="keys"):
        import_checkpoint(Path("keys.safetensors"))


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


def test_all_missing_keys_are_counted_beside_other_problems() -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in ("embed_tokens.weight", "layers.0.token_mixer.u_proj.weight", "layer_norm.weight"):
            del weights[f"decoder.{name}"]
        for name in [name for name in weights if "layers.1.feature_mixer" in name]:
            del weights[name]
        weights["decoder.extra"] = torch.ones(2)

    message = damaged(change)
    assert "it lacks decoder.embed_tokens.weight, decoder.layer_norm.weight, " in message
    assert " and 4 more, it has the unexpected decoder.extra" in message


def test_entries_that_are_no_floating_point_tensors_are_refused() -> None:
    bias = "decoder.layers.1.token_mixer.o.bias"
    integers = torch.ones(8, dtype=torch.int64)
    assert f"not of floating point are {bias} (int64)" in damaged(
        lambda weights: weights.update({bias: integers})
    )
    torch.save({"model": {**tnn_weights(), bias: [0.0] * 8}}, "list.pt")
    with pytest.raises(CheckpointError, match=rf"it lacks {bias} \(is not a tensor\)"):
        import_checkpoint(Path("list.pt"))


def test_weights_that_are_not_finite_and_untied_heads_are_refused() -> None:
    key = "decoder.layers.0.token_mixer.o.bias"
    assert f"{key} is not finite" in damaged(lambda weights: weights[key].fill_(torch.nan))
    head = {"decoder.output_projection.weight": torch.ones(31, 8, dtype=torch.float64)}
    assert "only tied heads" in damaged(lambda weights: weights.update(head))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1).expand(10**6, 10**6), "larger shape than its storage"),
        (torch.ones(2, device="meta"), "not a dense tensor"),
        (torch.ones(2, 2).to_sparse(), "not a dense tensor"),
        (torch.ones(2, dtype=torch.complex64), "not a dense tensor"),
        (torch.ones(0, 8), "none of size 0"),
        (torch.ones(8), "2 axes"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tensor: Tensor, reason: str) -> None:
    torch.save({"model": {**tnn_weights(), "decoder.embed_tokens.weight": tensor}}, "odd.pt")
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(Path("odd.pt"))


def test_container_that_contains_itself_and_keys_of_two_lines_are_refused() -> None:
    data: dict[str, Any] = {"step": 1}
    data["model"] = data
    torch.save(data, "cycle.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_weights(Path("cycle.pt"))
    torch.save({"a\nb": torch.ones(2)}, "lines.pt")
    with pytest.raises(CheckpointError, match="not printable") as refused:
        read_weights(Path("lines.pt"))
    assert "\n" not in str(refused.value)


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


def test_two_threads_read_options_at_once() -> None:
    source = write_fairseq()
    errors: list[str] = []

    def read() -> None:
        try:
            for _ in range(50):
                read_weights(source)
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


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


def test_weights_of_8_bits_are_imported_in_float32() -> None:
    weights = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tnn_weights().items()}
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    save_file(weights, "tnn.safetensors")
    imported = import_checkpoint(Path("tnn.safetensors"))
    expected = weights["decoder.embed_tokens.weight"].float()
    torch.testing.assert_close(imported.weights["embedding.weight"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [1.5, 0.0, -0.5])
def test_a_decay_of_any_channel_and_layer_that_is_out_of_range_is_refused(decay: float) -> None:
    weights = tnn_weights()
    key = "decoder.layers.1.token_mixer.toep.gamma"
    weights[key].flatten()[-1] = decay
    save_file(weights, "tnn.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} has decays that are not above 0 and at most 1"):
        import_checkpoint(Path("tnn.safetensors"))


def test_documented_keys_are_those_of_the_formats() -> None:
    page = (ROOT / "docs/how-to/import.md").read_text(encoding="utf-8")
    section = page.partition("## Keys and shapes\n")[2].partition("## Tokenizer")[0]
    names = re.findall(r"`(\w[\w.]*(?:\.\*)?)`", section)
    pattern = {
        name: re.escape(name)
        .replace(r"\.\*", r"\.(weight|bias)")
        .replace(r"\.N\.", r"\.\d+\.")
        .replace(r"\.M", r"\.\d+")
        for name in names
        if "." in name.removesuffix(".*") or name.endswith(".*")
    }
    keys = {*tnn_weights(""), *hyenadna_weights()}
    weights, (rtf, _) = reference("sgconv_pow2")[0], reference("rtf")
    sgconv = {name.removeprefix("weights."): t for name, t in weights.items() if name.startswith("weights.")}
    keys |= {*stack_weights(sgconv, 5, gated=True)}
    keys |= {*stack_weights({f"layer.{name}": rtf[name] for name in ("ab", "h_0")}, 6, gated=True)}
    shown = {key: [name for name in pattern if re.fullmatch(f"(.*\\.)?{pattern[name]}", key)] for key in keys}
    assert {name for found in shown.values() for name in found} == set(pattern)
    tied_or_ignored = r"(.*\.)?(lm_head\.weight|decoder\.0\..*|kernel_norm_initialized|pos_emb\.t)"
    assert all(found or re.fullmatch(tied_or_ignored, key) for key, found in shown.items())
