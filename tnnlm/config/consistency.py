"""Checks and defaults of settings that depend on each other, and checks of the name of a run."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import fields

from tnnlm.config.init import LoRAConfig
from tnnlm.config.optim import OptimConfig
from tnnlm.config.schema import LABELLED, MASK_TOKEN, SMALLEST_MASKED, SMALLEST_TEXT, Config
from tnnlm.config.values import one_line, typed
from tnnlm.errors import ConfigError

_LONGEST_NAME = 200
"""Maximum size of a name in bytes. File systems allow 255, and the names of other files add to it."""


LARGE_RECURRENCES = 1 << 30
"""Size in bytes of recurrences from which on ETSC is not the default, and a run announces their size."""


def check_name(name: str) -> None:
    """Raise an error if a run's name can't be the name of a single folder.

    Raises:
        ConfigError: If the name is empty or too long, contains a separator or a control character, or begins
            or ends with a blank.
    """
    text = name if len(name) <= 40 else f"{name[:37]}..."
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"name={text!r}: must be a single folder name")
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise ConfigError(f"name={text!r}: contains a line break or another control character")
    if name != name.strip():
        raise ConfigError(f"name={text!r}: begins or ends with a blank")
    size = len(name.encode())
    if size > _LONGEST_NAME:
        raise ConfigError(f"name={text!r}: has {size} bytes, and a folder name can have {_LONGEST_NAME}")


def check_schedule(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for settings of the learning rate schedule that contradict each other.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If the warm-up starts above its peak, or ``optim.schedule_steps`` has no effect.
    """
    optim = config.optim
    if optim.warmup_start_lr > optim.lr:
        raise ConfigError(
            f"optim.warmup_start_lr={optim.warmup_start_lr:g}: must be at most optim.lr={optim.lr:g}"
            + where("optim.warmup_start_lr")
        )
    if optim.decay_share != OptimConfig().decay_share and optim.schedule != "wsd":
        raise ConfigError(
            f"optim.decay_share={optim.decay_share:g}: is for optim.schedule=wsd only"
            f"{where('optim.decay_share')}",
            "omit it, or set optim.schedule=wsd",
        )
    if optim.schedule_steps is None:
        return
    shown = f"optim.schedule_steps={optim.schedule_steps}"
    if optim.schedule not in ("cosine", "wsd"):
        raise ConfigError(
            f"{shown}: is for optim.schedule=cosine and wsd only{where('optim.schedule_steps')}", "omit it"
        )
    if optim.schedule_steps <= optim.warmup_steps:
        raise ConfigError(
            f"{shown}: must be above optim.warmup_steps={optim.warmup_steps}{where('optim.schedule_steps')}"
        )


