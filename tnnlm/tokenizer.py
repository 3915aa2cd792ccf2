"""Tokenizers: byte-level BPE trained with ``tokenizers``, or loaded from a file or the Hugging Face Hub.

Only loading from the hub needs a network connection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tnnlm.detokenizer import Detokenizer, TextStream
from tnnlm.errors import DataError
from tnnlm.reading import read_bytes

LONGEST_WORD = 1_000
"""Bytes of a word that the training of a tokenizer reads as one; each merge moves the rest of its word."""
_PARTS = pre_tokenizers.Split(Regex(f"[\\s\\S]{{1,{LONGEST_WORD}}}"), "isolated")


class TextTokenizer:
    """Tokenizer with an end-of-document token."""

    chat_template: str | None = None
    """Jinja template of conversations, as in the entry of this name in Transformers' tokenizer_config.json;
    None if the tokenizer has none."""

    def __init__(self, tokenizer: Tokenizer, eos_token: str, where: str = "tokenizer") -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"{where}: has no token {eos_token!r}", "set its end token with data.eos_token=..."
            )
        # The literal string of the end token inside a document must not be encoded as the end token.
        tokenizer.add_special_tokens([eos_token])
        tokenizer.encode_special_tokens = True
        # Truncation and padding settings of a published tokenizer.json would cut and pad documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.size = int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1
        """Highest token id plus one: the minimum number of rows of an embedding."""
        self.detokenizer = Detokenizer(tokenizer)

    @classmethod
    def from_json(cls, text: str, eos_token: str, where: str = "tokenizer.json") -> TextTokenizer:
        """Parse the contents of a tokenizer.json.

        Args:
            text: Contents of the file.
            eos_token: End-of-document token, such as ``<|endoftext|>``.
            where: Place that error messages start with, usually the path.

        Raises:
            DataError: If ``text`` isn't a valid tokenizer.json or has no ``eos_token``.
        """
        return cls(_parsed(text, where), eos_token, where)

    @property
    def fingerprint(self) -> str:
        """SHA-256 hash of tokenizer.json: tokenizers with equal fingerprints produce equal token ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def ids_fingerprint(self) -> str:
        """SHA-256 hash of tokenizer.json without its post-processor.

        The post-processor only adds special tokens, which :meth:`encode` disables, and Transformers replaces
        it when it saves a tokenizer.
        """
        content = json.loads(self.to_json())
        del content["post_processor"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the contents of tokenizer.json."""
        return str(self.tokenizer.to_str(pretty=False))

    def with_special(self, token: str) -> TextTokenizer:
        """Add a special token, if it is new, to this tokenizer in place, and return the result.

        The literal string of the token in a document is still encoded as ordinary text.

        Raises:
            DataError: If the vocabulary contains it as ordinary text.
        """
        _check_not_text(self.tokenizer, token, "data.mask_token")
        self.tokenizer.add_special_tokens([token])
        return TextTokenizer(self.tokenizer, self.eos_token)

    def id_of(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            DataError: If the vocabulary doesn't contain the token.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"tokenizer: has no token {token!r}")
        return int(found)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of ``text``, without special tokens added.

        With ``parse_special``, the names of special tokens are encoded as these tokens, so that the text can
        end a document.
        """
        tokenizer = self._parsing if parse_special else self.tokenizer
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of ``text``, and the first character and the end of each token.

        Tokens that share a character, of which each has some bytes, have the same place.
        """
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return list(found.ids), list(found.offsets)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each string, tokenized in parallel on all cores."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], started: bool = False) -> str:
        """Return the decoded string; special tokens are skipped.

        ``started`` tells whether other tokens precede ``ids``; some tokenizers omit a space at the beginning.
        """
        return self.detokenizer.decode(ids, started)

    def stream(self, ids: Iterable[int], started: bool = False) -> Iterator[str]:
        """Yield decoded text for a stream of token ids, in chunks of complete UTF-8 characters.

        If the last token ends in the middle of a character, its bytes become U+FFFD, as in :meth:`decode`.
        """
        stream = TextStream(self.detokenizer, started)
        yield from filter(None, map(stream.push, ids))
        if rest := stream.finish():
            yield rest

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token that stands for characters outside of the vocabulary; None if there is none."""
        model = self.tokenizer.model
        if isinstance(model, models.Unigram):
            return json.loads(self.to_json())["model"]["unk_id"]
        return None if model.unk_token is None else self.tokenizer.token_to_id(model.unk_token)

    @cached_property
    def _parsing(self) -> Tokenizer:
        # A copy, because the setting belongs to the tokenizer, which other threads use at the same time.
        tokenizer = Tokenizer.from_str(self.to_json())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def missing_ids(self, vocab_size: int) -> list[int]:
        """Return the ids below ``vocab_size`` without a token, such as padding of an embedding, ascending."""
        return sorted({*range(vocab_size)} - {*self.tokenizer.get_vocab(with_added_tokens=True).values()})


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    eos_token: str,
    n_texts: int,
    progress: bool,
    mask_token: str | None = None,
) -> TextTokenizer:
    """Train a byte-level BPE tokenizer.

    The time grows linearly with the text: of a word (a run of letters, digits, signs or spaces) longer than
    ``LONGEST_WORD`` bytes, such as a line of DNA, each part of this length is trained on as a word. Text is
    encoded without this limit.

    Args:
        ``texts``: Documents of the training split.
        vocab_size: Maximum vocabulary size, special tokens included; at least 257, because all 256 bytes are
            entries: bytes outside the vocabulary would be dropped silently.
        eos_token: End-of-document token.
        n_texts: Number of documents, for the progress bar.
        progress: Show a progress bar on stderr.
        mask_token: Mask token for masked language modelling, if any.

    Raises:
        DataError: If a special token is a word that text may contain.
    """
    check_trainable(eos_token, mask_token)
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, _PARTS])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token] if mask_token is None else [eos_token, mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=n_texts)
    tokenizer.pre_tokenizer = words
    return TextTokenizer(tokenizer, eos_token)


