"""Text generation: sampling, parallel prefill, forking and continuing a state, and valid UTF-8."""

from __future__ import annotations

import io

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.evaluation import NLL, add, bits_per_byte, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import TextGenerator, join
from tnnlm.inference.sampling import SamplingParams, sample
from tnnlm.inference.session import GenerationSession
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import train_bpe

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def model() -> CausalLM:
    return CausalLM(tiny_config()).eval()


@pytest.fixture
def writer(model: CausalLM) -> TextGenerator:
    tokenizer = train_bpe(["the cat sat on the mat"], 300, "<|endoftext|>", 1, False)
    return TextGenerator(convert_model(model), tokenizer)


@pytest.fixture(params=["balanced", "window", "companion", "multirate"])
def exact(request: pytest.FixtureRequest) -> TextGenerator:
    """Return generators in float64 for every recurrent form, so that results agree to 1e-9."""
    kernel = FAMILIES[{"companion": "rtf", "multirate": "sgconv"}.get(request.param, "tno")]()
    model = CausalLM(tiny_config(kernel=kernel)).double().eval()
    tokenizer = train_bpe(["the cat sat on the mat"], 300, "<|endoftext|>", 1, False)
    return TextGenerator(convert_model(model, method=request.param), tokenizer)


def greedy_by_forward(model: CausalLM, writer: TextGenerator, text: str, n: int) -> list[int]:
    ids = writer.tokenizer.encode(text)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1, : writer.tokenizer.size]
        ids.append(int(logits.argmax()))
    return ids[-n:]


def test_greedy_decoding_equals_the_parallel_model(model: CausalLM, writer: TextGenerator) -> None:
    record, pieces = writer.stream(writer.prefill(["the cat"]), 12, GREEDY)
    text = "".join(pieces)
    assert record.tokens == greedy_by_forward(model, writer, "the cat", 12)
    assert record.text == text == writer.tokenizer.decode(record.tokens)


def test_prefill_in_two_parts_equals_prefill_in_one(exact: TextGenerator) -> None:
    writer = exact
    whole = writer.prefill_tokens([[5, 6, 7, 8, 9]])
    parts = writer.prefill_tokens([[8, 9]], writer.prefill_tokens([[5, 6, 7]]))
    assert parts.n_tokens == whole.n_tokens == 5
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-9)


def test_long_prompts_are_prefilled_in_chunks(exact: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(300, (50,)).tolist()
    expected = exact.prefill_tokens([ids])
    monkeypatch.setattr("tnnlm.inference.generator.PREFILL_CHUNK", 7)
    found = exact.prefill_tokens([ids])
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)


def test_one_context_can_be_continued_many_times(writer: TextGenerator) -> None:
    state = writer.prefill(["the"])
    texts = []
    for seed in (1, 1, 2):
        _record, pieces = writer.stream(
            state, 20, SamplingParams(temperature=1.5), torch.Generator().manual_seed(seed)
        )
        texts.append("".join(pieces))
    assert texts[0] == texts[1] != texts[2]


def test_state_size_does_not_depend_on_the_context_length(writer: TextGenerator) -> None:
    sizes = {
        sum(part.numel() for part in writer.prefill_tokens([[1] * n]).model_state.tensors) for n in (1, 99)
    }
    assert len(sizes) == 1


def test_generation_stops_at_the_end_token(writer: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 8, writer.tokenizer.eos_id, 9])
    monkeypatch.setattr("tnnlm.inference.generator.sample", lambda *_: torch.tensor([next(drawn)]))
    record, pieces = writer.stream(writer.prefill(["the"]), 10, GREEDY)
    assert "".join(pieces) == writer.tokenizer.decode([7, 8])
    assert record.tokens == [7, 8]


def test_entries_without_a_token_are_never_sampled(writer: TextGenerator) -> None:
    assert writer.tokenizer.size < 300
    record, pieces = writer.stream(
        writer.prefill(["the"]), 50, SamplingParams(temperature=100), torch.Generator().manual_seed(0)
    )
    list(pieces)
    assert max(record.tokens) < writer.tokenizer.size


@pytest.mark.parametrize("text", ["", "\udcff"])
def test_unusable_prompt_is_refused(writer: TextGenerator, text: str) -> None:
    with pytest.raises(UserError, match="prompt"):
        writer.prefill([text])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"top_k": -2},
        {"top_p": -0.1},
        {"top_p": 1.1},
    ],
)
def test_invalid_sampling_parameters_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"temperature|top_"):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_sample_keeps_the_most_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).log_softmax(-1).expand(2000, -1)
    assert set(sample(logits, SamplingParams(temperature=1, top_k=2)).tolist()) == {1, 2}
    assert set(sample(logits, SamplingParams(temperature=1, top_p=0.5)).tolist()) == {1}
    assert set(sample(logits, SamplingParams(temperature=1, top_p=0.8)).tolist()) == {1, 2}
    assert set(sample(logits, SamplingParams(temperature=1)).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, GREEDY).tolist()) == {1}


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_out_of_range_are_refused(writer: TextGenerator, seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        writer("the", 2, seed=seed)
    assert writer("the", 2, seed=2**64 - 1) == writer("the", 2, seed=2**64 - 1)


def test_text_of_a_completion_is_that_of_its_chunks(writer: TextGenerator) -> None:
    record, chunks = writer.stream(writer.prefill(["the"]), 20, GREEDY)
    seen = ""
    for chunk in chunks:
        seen += chunk
        assert record.text == seen
    assert record.text == writer.tokenizer.decode(record.tokens)


def test_sampling_parameters_of_other_clients() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    for settings in (SamplingParams(top_p=0), SamplingParams(temperature=100, top_p=0, top_k=3)):
        assert settings.greedy
        assert set(sample(logits.expand(99, -1), settings).tolist()) == {1}
    usual, off = (
        sample(logits.expand(99, -1), SamplingParams(top_k=k), torch.Generator().manual_seed(0))
        for k in (0, -1)
    )
    assert usual.equal(off)


def test_sample_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    drawn = sample(
        probabilities.log().expand(20_000, -1),
        SamplingParams(temperature=1),
        torch.Generator().manual_seed(0),
    )
    counts = drawn.bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, probabilities, rtol=0, atol=0.02)


