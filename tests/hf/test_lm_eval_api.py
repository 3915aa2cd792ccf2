"""The backends ``hf`` and ``local-completions`` of lm-evaluation-harness: equal scores through the server."""

from __future__ import annotations

import importlib.util
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.converted import measure_model
from tests.support.hf_folders import HORIZON, TEXT, Opened, lively_model, make_tokenizer, open_folder
from tests.support.servers import run_server
from tnnlm.checkpoints.converted import save_converted
from tnnlm.conversion import convert_model
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")
WORDS = [*TEXT.split(), "\U0001f600", "\u4e2d\u6587", "  two", "\ttab", "\n\nline", "1,000.5"]


def module_without_retries() -> ModuleType:
    """Return a stand-in for the library with which this backend repeats failed requests: it repeats none."""
    module = ModuleType("tenacity")
    module.__spec__ = ModuleSpec("tenacity", None)
    for name in ("stop_after_attempt", "wait_exponential"):
        setattr(module, name, lambda *_, **__: None)
    module.retry = lambda **_: lambda function: function  # type: ignore[attr-defined]
    module.RetryError = RuntimeError  # type: ignore[attr-defined]
    return module


if importlib.util.find_spec("tenacity") is None:  # it comes with lm-eval[api] only
    sys.modules["tenacity"] = module_without_retries()


class Asked(NamedTuple):
    """Requests of the harness."""

    pairs: list[tuple[str, str]]
    """Contexts with continuations to score."""
    documents: list[str]
    """Documents to score as a whole."""


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Return a folder of a model that predicts the end token after about half of all tokens."""
    tokenizer = make_tokenizer()
    model = lively_model()
    with torch.no_grad():
        model.embedding.weight[tokenizer.eos_id] = 8 * model.embedding.weight[1]
    converted = convert_model(model, method="balanced", horizon=HORIZON)
    folder = tmp_path_factory.mktemp("hf") / "ending"
    report = measure_model(model, converted, method="balanced", horizon=HORIZON)
    save_converted(folder, converted, tokenizer, report)
    return open_folder(folder)


def asked(own: TextGenerator) -> Asked:
    """Return 200 requests: multiple choice, also at the end of a document, empty contexts, and documents."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    pairs = []
    for _ in range(25):
        context = words(1, 12)
        # The first choice is that of the model, where it is text and not the end.
        first = own(context, 1, SamplingParams(temperature=0))
        if own.tokenizer.encode(context + first)[:-1] != own.tokenizer.encode(context):
            first = f" {words(1, 3)}"
        pairs += [(context, first), *((context, f" {words(1, 3)}") for _ in range(3))]
    pairs += [("", words(1, 6)) for _ in range(40)]
    pairs += [(f"{words(2, 6)} ", draw.choice(WORDS).strip()) for _ in range(20)]
    return Asked(pairs, [words(1, 30) for _ in range(40)])


def scores(model: Any, requests: Asked) -> tuple[list[tuple[float, bool]], list[float], list[str]]:
    """Return the scores of the requests, and completions of the beginnings of a few documents."""
    from lm_eval.api.instance import Instance

    def instances(kind: str, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    pairs = model.loglikelihood(instances("loglikelihood", requests.pairs), disable_tqdm=True)
    documents = [(text,) for text in requests.documents]
    rolling = model.loglikelihood_rolling(instances("loglikelihood_rolling", documents), disable_tqdm=True)
    options = {"until": [" "], "max_gen_toks": 6, "do_sample": False}
    starts = [(text[:20], options) for text in requests.documents[:8]]
    return pairs, rolling, model.generate_until(instances("generate_until", starts), disable_tqdm=True)


def from_transformers(folder: Path, window: int, requests: Asked) -> Any:
    from lm_eval.models.huggingface import HFLM

    more = {"trust_remote_code": True, "max_length": window, "device": "cpu", "batch_size": 8}
    return scores(HFLM(pretrained=str(folder), **more), requests)


def from_server(opened: Opened, window: int, requests: Asked, tokenized: bool, special: bool = True) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with run_server(opened.own, parse_special=special) as running:
        api = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{running.url}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(opened.folder),
            tokenized_requests=tokenized,
            # This backend counts one token of context and one that is generated.
            max_length=window + 2,
            batch_size=4,
            max_retries=1,
        )
        return scores(api, requests)


# Windows cut documents between any two tokens, which strings can't: then all documents are one window.
@pytest.mark.parametrize(("tokenized", "window"), [(True, 32), (False, 1000)])
def test_both_backends_give_equal_scores(ending: Opened, tokenized: bool, window: int) -> None:
    requests = asked(ending.own)
    assert len(requests.pairs) + len(requests.documents) == 200
    own = ending.own
    ends = [int(own.token_logits(own.prefill(["".join(pair)]).logits).argmax()) for pair in requests.pairs]
    assert 20 < ends.count(own.tokenizer.eos_id) < 140
    expected, rolling, completions = from_transformers(ending.folder, window, requests)
    found, found_rolling, found_completions = from_server(ending, window, requests, tokenized)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in found)
    assert completions == found_completions
    assert len(set(completions)) > 2
    assert found_rolling == pytest.approx(rolling, abs=1e-3)


def test_strings_need_the_setting_for_special_tokens(ending: Opened) -> None:
    """The harness gives an empty context as the name of the end token."""
    requests = Asked([("", "The last words.")], ["The last words."])
    expected, rolling, _ = from_transformers(ending.folder, 1000, requests)
    found, found_rolling, _ = from_server(ending, 1000, requests, tokenized=False)
    assert (found[0][0], found_rolling[0]) == pytest.approx((expected[0][0], rolling[0]), abs=1e-3)
    other, *_ = from_server(ending, 1000, requests, tokenized=False, special=False)
    assert other[0][0] < expected[0][0] - 1
