"""Chat templates give the output and answers of Transformers."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.conversations import turn
from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import Renderer
from tnnlm.chat.templates import NAMED, ChatTemplate, Conversation
from tnnlm.data.conversations.prepare import encode_answers
from tnnlm.tokenizer import train_bpe

END = "<|endoftext|>"
TALK = [turn("system", "Short."), turn("user", "Hi"), turn("assistant", "Hello\nyou"), turn("user", "Bye")]


@pytest.mark.parametrize("name", NAMED)
def test_template_gives_the_text_of_transformers(name: str) -> None:
    own = train_bpe(["hello there"] * 9, 300, END, 9, progress=False)
    theirs = PreTrainedTokenizerFast(tokenizer_object=own.tokenizer, eos_token=END, pad_token=END)
    theirs.chat_template = NAMED[name]
    with Renderer() as renderer:
        chat = ChatTemplate(NAMED[name], SpecialTokens(own), renderer)
        prompt = chat.prompt(TALK, "here")
        text = chat.answered(Conversation(TALK), "here")
        [(ids, scored)] = encode_answers(chat.tokens, [text])
    assert prompt == theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    found = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert own.decode([token for token, mark in zip(ids, scored, strict=True) if mark]) == own.decode(answer)
