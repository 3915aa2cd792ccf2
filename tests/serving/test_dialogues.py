"""Tokens of conversations by their text, and the white space before an answer."""

from __future__ import annotations

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.detokenizer import TextStream
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.dialogues import Dialogues
from tnnlm.serving.sequence import StoppedText

CLIENT = b"client"


def test_longest_beginning_gives_its_tokens(generator: TextGenerator) -> None:
    special = SpecialTokens(generator.tokenizer)
    dialogues = Dialogues(special, 1 << 20)
    letters = special.encode("x") + special.encode("y") + special.encode("z")
    dialogues.put("ab", [1, 2], letters[:1], CLIENT)
    dialogues.put("ab", [1, 2], letters, CLIENT)
    rest = "<eos>next"
    assert dialogues.encode(f"abxyz{rest}", CLIENT) == [1, 2, *letters, *special.encode(rest)]
    assert dialogues.encode(f"abx{rest}", CLIENT) == [1, 2, *letters[:1], *special.encode(rest)]
    # Other text, another client, and a text that an encoder may join to what follows.
    for text, client in ((f"aby{rest}", CLIENT), (f"abxyz{rest}", b"other"), ("abxyznext", CLIENT)):
        assert dialogues.encode(text, client) == special.encode(text)


def test_special_tokens_of_an_answer_are_those_of_the_template(generator: TextGenerator) -> None:
    special = SpecialTokens(generator.tokenizer)
    dialogues, end = Dialogues(special, 1 << 20), generator.tokenizer.eos_id
    dialogues.put("a", [1], [*special.encode("x"), end], CLIENT)
    assert dialogues.encode("ax<eos><eos>", CLIENT) == [1, *special.encode("x"), end, end]
    # The model wrote the name of the token as text, as a message can have it.
    dialogues.put("b", [1], generator.tokenizer.encode("<eos>"), CLIENT)
    hidden = special.hide("<eos>")
    assert dialogues.encode(f"b{hidden}<eos>", CLIENT) == [1, *generator.tokenizer.encode("<eos>"), end]


def test_size_is_limited_and_the_oldest_is_forgotten(generator: TextGenerator) -> None:
    special = SpecialTokens(generator.tokenizer)
    dialogues = Dialogues(special, 1000)
    letter = special.encode("x")
    for text in ("a", "b", "c", "d"):
        dialogues.put(text, [1], letter, CLIENT)
        dialogues.encode("ax<eos>", CLIENT)
    assert dialogues.encode("ax<eos>", CLIENT)[0] == 1
    assert dialogues.encode("bx<eos>", CLIENT) == special.encode("bx<eos>")
    assert dialogues.encode("dx<eos>", CLIENT)[0] == 1
    dialogues.put("long", [1] * 1000, letter, CLIENT)
    assert dialogues.encode("longx<eos>", CLIENT) == special.encode("longx<eos>")
    assert dialogues._bytes <= 1000
    without = Dialogues(special, 0)
    without.put("a", [1], letter, CLIENT)
    assert without.encode("ax<eos>", CLIENT) == special.encode("ax<eos>")


def test_white_space_of_the_template_is_dropped_once(generator: TextGenerator) -> None:
    tokenizer = generator.tokenizer

    def shown(text: str, lead: str, stops: tuple[str, ...] = ()) -> tuple[str, bool]:
        stopped = StoppedText(TextStream(tokenizer.detokenizer, started=True), stops, lead)
        tokens = [token for letter in text for token in tokenizer.encode(letter)]
        return "".join([*map(stopped.push, tokens), stopped.finish()]), stopped.stopped

    assert shown(" a b", " ") == ("a b", False)
    assert shown("  a", " ") == (" a", False)
    assert shown("a b", " ") == ("a b", False)
    assert shown("\n\na", "\n\n") == ("a", False)
    assert shown("\na", "\n\n") == ("\na", False)
    assert shown(" ", " ") == ("", False)
    assert shown("\n", "\n\n") == ("\n", False)
    assert shown(" ab", " ", ("a",)) == ("", True)
