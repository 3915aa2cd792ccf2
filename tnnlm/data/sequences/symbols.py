"""Tokenizers of labelled sequences: an entry per symbol, behind the one that pads. They learn nothing."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tnnlm.data.sequences.listops import SYMBOLS
from tnnlm.tokenizer import TextTokenizer


def symbol_tokenizer(task: str, pad_token: str) -> TextTokenizer:
    """Text to the tokens that a classifier of ``task`` reads: symbol + 1.

    Expressions are split at blanks and lose their parentheses; anything else is taken byte by byte.
    """
    tokenizer = _words(pad_token) if task == "listops" else _bytes(pad_token)
    return TextTokenizer(tokenizer, pad_token)


def _words(pad_token: str) -> Tokenizer:
    names = (pad_token, *SYMBOLS)
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=pad_token))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(sign, " ") for sign in "()"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _bytes(pad_token: str) -> Tokenizer:
    # Byte-level tokenizers write bytes as characters: printable ones as they are, the others, in order, as
    # those from 256 on.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    entries = {pad_token: 0} | {written[byte]: byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=entries, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
