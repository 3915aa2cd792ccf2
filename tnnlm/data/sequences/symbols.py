"""Fixed tokenizers of the classification tasks: id 0 is padding, and each symbol has its number plus one."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tnnlm.data.sequences.listops import SYMBOLS
from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer


def symbol_tokenizer(task: str, pad_token: str) -> TextTokenizer:
    """Return the tokenizer of a classification task.

    ListOps expressions are split at whitespace, and their parentheses are dropped; all other tasks use one
    token per byte.

    Args:
        task: Name of a task in ``SEQUENCE_TASKS``.
        pad_token: Padding token, id 0.

    Raises:
        DataError: If the padding token is a symbol.
    """
    return TextTokenizer(_words(pad_token) if task == "listops" else _bytes(pad_token), pad_token)


def _check_padding(pad_token: str, symbols: Collection[str]) -> None:
    if pad_token in symbols:
        raise DataError(f"data.eos_token={pad_token}: is a symbol of the task", "set another token")


def _words(pad_token: str) -> Tokenizer:
    _check_padding(pad_token, SYMBOLS)
    names = (pad_token, *SYMBOLS)
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=pad_token))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(sign, " ") for sign in "()"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _bytes(pad_token: str) -> Tokenizer:
    # ByteLevel's byte-to-unicode table: printable bytes map to themselves, the others in order to code points
    # from 256 upwards.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    _check_padding(pad_token, written.values())
    entries = {pad_token: 0} | {written[byte]: byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=entries, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
