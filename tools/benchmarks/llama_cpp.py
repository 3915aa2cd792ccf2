"""Baseline llama.cpp: a Llama with random weights (GGUF), run through the C API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.subjects import CHUNK, WIDTHS, peer_shape
from experiments.timing import Stepper, Subject, random_tokens
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError
from tnnlm.machine.threads import user_environment

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}
"""Weight dtypes by llama.cpp's names; its keys and values are float16 with all of them."""
_Q8_BYTES = 34 / 32
"""Bytes per Q8_0 weight: a block has 32 integers and a float16 scale."""


def llama_cpp(dtype: str, shape: ModelConfig, longest: int, rows: int, folder: Path) -> Subject:
    """Return a Llama in llama.cpp with about as many weights per token as a tnnlm model.

    Args:
        dtype: One of ``DTYPES``.
        shape: Configuration of the tnnlm model.
        longest: Longest context in tokens.
        rows: Largest number of sequences in a batch.
        folder: Folder for the GGUF file.

    Raises:
        UserError: If ``gguf`` or ``llama_cpp`` is not installed.
    """
    try:
        import gguf  # noqa: F401

        # Its OpenMP, if it is not the one of PyTorch, then waits as it does by default.
        with patch.dict(os.environ, user_environment(), clear=True):
            import llama_cpp as library
    except (ImportError, OSError) as error:
        raise UserError(f"not installed ({error}); run: pip install gguf llama-cpp-python") from None
    path = folder / f"llama-{dtype}.gguf"
    weights = write_gguf(path, dtype, shape, longest)
    runner = _Runner(library, path, shape, longest + 8, rows)

    def step_at(batch: int, context: int) -> Stepper:
        runner.read(random_tokens(1, context, shape.vocab_size), batch)
        return Stepper(lambda: runner.step(batch, context), lambda: runner.cut(batch, context))

    def size(context: int) -> int:
        return 2 * 2 * shape.n_layers * shape.d_model * context

    width = _Q8_BYTES if dtype == "int8" else WIDTHS[dtype]
    return Subject(
        f"llama.cpp-{DTYPES[dtype]}", dtype, round(weights * width), step_at, runner.read, size, longest
    )


def write_gguf(path: Path, dtype: str, shape: ModelConfig, longest: int) -> int:
    """Write a Llama with random weights and tied embeddings; return its weights per token."""
    import gguf

    width, hidden = shape.d_model, peer_shape("llama", shape, longest).glu_dim or 0
    heads = max(1, width // 64)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(longest + 8)
    writer.add_embedding_length(width)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocab_size)
    _add_vocabulary(writer, shape.vocab_size)
    random = np.random.default_rng(0)
    weights = 0

    def matrix(name: str, rows: int, columns: int) -> None:
        nonlocal weights
        weights += rows * columns
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        data = values if dtype == "float32" else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    matrix("token_embd", shape.vocab_size, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(shape.n_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{layer}.{name}", hidden, width)
        matrix(f"blk.{layer}.ffn_down", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _add_vocabulary(writer: Any, size: int) -> None:
    """Add a vocabulary of special tokens, bytes and numbered words, which a server needs to return text."""
    import gguf

    kinds = gguf.TokenType
    special = (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL))
    entries = [*special, *((f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256))]
    entries += [(f"\u2581w{number}", kinds.NORMAL) for number in range(max(0, size - len(entries)))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in entries[:size]])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in entries[:size]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


class _Runner:
    """Model and batch of llama.cpp's C API, with one call from Python per step."""

    def __init__(self, library: Any, path: Path, shape: ModelConfig, context: int, rows: int) -> None:
        self._library = library
        quiet = library.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # C holds no reference to the callback
        library.llama_log_set(quiet, ctypes.c_void_p(0))
        library.llama_backend_init()
        options = library.llama_model_default_params()
        options.use_mmap = False
        self._model = library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise UserError(f"{path.name}: llama.cpp cannot load it")
        settings = library.llama_context_default_params()
        settings.n_ctx = rows * max(context, 256)
        settings.n_seq_max = rows
        settings.kv_unified = False  # in a unified cache, attention of a row would scan the keys of all rows
        settings.n_batch = settings.n_ubatch = max(CHUNK, rows)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(f"llama.cpp: cannot create a context of {settings.n_ctx} tokens")
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(max(CHUNK, rows), 0, 1)

    def read(self, prompt: Tensor, rows: int = 1) -> None:
        """Clear the cache and prefill a prompt (1, L) in every row; a chunk has logits for its last token."""
        self._library.llama_memory_clear(self._memory, True)
        for row in range(rows):
            for start, chunk in enumerate(prompt[0].split(CHUNK)):
                tokens, last = chunk.tolist(), len(chunk) - 1
                entries = [(token, start * CHUNK + i, row, i == last) for i, token in enumerate(tokens)]
                self._decode(entries)

    def step(self, batch: int, context: int) -> None:
        """Decode one token in every row."""
        self._decode([(0, context, row, True) for row in range(batch)])

    def cut(self, batch: int, context: int) -> None:
        """Remove the positions from ``context`` on from the cache."""
        for row in range(batch):
            self._library.llama_memory_seq_rm(self._memory, row, context, -1)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, row, logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = logits
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode: {code}")