def _parsed(text: str, where: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: not a tokenizer.json: {str(error).splitlines()[0]}") from None


def check_trainable(eos_token: str, mask_token: str | None = None) -> None:
    """Check that a byte-level BPE can't learn a token from text that has the name of a special token.

    It can if the name is a single word (a run of letters, digits, signs or spaces) or a part of one: the
    word in a document would be encoded as the special token.

    Raises:
        DataError: If a special token is such a word.
    """
    words, letters = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    for setting, token in (("data.eos_token", eos_token), ("data.mask_token", mask_token)):
        if token is None or not set(token) <= set(letters):
            continue
        if len(words.pre_tokenize_str(decoders.ByteLevel().decode([token]))) == 1:
            raise DataError(
                f"{setting}={token}: is a word that the text may contain",
                "set a token with signs around it, such as <|endoftext|>",
            )


def _check_not_text(tokenizer: Tokenizer, token: str, setting: str) -> None:
    """Check that a token is not an ordinary entry of the vocabulary, which text is encoded as."""
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    if token not in special and tokenizer.model.token_to_id(token) is not None:
        raise DataError(
            f"{setting}={token}: is ordinary text in the vocabulary of the given tokenizer",
            "set one of its special tokens",
        )


def load_tokenizer(name: str, eos_token: str, setting: str = "data.eos_token") -> TextTokenizer:
    """Load a tokenizer from a tokenizer.json file or from the Hugging Face Hub.

    Hub tokenizers are downloaded once and then loaded from the hub's cache.

    Args:
        name: Path of a tokenizer.json, or name of a repository on the hub.
        eos_token: End-of-document token.
        setting: Setting or option that gives it, for errors.

    Raises:
        DataError: If the tokenizer doesn't exist, can't be read, or has no ``eos_token`` besides its
            ordinary text.
    """
    return ended(_read_tokenizer(name), eos_token, name, setting)


def ended(tokenizer: Tokenizer, eos_token: str, where: str, setting: str) -> TextTokenizer:
    """Return a given tokenizer with its end-of-document token.

    Args:
        tokenizer: Tokenizer, which is changed in place.
        eos_token: End-of-document token.
        where: Place that error messages start with, usually the path.
        setting: Setting or option that gives the token, for errors.

    Raises:
        DataError: If the tokenizer has no ``eos_token`` besides its ordinary text.
    """
    _check_not_text(tokenizer, eos_token, setting)
    if tokenizer.token_to_id(eos_token) is None:
        raise DataError(f"{where}: has no token {eos_token!r}", f"name its end token with {setting}")
    return TextTokenizer(tokenizer, eos_token, where)


def _read_tokenizer(name: str) -> Tokenizer:
    path = Path(name)
    if path.is_file():
        data = read_bytes(path, "give another tokenizer.json", DataError)
        try:
            return _parsed(data.decode(), name)
        except UnicodeDecodeError:
            raise DataError(f"{name}: not a tokenizer.json: it is not UTF-8 text") from None
    if path.suffix == ".json" or path.exists() or name.count("/") > 1:
        raise DataError(f"{name}: no such tokenizer file")
    try:
        from huggingface_hub import try_to_load_from_cache  # slow to import, and not needed to decode

        # Prefer the hub's cache without checking for updates: a compute node may have no network, and
        # the tokenizer of a run must not change.
        cached = try_to_load_from_cache(name, "tokenizer.json")
        return Tokenizer.from_file(cached) if isinstance(cached, str) else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for network and name alike
        raise DataError(f"{name}: no such file, and no hub tokenizer: {str(error).splitlines()[0]}") from None