def test_conversation_keeps_the_state_between_turns(writer: TextGenerator) -> None:
    out = io.StringIO()
    info = EngineInfo(name="eager", device="cpu", dtype="float32", linear="plain")
    GenerationSession(writer, GREEDY, 6, 0, info).converse(None, io.StringIO("the cat\n\nsat on\n"), out)
    state = writer.prefill(["the cat\n"])
    expected = ""
    for turn in (None, "sat on\n"):
        state = writer.prefill([turn], state) if turn else state
        record, pieces = writer.stream(state, 6, GREEDY)
        expected += "".join(pieces) + "\n"
        state = record.state
    assert out.getvalue() == expected


def test_recurrent_nll_equals_parallel_nll_over_chunk_borders(model: CausalLM) -> None:
    model = model.double()
    converted = convert_model(model, horizon=80)
    rows = torch.randint(300, (3, 65))
    parallel = parallel_nll(model, rows)
    for chunk in (1, 7, 64, 100):
        recurrent = recurrent_nll(converted, rows, chunk)
        assert recurrent.tokens == parallel.tokens == 3 * 64
        assert recurrent.total == pytest.approx(parallel.total, rel=1e-10)


def test_nll_sums_before_it_exponentiates() -> None:
    uneven = add([NLL(10.0, 1), NLL(2.0, 3)])
    assert uneven == NLL(12.0, 4)
    assert uneven.ppl == pytest.approx(2.718281828**3)
    assert NLL(1e6, 1).ppl == float("inf")
    assert bits_per_byte(0.6931471805599453 * 6, 3.0) == pytest.approx(2.0)
    assert ppl_gap(20.0, 20.2) == pytest.approx(0.01)


ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20], [30, 31, 32, 33]]


@pytest.mark.parametrize("chunk", [2, 3, 512])
@pytest.mark.parametrize("warm", [False, True])
def test_prefill_of_a_batch_equals_that_of_single_rows(
    exact: TextGenerator, chunk: int, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [exact.prefill_tokens([row[::-1]]) if warm else None for row in ROWS]
    start = join([state for state in before if state]) if warm else None
    singles = [exact.prefill_tokens([row], state) for row, state in zip(ROWS, before, strict=True)]
    monkeypatch.setattr("tnnlm.inference.generator.PREFILL_CHUNK", chunk)
    together = exact.prefill_tokens(ROWS, start)
    assert together.lengths == tuple(single.n_tokens for single in singles)
    for index, single in enumerate(singles):
        row = together.select([index])
        torch.testing.assert_close(row.logits, single.logits, rtol=0, atol=1e-9)
        for x, y in zip(row.model_state.tensors, single.model_state.tensors, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_generation_of_a_batch_equals_that_of_single_rows(exact: TextGenerator) -> None:
    state = exact.prefill_tokens(ROWS)
    records = exact.generate(state, 15, GREEDY)
    for index, record in enumerate(records):
        single, pieces = exact.stream(state.select([index]), 15, GREEDY)
        assert record.text == "".join(pieces)
        assert record.tokens == single.tokens
        assert record.state.lengths == single.state.lengths
        torch.testing.assert_close(record.state.logits, single.state.logits, rtol=0, atol=1e-9)


def test_rows_of_a_batch_stop_one_by_one(exact: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = exact.tokenizer.eos_id
    drawn = iter([[7, eos, 8], [9, eos], [10], [eos]])
    monkeypatch.setattr("tnnlm.inference.generator.sample", lambda *_: torch.tensor(next(drawn)))
    records = exact.generate(exact.prefill_tokens(ROWS), 20, GREEDY)
    assert [record.tokens for record in records] == [[7, 9, 10], [], [8]]
    assert [record.state.n_tokens for record in records] == [12, 1, 5]


def test_samples_of_one_prompt_share_its_state_and_differ(exact: TextGenerator) -> None:
    state = exact.prefill(["the cat"])
    hot = SamplingParams(temperature=2.0)
    records = exact.generate(state.select([0] * 4), 20, hot, torch.Generator().manual_seed(0))
    assert len({record.text for record in records}) == 4
    again = exact.generate(state.select([0] * 4), 20, hot, torch.Generator().manual_seed(0))
    assert [record.text for record in again] == [record.text for record in records]


def test_invalid_number_of_tokens_is_refused_for_a_batch(exact: TextGenerator) -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        exact.generate(exact.prefill_tokens(ROWS), -1, GREEDY)
    state = exact.prefill_tokens(ROWS)
    assert all(record.text == "" for record in exact.generate(state, 0, GREEDY))
