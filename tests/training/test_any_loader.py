"""Training of LitModel with a plain ``lightning.Trainer``, on loaders that do not depend on this package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.support.models import tiny_config
from tests.support.scripts import assert_refused
from tnnlm.checkpoints.locate import load_trained
from tnnlm.config.optim import OptimConfig
from tnnlm.config.schema import Config
from tnnlm.deployment.save import save
from tnnlm.errors import DataError, UserError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import train_bpe
from tnnlm.training.callbacks.recurrences import AttachRecurrences
from tnnlm.training.lit_module import LitModel
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.optim import lr_factor

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
ROWS, BATCH, LENGTH = 24, 4, 32


def settings(**optim: Any) -> Config:
    return Config(model=tiny_config(), optim=OptimConfig(**{"warmup_steps": 2, "lr": 0.01, **optim}))


def rows() -> Tensor:
    return torch.arange(ROWS)[:, None] % 5 + torch.arange(LENGTH + 1) % 7


def trainer(**options: Any) -> lightning.Trainer:
    chosen = {
        "max_steps": 12,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    } | options
    return lightning.Trainer(**chosen)


class Stream(IterableDataset[Tensor]):
    """Data set of unknown length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(rows())


class Batches:
    """Iterable of batches; not a list, which Lightning treats as a collection of loaders."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


UNEVEN = [rows()[:3], rows()[3:, :9], rows()[5:7, :20]]
LOADERS = {
    "DataLoader": lambda: DataLoader(rows(), batch_size=BATCH),  # type: ignore[arg-type]
    "TensorDataset": lambda: DataLoader(TensorDataset(rows()), batch_size=BATCH),
    "stream": lambda: DataLoader(Stream(), batch_size=BATCH),
    "iterable": lambda: Batches(*rows().split(BATCH)),
    "int32": lambda: Batches(*rows().int().split(BATCH)),
    "uneven": lambda: Batches(*UNEVEN),
}


@pytest.mark.parametrize("name", LOADERS)
def test_trains_and_validates_on_any_iterable_of_token_rows(name: str) -> None:
    model, run = LitModel(settings()), trainer()
    before = run.validate(model, LOADERS[name](), verbose=False)[0]["val/loss"]
    run.fit(model, LOADERS[name](), LOADERS[name]())
    assert run.global_step == 12
    found = run.callback_metrics
    assert found["val/loss"] < before
    assert {"train/loss", "val/ppl", "val/ppl_recurrent", "val/ppl_gap", "kernel/order/0"} <= set(found)
    assert abs(float(found["val/ppl_gap"])) < 1e-4
    assert "val/bpb" not in found


def test_validation_counts_every_row_once() -> None:
    model = LitModel(settings())
    found = trainer().validate(model, LOADERS["uneven"](), verbose=False)[0]
    with torch.no_grad():
        sums = [
            nn.functional.cross_entropy(
                model.model(part[:, :-1]).flatten(0, 1),
                part[:, 1:].flatten(),
                reduction="sum",  # type: ignore[operator]
            )
            for part in UNEVEN
        ]
    tokens = sum(part[:, 1:].numel() for part in UNEVEN)
    assert found["val/loss"] == pytest.approx(float(sum(sums)) / tokens, rel=1e-5)


def test_loggers_get_everything_at_the_trainers_interval() -> None:
    logger = CSVLogger("logs", name="", version="")
    run = trainer(logger=logger, log_every_n_steps=3)
    run.fit(LitModel(settings()), LOADERS["DataLoader"](), LOADERS["DataLoader"]())
    logged = read_metrics(Path("logs/metrics.csv"))
    assert [row["step"] for row in logged if row["train/loss"]] == ["2", "5", "8", "11"]
    names = {name for row in logged for name, value in row.items() if value}
    assert {"train/lr", "train/tokens_per_second", "train/step_seconds", "train/grad_norm"} <= names
    assert {"val/loss", "val/ppl", "val/ppl_recurrent", "kernel/length/1"} <= names
    assert "train/data_seconds" not in names  # not measured without the data module


def test_schedule_spans_the_trainers_steps() -> None:
    config = settings()
    assert config.trainer.max_steps == 2000
    for options, steps in (({"max_steps": 12}, 12), ({"max_steps": -1, "max_epochs": 3}, 3 * ROWS // BATCH)):
        run = trainer(**options)
        run.fit(LitModel(config), LOADERS["DataLoader"]())
        rate = run.optimizers[0].param_groups[0]["lr"]
        assert rate == pytest.approx(0.01 * lr_factor(steps, config.optim, steps))


def test_unknown_number_of_steps_is_reported_in_one_line() -> None:
    run = trainer(max_steps=-1, max_epochs=1)
    with pytest.warns(UserWarning, match=r"does not know how many steps .*max_steps") as caught:
        run.fit(LitModel(settings()), LOADERS["stream"]())
    assert not any("\n" in str(warning.message) for warning in caught)
    trainer(max_steps=-1, max_epochs=1).fit(LitModel(settings(schedule="constant")), LOADERS["stream"]())


def test_gradients_are_clipped_by_the_value_of_trainer_or_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grads_with_norm_",
        lambda p, limit, norm: (seen.append(limit), clip(p, limit, norm)),
    )
    trainer(max_steps=1).fit(LitModel(settings(grad_clip=0.7)), LOADERS["iterable"]())
    trainer(max_steps=1, gradient_clip_val=0.3).fit(LitModel(settings()), LOADERS["iterable"]())
    trainer(max_steps=1).fit(LitModel(settings(grad_clip=0.0)), LOADERS["iterable"]())
    assert seen == [0.7, 0.3]
    model = LitModel(settings())
    trainer(max_steps=1, gradient_clip_val=1e-4, gradient_clip_algorithm="value").fit(
        model, LOADERS["iterable"]()
    )
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) <= 1e-4


def test_checkpoints_of_lightning_resume_and_load() -> None:
    keep = ModelCheckpoint(dirpath="saved", save_last=True, monitor="val/loss", every_n_train_steps=6)
    whole = LitModel(settings())
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(max_steps=12).fit(whole, LOADERS["iterable"]())
    half = LitModel(settings())
    half.load_state_dict(start)
    # The schedule covers all twelve steps.
    run = trainer(max_steps=12, callbacks=[keep, StopAt(6)], enable_checkpointing=True, val_check_interval=6)
    run.fit(half, LOADERS["iterable"](), LOADERS["iterable"]())
    assert keep.best_model_path
    loaded = LitModel.load_from_checkpoint("saved/last.ckpt", config=settings())
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in loaded.state_dict().items())
    resumed = LitModel(settings())
    again = trainer(max_steps=12, callbacks=[keep], enable_checkpointing=True)
    again.fit(resumed, LOADERS["iterable"](), ckpt_path="saved/last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class StopAt(lightning.Callback):
    """Callback that ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_accumulated_batches_make_one_step() -> None:
    batches: list[int] = []

    class Count(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            batches.append(len(module._losses))
            torch.testing.assert_close(module.step_loss(), torch.stack(module._losses).mean())

    run = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[Count()])
    run.fit(LitModel(settings()), LOADERS["iterable"]())
    assert run.global_step == 3
    assert batches == [2, 2, 2]


