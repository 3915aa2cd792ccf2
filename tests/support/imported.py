"""Checkpoints of other implementations, and tokenizers for them, for the tests of the import."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from string import ascii_letters

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.support.reference import reference

PARTS = ("weight", "bias")
PLACES = {"logits", "tokens", "features_before_norm"}
"""Tensors of the reference case of a TNN that are no weights."""


def tnn_weights(prefix: str = "decoder.") -> dict[str, Tensor]:
    """Return the weights of the reference TNN language model, named as fairseq does."""
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items() if key not in PLACES}


def write_fairseq(path: Path = Path("checkpoint_best.pt")) -> Path:
    """Write the reference TNN language model as fairseq does, with its options and the state of training."""
    weights = {**tnn_weights(), "decoder.version": torch.tensor([3.0])}
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    torch.save(
        {
            "args": Namespace(arch="tnn", gamma=0.99),
            "model": weights,
            "optimizer_history": [{"num_updates": 7, "lr_scheduler_state": {"best": None}}],
            "extra_state": {"epoch": 1, "val_loss": 2.0},
        },
        path,
    )
    return path


def write_tokenizer(size: int, path: Path = Path("tokenizer.json")) -> Path:
    """Write a tokenizer of single letters with ``size`` tokens, of which the last is <|endoftext|>."""
    letters = ascii_letters[: size - 1]
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def random_weights(shapes: dict[str, tuple[int, ...]], scale: float = 0.3) -> dict[str, Tensor]:
    """Return random weights in float64, around 1 for the scales of norms."""
    norms = ("norm.weight", "norm1.weight", "norm2.weight", "ln_f.weight")
    return {
        name: scale * torch.randn(shape, dtype=torch.float64) + float(name.endswith(norms))
        for name, shape in shapes.items()
    }


def hyenadna_weights(
    d_model: int = 128, n_layers: int = 2, length: int = 1026, width: int = 64
) -> dict[str, Tensor]:
    """Return random weights with the keys and, by default, the sizes of the published HyenaDNA tiny-1k."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (16, d_model),
        "ln_f.weight": (d_model,),
        "ln_f.bias": (d_model,),
    }
    for index in range(n_layers):
        layer = f"layers.{index}."
        filters = f"{layer}mixer.filter_fn."
        shapes |= {f"{layer}{name}.{part}": (d_model,) for name in ("norm1", "norm2") for part in PARTS}
        for name, rows, columns in (
            ("mixer.in_proj", 3 * d_model, d_model),
            ("mixer.out_proj", d_model, d_model),
            ("mlp.fc1", 4 * d_model, d_model),
            ("mlp.fc2", d_model, 4 * d_model),
            ("mixer.filter_fn.implicit_filter.0", width, 5),
            ("mixer.filter_fn.implicit_filter.2", width, width),
            ("mixer.filter_fn.implicit_filter.4", width, width),
        ):
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
        shapes |= {f"{layer}mixer.short_filter.weight": (3 * d_model, 1, 3)}
        shapes |= {f"{layer}mixer.short_filter.bias": (3 * d_model,)}
        shapes |= {f"{filters}implicit_filter.{module}.freq": (1, width) for module in (1, 3, 5)}
        shapes |= {f"{filters}implicit_filter.6.weight": (d_model, width), f"{filters}bias": (d_model,)}
        shapes |= {f"{filters}modulation.deltas": (1, 1, d_model), f"{filters}pos_emb.z": (1, length, 5)}
    weights = random_weights(shapes, d_model**-0.5)
    for index in range(n_layers):
        times = torch.linspace(0, 1, length, dtype=torch.float64)[None, :, None]
        weights[f"layers.{index}.mixer.filter_fn.pos_emb.t"] = times
        rates = torch.linspace(-3.0, -15.0, d_model, dtype=torch.float64)[None, None]
        weights[f"layers.{index}.mixer.filter_fn.modulation.deltas"] = rates
    named = {f"model.backbone.{name}": tensor for name, tensor in weights.items()}
    return {**named, "model.lm_head.weight": weights["embeddings.word_embeddings.weight"].clone()}


def stack_weights(conv: dict[str, Tensor], d_model: int, *, gated: bool) -> dict[str, Tensor]:
    """Return two layers with the same convolution, random otherwise, named as in the repository of S4."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.0.weight": (31, d_model)}
    shapes |= {f"model.norm.norm.{part}": (d_model,) for part in PARTS}
    rows = 2 * d_model if gated else d_model
    for index in range(2):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}norm.norm.{part}": (d_model,) for part in PARTS}
        shapes |= {f"{layer}layer.output_linear.0.weight": (rows, d_model)}
        shapes |= {f"{layer}layer.output_linear.0.bias": (rows,)}
    weights = random_weights(shapes)
    for index in range(2):
        weights |= {f"model.layers.{index}.layer.{name}": tensor.clone() for name, tensor in conv.items()}
    return {**weights, "decoder.0.output_transform.weight": weights["encoder.0.weight"].clone()}
