"""Perplexities on a token budget: the rows that are chosen, and how the variants are evaluated on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tests.support.scripts import assert_refused
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_model
from tnnlm.deployment import variants
from tnnlm.deployment.perplexity import INTERRUPTED, Perplexities, measure_perplexities
from tnnlm.deployment.token_budget import (
    FEWEST_ROWS,
    LONGEST_SECONDS,
    SECONDS,
    rows_in_time,
    rows_of_tokens,
)
from tnnlm.deployment.variants import Scorer
from tnnlm.evaluation import RowLosses, paired_gap, recurrent_losses, step_difference
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.inference.linear import DTYPES
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import in_parallel_form


def counts(seconds_per_token: float, rows: int = 1000) -> dict[int, int]:
    """Return the number of rows chosen at 512 and 4,096 tokens, of the available ``rows`` and 1,000."""
    chosen, omitted = rows_in_time({512: rows, 4096: 1000}, lambda length: seconds_per_token * length)
    assert omitted == {}
    assert all(len(indices.unique()) == len(indices) for indices in chosen.values())
    return {length: len(indices) for length, indices in chosen.items()}


def test_rows_are_those_that_fit_into_the_time_but_at_least_sixteen() -> None:
    assert SECONDS == 30
    assert counts(0.0) == {512: 1000, 4096: 1000}
    assert counts(1e-4) == {512: 292, 4096: 36}  # a quarter of a minute each
    # The time that few rows of the first length leave is used for the second.
    assert counts(1e-4, rows=20) == {512: 20, 4096: 70}
    assert counts(1e-3) == {512: 29, 4096: FEWEST_ROWS}
    assert counts(1e-2) == {512: FEWEST_ROWS, 4096: FEWEST_ROWS}


def test_rows_that_take_half_an_hour_are_fewer_or_omitted() -> None:
    few = counts(0.1)
    assert 1 <= few[4096] < FEWEST_ROWS
    assert few[512] * 51.2 + few[4096] * 409.6 <= LONGEST_SECONDS
    timed: list[int] = []

    def seconds_per_row(length: int) -> float:
        timed.append(length)
        return 0.5 * length

    chosen, omitted = rows_in_time({512: 100, 4096: 100}, seconds_per_row)
    assert len(chosen[512]) == 3
    assert omitted == {
        "context of 4,096 tokens": "a row takes 35 minutes; --perplexity-tokens 4096 measures one"
    }
    assert timed == [512]  # a length that takes so long isn't timed either


def test_rows_of_a_number_of_tokens_are_evenly_spaced() -> None:
    chosen = rows_of_tokens(2048, {512: 10, 4096: 3})
    assert chosen[512].tolist() == [0, 3, 6, 9]
    assert chosen[4096].tolist() == [0]
    assert rows_of_tokens(1 << 30, {512: 10})[512].tolist() == list(range(10))


LENGTH = 150
LARGE_FORMS = {"tno": ("etsc", 70), "sgconv": ("window", 80), "rtf": ("window", 90)}
"""Method and horizon by family, of recurrences that are evaluated by their taps, past their horizon too."""


@pytest.mark.parametrize("family", LARGE_FORMS)
def test_taps_of_a_large_recurrence_score_as_the_recurrence(family: str) -> None:
    method, horizon = LARGE_FORMS[family]
    model = CausalLM(tiny_config(kernel=FAMILIES[family]())).double().eval()
    converted = convert_model(model, method=method, horizon=horizon)
    rows = torch.randint(300, (3, LENGTH + 1))
    scorer = Scorer(converted, 64, by_taps=True)
    assert scorer.by_taps
    expected = recurrent_losses(converted, rows, 64)
    torch.testing.assert_close(scorer.at(LENGTH).losses(rows).nats, expected.nats, rtol=1e-9, atol=0)
    difference = scorer.compare(rows[:1])
    assert difference is not None
    assert difference <= 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_taps_score_as_the_recurrence_with_packed_weights(dtype: str) -> None:
    model = CausalLM(tiny_config(d_model=32)).eval()
    packed = optimize_for_decoding(convert_model(model, method="etsc", horizon=70), dtype)
    rows = torch.randint(300, (3, LENGTH + 1))
    expected = recurrent_losses(packed, rows, 64)
    found = Scorer(packed, 64, by_taps=True).at(LENGTH).losses(rows)
    torch.testing.assert_close(found.nats, expected.nats, rtol=1e-5 if dtype == "float32" else 1e-3, atol=0)


def test_recurrence_is_run_if_its_steps_differ_from_its_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, method="window", horizon=80)
    other = convert_model(model, method="window", horizon=2)
    monkeypatch.setattr(variants, "in_parallel_form", lambda *_: in_parallel_form(other, LENGTH, 1))
    rows = torch.randint(300, (1, LENGTH + 1))
    scorer = Scorer(converted, 64, by_taps=True)
    difference = scorer.compare(rows)
    assert difference == step_difference(in_parallel_form(other, LENGTH, 1), converted, rows, 32)
    assert difference > variants.AGREEMENT
    assert not scorer.by_taps
    expected = recurrent_losses(converted, rows, 64)
    assert torch.equal(scorer.at(LENGTH).losses(rows).nats, expected.nats)


def test_gap_has_the_standard_error_of_the_paired_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((40,), 32)
    reference = 100 + 20 * torch.randn(40, generator=generator, dtype=torch.float64)
    differences = 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    found = paired_gap(RowLosses(reference, tokens), RowLosses(reference + differences, tokens))
    mean = differences.mean() / 32
    assert found.gap == pytest.approx(float(torch.expm1(mean)), rel=1e-9)
    expected = float(mean.exp() * differences.std() / 32 / 40**0.5)
    assert found.standard_error == pytest.approx(expected, rel=1e-9)
    # Rows count by their tokens: with the same difference per token, there is no error.
    uneven = torch.tensor([32, 16, 16])
    shifted = RowLosses(reference[:3] + 0.01 * uneven, uneven)
    assert paired_gap(RowLosses(reference[:3], uneven), shifted) == pytest.approx(
        (0.01005016708, 0.0), abs=1e-9
    )
    single = RowLosses(reference[:1], tokens[:1])
    assert paired_gap(single, single) == (0, None)


def corpus_of(rows: torch.Tensor) -> Any:
    return SimpleNamespace(
        rows=lambda split, length, limit: rows[:, : length + 1], report=SimpleNamespace(protocol="documents")
    )


def test_gaps_are_paired_and_known_after_every_variant() -> None:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, ConversionConfig(method="balanced", tolerance=0.3))
    seen: list[Perplexities] = []
    config = Config(model=model.config)
    found = measure_perplexities(
        model, converted, corpus_of(torch.randint(300, (6, 257))), config, tokens=64, on_found=seen.append
    )
    assert found.ppl_tokens == {"32": 64, "256": 256}
    assert len(seen) == 6
    assert set(seen[0].not_measured.values()) == {INTERRUPTED}
    assert set(seen[2].ppl) == {"parallel", "recurrent", "bfloat16 weights"}
    assert found.not_measured == {}
    gap, error = found.ppl_gap["recurrent"]["32"], found.ppl_gap_error["recurrent"]["32"]
    assert gap == pytest.approx(found.ppl["recurrent"]["32"] / found.ppl["parallel"]["32"] - 1, abs=1e-12)
    assert error is not None
    assert error > 0
    assert found.ppl_gap_error["recurrent"]["256"] is None  # a single row
    again = measure_perplexities(model, converted, corpus_of(torch.randint(300, (6, 257))), config)
    assert again.ppl_tokens == {"32": 192, "256": 1536}


def test_perplexities_are_limited_or_omitted_on_request(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny", "--no-perplexity", "--out", "none").code == 0
    assert "Not measured (switched off with --no-perplexity)." in Path("none/README.md").read_text()
    done = script("convert", "runs/tiny", "--perplexity-tokens", "64", "--out", "few")
    assert "±" in done.out
    card = Path("few/README.md").read_text()
    assert "64 tokens at a context of 32" in card
    assert "±" in card
    for wrong in ("0", "-3", "1.5", "many"):
        assert_refused(script("convert", f"--perplexity-tokens={wrong}"), "--perplexity-tokens", wrong)
    assert_refused(
        script("convert", "--perplexity-tokens", "9", "--no-perplexity"), "not allowed with argument"
    )