@pytest.mark.parametrize("attached", [False, True])
def test_checkpoints_load_as_trained_models_if_the_tokenizer_is_given(attached: bool) -> None:
    tokenizer = train_bpe(["some text " * 50], 270, "<|endoftext|>", 1, progress=False)
    config = settings()
    run = trainer(max_steps=2, callbacks=[AttachRecurrences(config)] if attached else [])
    model = LitModel(config, tokenizer)
    run.fit(model, LOADERS["iterable"]())
    run.save_checkpoint("mine.ckpt")
    found = load_trained("mine.ckpt")
    assert isinstance(found.model, CausalLM)
    assert found.tokenizer.to_json() == tokenizer.to_json()
    assert (found.ssm is not None) == attached
    assert torch.equal(found.model.embedding.weight, model.model.embedding.weight)  # type: ignore[union-attr]


def test_a_checkpoint_of_a_plain_trainer_converts_and_generates(script: Any) -> None:
    tokenizer = train_bpe(["some text " * 50], 270, "<|endoftext|>", 1, progress=False)
    run = trainer(max_steps=2, enable_checkpointing=True)
    run.fit(LitModel(settings(), tokenizer), LOADERS["iterable"]())
    (saved,) = Path("lightning_logs" if Path("lightning_logs").exists() else "checkpoints").rglob("*.ckpt")
    done = script("convert", str(saved), "--out", "mine", "--no-compile")
    assert done.code == 0, done.err
    assert "trained on batches of another loader" in done.out + done.err
    text = script(
        "generate", "--model", "mine", "--prompt", "some", "--max-new-tokens", "3", "--device", "cpu"
    )
    assert text.code == 0, text.err
    assert text.out.startswith("some")


def test_a_checkpoint_without_tokenizer_says_what_to_do(script: Any) -> None:
    run, model = trainer(max_steps=1), LitModel(settings())
    run.fit(model, LOADERS["iterable"]())
    run.save_checkpoint("bare.ckpt")
    assert_refused(
        script("convert", "bare.ckpt"), "without settings and tokenizer", "LitModel(config, tokenizer)"
    )
    loaded = LitModel.load_from_checkpoint("bare.ckpt", config=settings())
    tokenizer = train_bpe(["some text " * 50], 270, "<|endoftext|>", 1, progress=False)
    save(loaded.model, tokenizer, "saved")  # type: ignore[arg-type]
    done = script(
        "generate", "--model", "saved", "--prompt", "some", "--max-new-tokens", "1", "--device", "cpu"
    )
    assert done.code == 0, done.err


def test_a_callback_without_its_tokenizer_is_reported() -> None:
    config = settings()
    run = trainer(max_steps=1, callbacks=[AttachRecurrences(config)])
    run.fit(LitModel(config), LOADERS["iterable"]())
    with pytest.raises(UserError, match=r"pass one with LitModel\(config, tokenizer\)"):
        run.save_checkpoint("mine.ckpt")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": rows()}, "batch: has type dict"),
        (rows().float(), "batch: has dtype float32 and shape (24, 33)"),
        (rows()[0], "batch: has dtype int64 and shape (33,)"),
        (rows()[:, :1], "and shape (24, 1)"),
        ([rows(), rows()], "batch: has type list"),
        (rows() + 300, "token ids from 300 to 310, but model.vocab_size is 300"),
    ],
)
def test_other_batches_are_refused_in_one_line(batch: Any, message: str) -> None:
    for call in (trainer().fit, trainer().validate):
        with pytest.raises(DataError, match=re.escape(message)) as raised:
            call(LitModel(settings()), Batches(batch))
        assert "\n" not in str(raised.value)


def test_other_tasks_name_the_batches_they_take() -> None:
    config = settings()
    config.task = "masked"
    with pytest.raises(DataError, match=r"task=masked expects tnnlm\.models\.batches\.MaskedBatch"):
        trainer().fit(LitModel(config), Batches(rows()))
