"""Every setting of a run, as keyword-only dataclasses; :mod:`tnnlm.config.loader` reads and checks them.

The settings of each kernel stand beside it, in :mod:`tnnlm.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from tnnlm.fields import choice, number
from tnnlm.kernels.base import KernelConfig
from tnnlm.kernels.tno import TNOConfig


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the model."""

    d_model: int = number(256, low=1, high=1_000_000)
    """width of the residual stream"""
    n_layers: int = number(4, low=1, high=10_000)
    """blocks"""
    vocab_size: int = number(4096, low=2, high=10_000_000)
    """entries of the embedding; at least 257 for text; a tokenizer trained here gets at most as many"""
    max_length: int = number(512, low=1, high=1 << 24)
    """training length in tokens"""
    expand: int = number(3, low=1, high=64)
    """channels of the mixer over d_model"""
    glu_dim: int | None = number(None, low=1, high=1_000_000)
    """hidden width of the channel mixing; null: d_model"""
    dropout: float = number(0.0, low=0, high=0.99)
    """on embeddings and both branches of a block"""
    kernel: KernelConfig = field(default_factory=TNOConfig)
    """the convolution kernel"""
    causal: bool | None = None
    """whether a position sees those before it alone; null: as the task needs. false: kernels reach both
    ways, by the network on negative lags too (tno) or a second kernel (all others)"""
    n_classes: int = number(2, low=2, high=1_000_000)
    """classes; task classify only"""
    pair: bool = False
    """classify pairs of sequences, each read by itself; task classify only"""


@dataclass(kw_only=True)
class ListOpsConfig:
    """Expressions to be generated; the defaults are the Long Range Arena's."""

    min_length: int = number(501, low=1, high=1 << 20)
    """symbols of the shortest expression"""
    max_length: int = number(1999, low=4, high=1 << 20)
    """of the longest; at most ``model.max_length``"""
    max_depth: int = number(10, low=2, high=100)
    """of nesting, a value counted as 1"""
    max_args: int = number(10, low=2, high=1_000)
    """largest number of arguments; drawn evenly from 2 on"""
    train_rows: int = number(96_000, low=1)
    """expressions to train on"""
    val_rows: int = number(2_000, low=1)
    """to validate on; none of them is trained on"""
    test_rows: int = number(2_000, low=1)
    """and to test on when the run ends"""


@dataclass(kw_only=True)
class ArchiveConfig:
    """A task of the Long Range Arena, read from files as they are published."""

    task: str = choice("listops", "listops", "text", "retrieval", "image", "pathfinder", "pathx")
    """which; tnnlm/data/sequences/lra.py says what it reads"""
    folder: str | None = None
    """the unpacked lra_release, with aclImdb (text) and cifar-10-batches-py (image) in it"""


@dataclass(kw_only=True)
class DataConfig:
    """Where the text or the labelled sequences come from, and how they become tokens."""

    source: str = choice("stdlib", "stdlib", "files", "hub", "listops", "lra")
    """text: stdlib (sources of the running Python), files (``data.files``) or hub (a ``datasets`` name);
    to classify: listops (expressions generated as ``data.listops`` says) or lra (the files in
    ``data.lra.folder``)"""
    files: list[str] = field(default_factory=list)
    """paths or globs of .txt .md .py .jsonl .parquet, each also as .gz; files only"""
    text_column: str = "text"
    """column of .jsonl, .parquet and hub data that holds the text"""
    hub_name: str | None = None
    """name of a hub data set, or a local folder in its format; hub only"""
    hub_config: str | None = None
    """its configuration, where it has several"""
    hub_split: str = "train"
    """the split to read"""
    hub_val_split: str | None = None
    """its validation split; null: hold out ``val_fraction`` of ``hub_split``"""
    streaming: bool = False
    """read the hub data set as a stream; needs ``data.max_documents``"""
    max_documents: int | None = number(None, low=2)
    """stop after so many documents"""
    tokenizer: str | None = None
    """a tokenizer.json or the name of a hub tokenizer; null: train byte-level BPE on the training split"""
    eos_token: str = "<|endoftext|>"
    """the token that ends a document; a given tokenizer must have it"""
    mask_token: str | None = None
    """the token that hides others, added to a tokenizer that lacks it; null: <|mask|>; task masked only"""
    mask_fraction: float = number(0.15, above=0, high=0.99)
    """share of a row's tokens that are to be guessed: of ten of them 8 are hidden, 1 becomes any token and 1
    stays; task masked only"""
    val_fraction: float = number(0.02, above=0, high=0.5)
    """share of the text, by document, that is held out; of labelled sequences, where they come without
    validation split"""
    max_val_tokens: int | None = number(None, low=1)
    """validate on so many tokens at the most"""
    batch_size: int = number(8, low=1, high=1_000_000)
    """rows of ``model.max_length`` tokens per device and batch"""
    num_workers: int = number(0, low=0, high=1_024)
    """loader processes; rows come from a memory-mapped file, so 0 is rarely slow"""
    cache_dir: str | None = None
    """tokenized text is kept here; null: $TNNLM_CACHE or ~/.cache/tnnlm"""
    listops: ListOpsConfig = field(default_factory=ListOpsConfig)
    """with source listops"""
    lra: ArchiveConfig = field(default_factory=ArchiveConfig)
    """with source lra"""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and the learning rate's course."""

    lr: float = number(2e-3, above=0, high=100)
    """peak learning rate"""
    beta1: float = number(0.9, low=0, high=0.9999)
    """decay of the gradient's mean"""
    beta2: float = number(0.98, low=0, high=0.999999)
    """decay of its square's mean"""
    eps: float = number(1e-8, above=0, high=1)
    """added to the denominator"""
    weight_decay: float = number(0.1, low=0, high=100)
    """decoupled; on matrices, not on biases nor kernels"""
    kernel_lr_scale: float = number(1.0, above=0, high=1_000)
    """learning rate of kernel parameters over ``lr``"""
    schedule: str = choice("cosine", "cosine", "inverse_sqrt", "constant")
    """course after the warm-up"""
    warmup_steps: int = number(100, low=0)
    """steps of linear warm-up"""
    min_lr_ratio: float = number(0.01, low=0, high=1)
    """the cosine ends at this share of ``lr``"""
    grad_clip: float = number(1.0, low=0)
    """largest gradient norm; 0 switches clipping off"""


