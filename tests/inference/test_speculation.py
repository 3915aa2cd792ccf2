"""Speculative decoding: passes over several tokens, equal text and states, and distribution of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.inference.generator import Completion, TextGenerator
from tnnlm.inference.sampling import SamplingParams, probabilities
from tnnlm.inference.speculation import NgramSpeculation, accept_or_draw
from tnnlm.inference.speculation_draft import DraftSpeculation
from tnnlm.inference.speculation_width import PassCosts
from tnnlm.inference.state_file import load_state, save_state
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.tokenizer import train_bpe

GREEDY = SamplingParams(temperature=0)
FORMS = {
    "balanced": "tno",
    "etsc": "fd_tno",
    "window": "hyena",
    "companion": "rtf",
    "multirate": "sgconv",
}
every_form = pytest.mark.parametrize("method", FORMS)


class AlwaysWide(PassCosts):
    """Costs of a machine on which further tokens of a pass cost nothing, up to a width."""

    def __init__(self, width: int) -> None:
        super().__init__((1, width), measured=False)

    def best_width(self, rows: Sequence[Sequence[float]]) -> int:
        return min(max(map(len, rows)) + 1, self.widths[-1])


class Oracle:
    """Speculation that knows the text, and proposes a wrong token at every n-th position of it."""

    def __init__(self, tokens: Sequence[int], prompt: int, wrong: int, width: int) -> None:
        self.tokens, self.prompt, self.wrong, self.width = list(tokens), prompt, wrong, width

    for_batches = False

    def start(self, history: Iterable[int], *_: object) -> Oracle:
        self.place = len(list(history)) - self.prompt
        return self

    def costs(self, *_: object) -> PassCosts:
        return AlwaysWide(self.width)

    def extend(self, tokens: Sequence[int]) -> None:
        self.place += len(tokens)

    def rest(self) -> int:
        return 0

    def probabilities(self, most: int) -> list[float]:
        return [1.0] * min(most, len(self.tokens) - self.place)

    def propose(self, count: int) -> list[int]:
        places = range(self.place, self.place + count)
        return [(self.tokens[i] + (i % self.wrong == 0)) % 300 for i in places]

    def distributions(self) -> None:
        return


def writer_of(method: str = "balanced", seed: int = 0) -> TextGenerator:
    torch.manual_seed(seed)
    model = CausalLM(tiny_config(kernel=FAMILIES[FORMS[method]]())).double().eval()
    tokenizer = train_bpe(["the cat sat on the mat"], 300, "<|endoftext|>", 1, False)
    return TextGenerator(convert_model(model, method=method), tokenizer)


def completion(writer: TextGenerator, limit: int = 40, sampling: SamplingParams = GREEDY) -> Completion:
    state = writer.prefill(["the cat sat"])
    record, pieces = writer.stream(state, limit, sampling, torch.Generator().manual_seed(3))
    assert "".join(pieces) == record.text == writer.tokenizer.decode(record.tokens, started=True)
    assert record.state.n_tokens == state.n_tokens + len(record.tokens)
    return record


def assert_close(state: ModelState, expected: ModelState, atol: float = 1e-9) -> None:
    for part, other in zip(state.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=atol)


@every_form
def test_steps_equal_single_steps_at_every_position(method: str) -> None:
    model = writer_of(method).model
    with torch.inference_mode():
        for rows, width in ((1, 3), (3, 5)):
            state = expected = model.init_state(rows)
            for tokens in torch.randint(300, (9, rows, width)):  # long enough for several turns
                logits, states = model.steps(tokens, state)
                assert len(states) == width
                for place in range(width):
                    single, expected = model.step(tokens[:, place], expected)
                    torch.testing.assert_close(logits[:, place], single, rtol=0, atol=1e-10)
                    assert_close(states[place], expected, 1e-10)
                state = states[-1]


@every_form
@pytest.mark.parametrize(("width", "wrong"), [(2, 3), (5, 7)])
def test_greedy_text_and_state_are_equal(method: str, width: int, wrong: int) -> None:
    writer = writer_of(method)
    expected = completion(writer)
    writer.speculation = Oracle(expected.tokens, expected.state.n_tokens - 40, wrong, width)
    found = completion(writer)
    assert found.tokens == expected.tokens
    assert found.passes < len(found.tokens) == found.passes + found.accepted
    assert 0 < found.accepted < found.proposed
    assert_close(found.state.model_state, expected.state.model_state)


@pytest.mark.parametrize("limit", range(1, 10))
def test_limit_within_a_run(limit: int) -> None:
    writer = writer_of()
    tokens = completion(writer).tokens
    expected = completion(writer, limit)
    writer.speculation = Oracle(tokens, expected.state.n_tokens - limit, 100, 8)
    found = completion(writer, limit)
    assert found.tokens == expected.tokens == tokens[:limit]
    assert_close(found.state.model_state, expected.state.model_state)
    torch.testing.assert_close(found.state.logits, expected.state.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", [0, 3, 7, 8])
def test_end_of_document_within_a_run(place: int) -> None:
    writer = writer_of()
    tokens = list(range(40, 60))
    logits = torch.eye(300).double()

    class Script:
        """Model that says a fixed text, whatever it is fed."""

        def __init__(self, model: CausalLM) -> None:
            self.embedding, self.prefill, self.init_state = model.embedding, self.first, model.init_state

        def first(
            self, tokens: Tensor, state: ModelState, *_: object, keep: int
        ) -> tuple[Tensor, ModelState]:
            return logits[tokens_said[:1]][None], state

        def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
            return logits[[said_after(int(token))]], state

        def steps(self, fed: Tensor, state: ModelState) -> tuple[Tensor, list[ModelState]]:
            return logits[[said_after(int(t)) for t in fed[0]]][None], [state] * fed.shape[1]

    tokens_said = [*tokens[:place], writer.tokenizer.eos_id, *tokens[place:]]

    def said_after(token: int) -> int:
        return tokens_said[tokens_said.index(token) + 1]

    writer.model = Script(writer.model)  # type: ignore[arg-type, assignment]
    writer.speculation = Oracle(tokens_said, writer.prefill(["the cat sat"]).n_tokens, 100, 5)
    assert completion(writer).tokens == tokens[:place]


def test_sampled_text_and_random_state_are_equal_for_a_seed() -> None:
    writer = writer_of()
    sampling = SamplingParams(temperature=0.2, top_k=5)
    runs = []
    for speculation in (None, NgramSpeculation(partial(AlwaysWide, 5))):
        writer.speculation = speculation
        generator = torch.Generator().manual_seed(5)
        record, pieces = writer.stream(writer.prefill(["the the the"]), 60, sampling, generator)
        runs.append(("".join(pieces), record.tokens, generator.get_state().tolist()))
    assert runs[0] == runs[1]
    assert 0 < record.accepted < record.proposed


def test_state_saved_after_a_partial_acceptance_continues_alike(tmp_path: Path) -> None:
    writer = writer_of()
    expected = completion(writer, 40)
    prompt = expected.state.n_tokens - 40
    writer.speculation = Oracle(expected.tokens, prompt, 7, 5)
    first = completion(writer, 16)
    save_state(tmp_path / "state", writer, first.state)
    state = load_state(tmp_path / "state", writer).state
    assert state.history is None
    writer.speculation = NgramSpeculation(partial(AlwaysWide, 3))
    rest, pieces = writer.stream(state, 24, GREEDY)
    "".join(pieces)
    assert first.tokens + rest.tokens == expected.tokens


@pytest.mark.parametrize("method", ["balanced", "multirate"])
@pytest.mark.parametrize("limit", [0, 1, 33])
def test_rows_of_a_batch_accept_different_numbers_of_tokens(method: str, limit: int) -> None:
    writer = writer_of(method)
    state = writer.prefill(["the the the", "the cat sat", "a mat a mat a mat"])
    expected = writer.generate(state, limit, GREEDY)
    writer.speculation = NgramSpeculation(partial(AlwaysWide, 5))
    found = writer.generate(state, limit, GREEDY)
    for record, other in zip(found, expected, strict=True):
        assert (record.tokens, record.text) == (other.tokens, other.text)
        assert record.state.n_tokens == other.state.n_tokens
        assert_close(record.state.model_state, other.state.model_state)
        torch.testing.assert_close(record.state.logits, other.state.logits, rtol=0, atol=1e-9)
    assert limit < 33 or len({record.passes for record in found}) > 1


def test_row_of_a_batch_ends_at_the_end_of_document() -> None:
    writer = writer_of()
    state = writer.prefill(["the the the", "the cat sat"])
    tokens = [record.tokens for record in writer.generate(state, 30, GREEDY)]
    writer.tokenizer.eos_id = tokens[0][12]
    expected = writer.generate(state, 30, GREEDY)
    writer.speculation = NgramSpeculation(partial(AlwaysWide, 4))
    found = writer.generate(state, 30, GREEDY)
    assert [record.tokens for record in found] == [record.tokens for record in expected]
    assert len(found[0].tokens) < 30


def test_history_of_a_fork_is_its_own() -> None:
    writer = writer_of()
    state = writer.prefill_tokens([[5, 6]])
    one = writer.prefill_tokens([[7]], state)
    two = writer.prefill_tokens([[8, 9]], state)
    for found, expected in ((state, [5, 6]), (one, [5, 6, 7]), (two, [5, 6, 8, 9])):
        assert found.history is not None
        assert list(found.history[0]) == expected
        assert len(found.history[0]) == len(expected)


def drafted(writer: TextGenerator, by: TextGenerator, width: int) -> DraftSpeculation:
    costs = AlwaysWide(width), AlwaysWide(width)
    return DraftSpeculation(by.model, by.token_logits, 0.1, by.tokenizer.eos_id, costs)


@every_form
def test_draft_model_that_is_the_model_is_always_right(method: str) -> None:
    writer = writer_of(method)
    expected = completion(writer)
    for sampling in (GREEDY, SamplingParams(temperature=1.0)):
        writer.speculation = drafted(writer, writer_of(method), 4)
        found = completion(writer, sampling=sampling)
        assert found.accepted == found.proposed == 30
        assert sampling is not GREEDY or found.tokens == expected.tokens


def test_other_draft_model_changes_no_greedy_text() -> None:
    writer = writer_of()
    expected = completion(writer)
    writer.speculation = drafted(writer, writer_of(seed=1), 4)
    found = completion(writer)
    assert found.tokens == expected.tokens
    assert found.accepted < found.proposed


def test_batch_without_speculation_counts_its_passes() -> None:
    writer = writer_of()
    writer.speculation = drafted(writer, writer_of(), 4)
    records = writer.generate(writer.prefill(["the cat", "on"]), 5, GREEDY)
    assert [record.tokens_per_pass for record in records] == [1, 1]


def test_useless_draft_model_is_asked_from_time_to_time() -> None:
    writer = writer_of()
    costs = PassCosts(measured=False), PassCosts(measured=False)
    other = writer_of(seed=1)
    wrong = DraftSpeculation(other.model, lambda logits: -logits, 0.1, 0, costs)
    writer.speculation = wrong
    found = completion(writer, 300)
    assert found.accepted == 0
    assert 5 < found.proposed < 30


def test_accepted_or_drawn_tokens_have_the_distribution_of_the_model() -> None:
    sampling = SamplingParams(temperature=0.9, top_k=30, top_p=0.97)
    p, q = (
        probabilities(writer.token_logits(writer.prefill(["the"]).logits), sampling)
        for writer in (writer_of(seed=0), writer_of(seed=1))
    )
    used = ((p > 0) | (q > 0))[0].nonzero()[:, 0]
    p, q = (part[:, used].expand(20_000, -1) for part in (p, q))
    assert 0.05 < float(torch.minimum(p[0], q[0]).sum()) < 0.95
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(len(used), dtype=torch.float64)
    for _ in range(10):
        tokens = torch.multinomial(q, 1, generator=generator)[:, 0]
        counts += torch.bincount(accept_or_draw(p, q, tokens, generator), minlength=len(used))
    drawn = p[0] > 0
    assert counts.sum() == 200_000
    assert counts[~drawn].sum() == 0
    expected = 200_000 * p[0, drawn]
    chi_square = float(((counts[drawn] - expected) ** 2 / expected).sum())
    degrees = int(drawn.sum()) - 1
    assert degrees >= 10
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
