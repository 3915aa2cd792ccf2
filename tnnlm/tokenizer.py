"""Text <-> token ids: byte-level BPE by ``tokenizers``, trained here or given.

Needs no network unless a hub name was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from tnnlm.errors import DataError


class TextTokenizer:
    """A tokenizer and its end-of-document token."""

    def __init__(self, tokenizer: Tokenizer, eos_token: str, where: str = "tokenizer") -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"{where}: has no token {eos_token!r}", "name its end token with data.eos_token=..."
            )
        # A document that spells out the end token must not end the document.
        tokenizer.add_special_tokens([eos_token])
        tokenizer.encode_special_tokens = True
        # What a published file says about its own model's batches would cut and pad documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.size = int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1
        """one more than the highest id: rows that an embedding must have"""

    @classmethod
    def from_json(cls, text: str, eos_token: str, where: str = "tokenizer.json") -> TextTokenizer:
        """Read the text of a tokenizer.json.

        Raises:
            DataError: if it isn't one.
        """
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where}: not a tokenizer.json: {str(error).splitlines()[0]}") from None
        return cls(tokenizer, eos_token, where)

    @property
    def fingerprint(self) -> str:
        """Hash of the whole tokenizer: equal fingerprints give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def ids_fingerprint(self) -> str:
        """Hash without the post-processor, which adds tokens that :meth:`encode` never asks for, and which
        Transformers replaces when it saves a tokenizer."""
        content = json.loads(self.to_json())
        del content["post_processor"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self.tokenizer.to_str(pretty=False))

    def with_special(self, token: str) -> TextTokenizer:
        """This one with one more special token, unless it has it. Text that spells it out stays text."""
        self.tokenizer.add_special_tokens([token])
        return TextTokenizer(self.tokenizer, self.eos_token)

    def id_of(self, token: str) -> int:
        """The id of an entry.

        Raises:
            DataError: if there is none of this name.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no token added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; the end token is left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of ids as they come, in pieces that are correct UTF-8 each.

        Bytes of a character that the last token left open are shown as U+FFFD, as ``decode`` does.
        """
        stream = TextStream(self)
        yield from filter(None, map(stream.push, ids))
        if rest := stream.finish():
            yield rest


class TextStream:
    """Text of ids that come one at a time, in pieces that are correct UTF-8 each."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._owner = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._seen: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """What ``token`` makes certain; empty in the middle of a character."""
        self._seen.append(token)
        piece = str(self._stream.step(self._owner.tokenizer, token) or "")
        self._shown += len(piece)
        return piece

    def finish(self) -> str:
        """What was left open, as ``decode`` shows it: bytes of a broken character as U+FFFD."""
        return self._owner.decode(self._seen)[self._shown :]


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    eos_token: str,
    n_texts: int,
    progress: bool,
    mask_token: str | None = None,
) -> TextTokenizer:
    """Train byte-level BPE with at most ``vocab_size`` entries, the special tokens among them.

    Args:
        texts: the training split, a document each.
        vocab_size: at least 257: every byte is an entry, or unseen bytes would vanish silently.
        eos_token: the end-of-document token.
        n_texts: how many texts come, for the progress bar.
        progress: show the bar on stderr.
        mask_token: another special token, if there is one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token] if mask_token is None else [eos_token, mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=n_texts)
    return TextTokenizer(tokenizer, eos_token)


def load_tokenizer(name: str, eos_token: str) -> TextTokenizer:
    """A tokenizer.json by path, or a hub tokenizer by name: downloaded once, then read from the hub's cache.

    Raises:
        DataError: if there is none, it can't be read, or it has no ``eos_token``.
    """
    path = Path(name)
    if path.is_file():
        try:
            return TextTokenizer.from_json(path.read_text(encoding="utf-8"), eos_token, name)
        except UnicodeDecodeError:
            raise DataError(f"{name}: not a tokenizer.json: it is not text") from None
    if path.suffix == ".json" or path.exists() or name.count("/") > 1:
        raise DataError(f"{name}: no such tokenizer file")
    try:
        from huggingface_hub import try_to_load_from_cache  # slow to import, and decoding needs it never

        # What lies in the hub's cache is not asked for again: a node may have no network, and a
        # tokenizer that changes there would be another one here.
        cached = try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(cached, str):
            return TextTokenizer(Tokenizer.from_file(cached), eos_token, name)
        return TextTokenizer(Tokenizer.from_pretrained(name), eos_token, name)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for network and name alike
        raise DataError(f"{name}: no such file, and no hub tokenizer: {str(error).splitlines()[0]}") from None