@dataclass(kw_only=True)
class TrainerConfig:
    """Length of the training and the machine it runs on."""

    max_steps: int = number(2000, low=1)
    """optimizer steps"""
    val_every_n_steps: int = number(500, low=1)
    """optimizer steps between validations; the last step is always validated"""
    log_every_n_steps: int = number(20, low=1)
    """optimizer steps between rows of metrics.csv"""
    precision: str = choice("auto", "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
    """auto: bf16-mixed where the hardware has it, else 32-true"""
    accelerator: str = "auto"
    """auto (a CUDA or ROCm GPU, else the CPU), cpu, gpu ...: Lightning's names"""
    devices: Union[int, str] = number("auto", low=1, word="auto")  # noqa: UP007  OmegaConf reads typing.Union
    """how many per node, or auto"""
    num_nodes: int = number(1, low=1, high=100_000)
    """machines"""
    strategy: str = "auto"
    """auto, ddp: a whole model on every device; fsdp: parameters, gradients and moments sharded over
    devices; or another of Lightning's names"""
    accumulate: int = number(1, low=1, high=1_000_000)
    """batches per optimizer step"""
    skip_nonfinite: bool = True
    """leave out a step whose loss or gradient is NaN or infinite"""
    spike_factor: float = number(0.0, low=0, high=1e6)
    """leave out a step whose loss is above so many times the running mean of the last 50 or so; 0: none"""
    max_skipped: int = number(10, low=1, high=1_000_000)
    """stop after so many left out in a row; the last good checkpoint is kept"""
    compile: bool = False
    """torch.compile the blocks: a tenth faster on a CPU, after half a minute"""
    recompute: bool = False
    """keep each block's input alone for the backward pass and compute the rest again, logits in pieces: for
    long sequences; a third more work"""
    ema_decay: float | None = number(None, above=0, high=0.999999)
    """average the weights with this decay per step, and validate, save and convert the average; null: off"""
    wandb: str | None = None
    """Weights & Biases project to log to as well (extra [wandb]; WANDB_MODE=offline works); null: none"""
    sample_prompt: str = "def "
    """a sample continues this text at each validation"""
    sample_tokens: int = number(64, low=0, high=100_000)
    """its length; 0 writes none"""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every_n_steps: int = number(500, low=1)
    """optimizer steps between saves of last.ckpt; the one before is kept as previous.ckpt"""


@dataclass(kw_only=True)
class ConversionConfig:
    """How checkpoints become recurrences."""

    method: str = choice("etsc", "balanced", "auto", "etsc", "window", "companion", "gradient")
    """balanced: few poles within a tolerance; etsc: exact, as published; window: the last inputs
    themselves; companion: the kernel's own recurrence, where it has one (rtf); auto: the smallest of
    these; gradient: fitted by Adam, the slow baseline"""
    horizon: Union[int, str] = number("auto", low=1, high=1 << 20, word="auto")  # noqa: UP007
    """lags that must be right; auto: until the kernel's remaining energy is float32 rounding"""
    tolerance: float = number(1e-3, above=0, high=0.999)
    """largest relative error of the taps; balanced and auto"""
    order: int | None = number(None, low=1, high=1 << 20)
    """real state numbers per channel; null: as few as the tolerance needs (gradient: 16)"""
    poles: str = choice("shared", "shared", "channel")
    """one set of poles for all channels of a layer, or one per channel; balanced"""
    window_taps: int = number(0, low=0, high=1 << 20)
    """first lags that a window of the last inputs takes over exactly; balanced"""
    gradient_steps: int = number(2000, low=1, high=100_000_000)
    """steps of Adam; gradient"""
    gradient_lr: float = number(1e-2, above=0, high=100)
    """its learning rate; gradient"""
    chunk: int = number(256, low=1, high=1 << 20)
    """tokens per prefill chunk when validating the recurrent form"""


MASK_TOKEN = "<|mask|>"
"""``data.mask_token`` where none is named"""
SMALLEST_TEXT = 257
"""entries of the smallest tokenizer of text: every byte and an end token"""
SMALLEST_MASKED = 258
"""entries of the smallest tokenizer that is trained for task masked: every byte, an end and a mask token"""
LABELLED = ("listops", "lra")
"""values of ``data.source`` whose rows have labels, which task classify takes"""
TASKS = ("causal", "masked", "classify")
"""what a model can be trained for"""


@dataclass(kw_only=True)
class Config:
    """One run."""

    name: str = "demo"
    """folder under ``runs_dir``"""
    task: str = choice("causal", *TASKS)
    """causal: guess the next token; masked: guess hidden tokens from both sides; classify: say to which class
    a whole sequence belongs"""
    seed: int = number(0, low=0, high=2**32 - 1)
    """of initialisation, order of the data, dropout, hidden tokens and split"""
    runs_dir: str = "runs"
    """where runs lie"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