def check_context(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for settings that ``trainer.context_parallel`` doesn't support.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If sequences are split over devices and the task, the model or the strategy doesn't
            support it. Bidirectional models are not split, and neither are the short convolutions of Hyena,
            which need the tokens before a shard.
    """
    model, trainer, size = config.model, config.trainer, config.trainer.context_parallel
    if size == 1:
        return
    shown, place = f"trainer.context_parallel={size}", where("trainer.context_parallel")
    unsupported = {
        f"task={config.task}": config.task != "causal",
        f"model.block={model.block}": model.block == "hyena",
        f"trainer.strategy={trainer.strategy}": trainer.strategy not in ("auto", "ddp"),
        "trainer.compile=true": trainer.compile,
    }
    for setting, found in unsupported.items():
        if found:
            raise ConfigError(f"{shown}: not supported with {setting}{place}", "set it to 1")
    if model.max_length % size:
        raise ConfigError(f"{shown}: must divide model.max_length={model.max_length}{place}")
    if model.expand * model.d_model < size:
        raise ConfigError(
            f"{shown}: must be at most the number of channels, {model.expand * model.d_model}{place}"
        )


def check_sharding(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for a setting of sharded models if the strategy doesn't shard.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If ``trainer.shard_size`` is set without strategy=hsdp, or checkpoints are to be sharded
            and the model isn't.
    """
    trainer = config.trainer
    if trainer.shard_size != "auto" and trainer.strategy != "hsdp":
        raise ConfigError(
            f"trainer.shard_size={trainer.shard_size}: is for trainer.strategy=hsdp only"
            f"{where('trainer.shard_size')}",
            "set it to auto",
        )
    if config.checkpoint.format == "sharded" and trainer.strategy not in ("fsdp", "hsdp"):
        raise ConfigError(
            f"checkpoint.format=sharded: is not supported by trainer.strategy={trainer.strategy}"
            f"{where('checkpoint.format')}",
            "set checkpoint.format=file, or trainer.strategy=fsdp or hsdp",
        )


def check_averaging(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for averaged weights that can't be computed.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If ``trainer.ema_decay`` is set, and the weights are not float32 or are sharded.
    """
    trainer = config.trainer
    if trainer.ema_decay is None:
        return
    shown, place = f"trainer.ema_decay={trainer.ema_decay:g}", where("trainer.ema_decay")
    if trainer.precision in ("bf16-true", "64-true"):
        raise ConfigError(
            f"{shown}: requires float32 weights{place}", "use trainer.precision=bf16-mixed or 32-true"
        )
    if _shards(trainer.strategy):
        raise ConfigError(f"{shown}: not supported for sharded weights{place}", "use trainer.strategy=ddp")


def check_muon(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error if Muon is selected and weights are sharded: an update needs the whole matrix.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If ``optim.optimizer`` doesn't fit ``trainer.strategy``.
    """
    strategy = config.trainer.strategy
    if config.optim.optimizer == "muon" and strategy not in ("auto", "ddp"):
        raise ConfigError(
            f"optim.optimizer=muon: not supported with trainer.strategy={strategy}{where('optim.optimizer')}",
            "use trainer.strategy=ddp, or optim.optimizer=adamw",
        )


def check_initial(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for adapters that can't be trained, and for settings of ``init`` without effect.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If there are adapters and no weights that they adapt, frozen parameters as well, or a
            strategy that shards weights; or settings of adapters without ``init.lora.rank``.
    """
    init, lora = config.init, config.init.lora
    if lora.rank is None:
        for item in fields(lora):
            value = getattr(lora, item.name)
            if value != getattr(LoRAConfig(), item.name):
                shown = f"init.lora.{item.name}={one_line(typed(value))}"
                raise ConfigError(
                    f"{shown}: has no effect without init.lora.rank{where(f'init.lora.{item.name}')}",
                    "set init.lora.rank too, for example to 8",
                )
        return
    shown, place = f"init.lora.rank={lora.rank}", where("init.lora.rank")
    if init.weights is None:
        raise ConfigError(f"{shown}: there are no weights to adapt{place}", "set init.weights too")
    if init.freeze:
        raise ConfigError(
            f"init.freeze: has no effect with {shown}, which trains adapters only{where('init.freeze')}",
            "omit one of them; init.lora.targets selects the layers with adapters",
        )
    if _shards(config.trainer.strategy):
        raise ConfigError(
            f"{shown}: not supported with trainer.strategy={config.trainer.strategy}{place}",
            "use trainer.strategy=ddp",
        )


def _shards(strategy: str) -> bool:
    """Return whether a strategy, also one of Lightning by its name, shards the weights."""
    return any(name in strategy for name in ("fsdp", "hsdp", "model_parallel", "deepspeed"))


def settle_method(config: Config) -> None:
    """Select the default of ``conversion.method`` by the size of the model.

    ETSC stores a float32 number per channel and lag, for all lags of the training length or more.
    """
    model = config.model
    size = 4 * model.n_layers * model.expand * model.d_model * model.max_length
    if config.task == "causal" and size >= LARGE_RECURRENCES:
        config.conversion.method = "auto"


def settle_task(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error for settings that the task doesn't have, and set defaults that depend on the task.

    Args:
        config: Configuration, whose ``data.mask_token`` is set for task=masked.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If the task can't be trained with the settings.
    """
    if config.task == "causal" and config.model.causal is False:
        raise ConfigError(
            "model.causal=false: task=causal predicts the next token and must not see it"
            + where("model.causal"),
            "omit model.causal, or set task=masked",
        )
    if config.model.block != "tnn" and config.model.expand != 1:
        raise ConfigError(
            f"model.expand={config.model.expand}: must be 1 with model.block={config.model.block}"
            f"{where('model.block')}",
            "set model.expand=1",
        )
    data = config.data
    labelled = data.source in LABELLED
    if labelled != (config.task == "classify"):
        instead = "set task=classify" if labelled else f"set data.source={' or '.join(LABELLED)}"
        place = where("data.source") or where("task")
        raise ConfigError(f"data.source={data.source}: can't be used with task={config.task}{place}", instead)
    if not labelled and data.tokenizer is None:
        size = config.model.vocab_size
        if size < SMALLEST_TEXT:
            raise ConfigError(
                f"model.vocab_size={size}: must be at least {SMALLEST_TEXT}{where('model.vocab_size')}"
            )
    if config.task == "masked":
        data.mask_token = MASK_TOKEN if data.mask_token is None else data.mask_token
        if data.mask_token == data.eos_token:
            raise ConfigError(
                f"data.mask_token={data.mask_token}: is the same as data.eos_token{where('data.mask_token')}",
                "set another token",
            )
        if data.tokenizer is None and config.model.vocab_size < SMALLEST_MASKED:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}: must be at least {SMALLEST_MASKED} for "
                f"task=masked: every byte, an end token and a mask token{where('model.vocab_size')}"
            )
    elif data.mask_token is not None:
        raise ConfigError(
            f"data.mask_token={data.mask_token}: is for task=masked only, not task={config.task}"
            f"{where('data.mask_token')}"
        )
