"""Settings of a run, as keyword-only dataclasses.

:mod:`tnnlm.config.loader` reads and checks them. The settings of each kernel are defined with the kernel, in
:mod:`tnnlm.kernels`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tnnlm.config.init import InitConfig
from tnnlm.config.optim import OptimConfig
from tnnlm.config.sequences import ArchiveConfig, ListOpsConfig
from tnnlm.config.text_sources import TOKEN_TYPES, SourceConfig
from tnnlm.fields import Component, choice, number, text
from tnnlm.kernels.base import KernelConfig
from tnnlm.kernels.tno import TNOConfig


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture and sizes of the model."""

    d_model: int = number(256, low=1, high=1_000_000)
    """Width of the residual stream, in channels."""
    n_layers: int = number(4, low=1, high=10_000)
    """Number of blocks."""
    vocab_size: int = number(4096, low=2, high=10_000_000)
    """Number of embedding entries, at least 257 for text without ``data.tokenizer``. A tokenizer trained for
    the run has at most this many tokens."""
    max_length: int = number(512, low=1, high=1 << 24)
    """Training sequence length in tokens. Decoding is not limited to it."""
    block: str = choice("tnn", "tnn", "hyena", "s4", "s4_glu")
    """Wiring of a block: tnn (gated convolution and GLU, norms without parameters), hyena (the Hyena operator
    of order 2 and an MLP, as in HyenaDNA), s4 (convolution, GELU and a linear layer, without channel mixing)
    or s4_glu (s4 with a gated linear layer). All but tnn have LayerNorms and need ``expand`` = 1."""
    expand: int = number(3, low=1, high=64)
    """Width of the mixer as a multiple of ``d_model``; 3 as in the TNN paper."""
    glu_dim: int | None = number(None, low=1, high=1_000_000)
    """Hidden width of the GLU or MLP (null: ``d_model``)."""
    final_norm: str = choice("simple_rms", "simple_rms", "layer")
    """Norm before the output layer: simple_rms, which has no parameters, or layer (LayerNorm with scale and
    bias, as in the published TNN language models)."""
    embed_scale: bool = False
    """Whether to multiply the embeddings by sqrt(``d_model``), as in the published TNN language models."""
    dropout: float = number(0.0, low=0, high=0.99)
    """Dropout probability on the embeddings and on both branches of each block."""
    kernel: KernelConfig = field(default_factory=TNOConfig)
    """Convolution kernel and its settings, which depend on ``kernel.name``."""
    causal: bool | None = None
    """Whether a position depends on earlier positions only (null: true for task=causal, else false). With
    false the convolutions are bidirectional: tno evaluates its network at negative lags too, every other
    kernel gets a second instance."""
    n_classes: int = number(2, low=2, high=1_000_000)
    """Number of classes, for task=classify only."""
    pair: bool = False
    """Whether an example is a pair of sequences, each encoded separately, for task=classify only."""


@dataclass(kw_only=True)
class DataConfig:
    """Source of the text or of the labelled sequences, tokenization and batching."""

    source: str = choice("stdlib", "stdlib", "files", "hub", "tokens", "mixture", "listops", "lra")
    """Source of the data. Text: stdlib (source code of the running Python's standard library), files
    (``data.files``), hub (a data set of the Hugging Face Hub), tokens (``data.tokens``) or mixture
    (``data.sources``). For task=classify: listops (generated from ``data.listops``) or lra (read from
    ``data.lra.folder``)."""
    format: str = choice("text", "text", "chat", "prompt_completion")
    """Format of the rows: text (all tokens are learned), or conversations, of which the answers are learned:
    chat (column ``messages``, a list of {role, content}) or prompt_completion (columns ``prompt`` and
    ``completion``, each a string or a list of messages), as TRL names them. For task=causal with tables, and
    data sets of the Hub."""
    chat_template: str | None = None
    """Jinja template that makes conversations text: a file, or plain (lines ``role: content``), chatml or raw
    (contents alone). null: that of the tokenizer, else plain, and raw for prompts and completions that are
    strings. It is stored with the tokenizer. For conversations only."""
    packing: bool = False
    """Whether to cut training rows of ``model.max_length`` tokens from the stream of all conversations, with
    an end token between them. It is faster, but the convolutions also see earlier conversations of a row.
    With false, each row is one conversation. For conversations only."""
    files: list[str] = field(default_factory=list)
    """Paths or globs of .txt, .md, .py, .jsonl, .json, .csv and .parquet files, optionally compressed as .gz
    or .zst, for data.source=files only, which they select if ``data.source`` is not set."""
    document_separator: str | None = None
    r"""Text between the documents of a .txt, .md or .py file, in which \n is a line end and \t a tab (null: a
    file is one document)."""
    validation: list[str] = field(default_factory=list)
    """Paths or globs of files to validate on, of the types of ``data.files``, or of ``data.tokens`` for
    data.source=tokens ([]: hold out ``data.val_fraction`` of the text, or use ``data.hub_val_split``)."""
    tokens: list[str] = field(default_factory=list)
    """Files of token ids, which were prepared by another program with ``data.tokenizer``: .bin, .npy, a .bin
    with its .idx as Megatron writes them, or folders with these. For data.source=tokens only, which they
    select if ``data.source`` is not set. In a folder, val.bin or val.npy is the validation split."""
    token_type: str = choice("uint16", *TOKEN_TYPES)
    """Type of the token ids of a .bin file without an index; uint16 as in nanoGPT."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Sources of a mixture with their weights, [{files: a.txt, weight: 2}, {hub_name: b, weight: 1}], for
    data.source=mixture only, which they select if ``data.source`` is not set."""
    text_column: str = "text"
    """Column of .jsonl, .json, .csv, .parquet and Hub data that contains the text."""
    hub_name: str | None = None
    """Name of a data set on the Hugging Face Hub, or path of a local folder that ``datasets`` can load, for
    data.source=hub only, which it selects if ``data.source`` is not set."""
    hub_config: str | None = None
    """Configuration of the Hub data set, if it has several."""
    hub_split: str = "train"
    """Split of the Hub data set to train on."""
    hub_val_split: str | None = None
    """Split of the Hub data set to validate on (null: hold out ``data.val_fraction`` of
    ``data.hub_split``)."""
    streaming: bool = False
    """Whether to stream the Hub data set instead of downloading it first; requires ``data.max_documents``."""
    protocol: str = choice("documents", "documents", "fairseq")
    """Text protocol: documents (whole documents, an end token after each) or fairseq, which published
    perplexities of WikiText-103 follow: lines without surrounding white space, an end token after each line,
    blank lines kept, and every token of the validation split scored. For task=causal only."""
    normalize_text: bool = True
    r"""Whether to convert the line ends \r\n and \r to \n and to remove byte order marks (U+FEFF). The report
    at the start of a run counts them. With false, only the mark at the start of a text file is removed."""
    max_documents: int | None = number(None, low=2)
    """Maximum number of documents to read, per split for data.source=hub (null: all)."""
    tokenizer: str | None = None
    """Path of a tokenizer.json or name of a tokenizer on the Hub (null: train a byte-level BPE on the
    training split)."""
    tokenizer_sample: int = number(1_000_000_000, low=1_000)
    """Maximum number of characters that a tokenizer is trained on. Of a larger training split it reads parts
    at equal distances."""
    eos_token: str = "<|endoftext|>"
    """End-of-document token. A given tokenizer must contain it."""
    mask_token: str | None = None
    """Mask token, added to a given tokenizer that lacks it, for task=masked only (null: <|mask|>)."""
    mask_fraction: float = number(0.15, above=0, high=0.99)
    """Fraction of the tokens of a row to predict, for task=masked only. As in BERT, 80 % of them become the
    mask token, 10 % a random token, and 10 % are unchanged."""
    val_fraction: float = number(0.02, above=0, high=0.5)
    """Fraction of the text to hold out for validation, in whole documents. For data.source=lra, fraction of
    the training examples of tasks without a validation split."""
    max_val_tokens: int | None = number(None, low=1)
    """Maximum number of tokens to validate on (null: all)."""
    batch_size: int = number(8, low=1, high=1_000_000)
    """Rows of ``model.max_length`` tokens per device and batch."""
    num_workers: int = number(0, low=0, high=1_024)
    """Number of data loader processes, of which at most one per usable CPU is started. 0 loads in the main
    process, which is fast enough for most models because rows are memory-mapped."""
    cache_dir: str | None = None
    """Folder of the tokenized data (null: $TNNLM_CACHE, else ~/.cache/tnnlm)."""
    listops: ListOpsConfig = field(default_factory=ListOpsConfig)
    """Settings of the generated expressions, for data.source=listops only."""
    lra: ArchiveConfig = field(default_factory=ArchiveConfig)
    """Settings of the Long Range Arena, for data.source=lra only."""


@dataclass(kw_only=True)
class TrainerConfig:
    """Length of the training, hardware, precision and logging."""

    max_steps: int = number(2000, low=1)
    """Number of optimizer steps to train for."""
    val_every_n_steps: int = number(500, low=1)
    """Number of optimizer steps between validations. The last step is always validated."""
    log_every_n_steps: int = number(20, low=1)
    """Number of optimizer steps between rows of metrics.csv. The last step is always logged."""
    precision: str = choice("auto", "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
    """Lightning's precision plugin; auto selects bf16-mixed on hardware that computes in bfloat16, else
    32-true."""
    accelerator: str = "auto"
    """Lightning's accelerator; auto selects a CUDA or ROCm GPU if available, else the CPU."""
    devices: int | str = number("auto", low=1, high=1_024, word="auto")
    """Number of devices per node; auto selects all GPUs, or one CPU process."""
    num_nodes: int = number(1, low=1, high=100_000)
    """Number of nodes (machines)."""
    strategy: str = "auto"
    """Lightning's distributed strategy. auto and ddp replicate the model on every device; fsdp shards
    parameters, gradients and optimizer states over all devices; hsdp (hybrid sharding) shards them over
    groups of ``trainer.shard_size`` devices and replicates them between the groups."""
    shard_size: int | str = number("auto", low=1, high=1_048_576, word="auto")
    """Number of consecutive devices that share one copy of the model, for strategy=hsdp only; auto: the
    devices of one node, so that weights are gathered within a node. Must divide the number of devices."""
    context_parallel: int = number(1, low=1, high=1_024)
    """Number of devices that share each sequence, for sequences too long for one device (1: none are shared).
    A device holds the activations of its part of the tokens; around each convolution, the devices exchange
    parts of the sequence for parts of the channels. Must divide the number of devices and
    ``model.max_length``. For task=causal with strategy auto or ddp only."""
    accumulate: int = number(1, low=1, high=1_000_000)
    """Number of batches to accumulate gradients over before each optimizer step."""
    skip_nonfinite: bool = True
    """Whether to skip optimizer steps whose loss or gradient is NaN or infinite."""
    spike_factor: float = number(0.0, low=0, high=1e6)
    """Skip optimizer steps whose loss exceeds this multiple of its running mean over about 50 steps; 0
    disables the check."""
    max_skipped: int = number(10, low=1, high=1_000_000)
    """Maximum number of consecutive skipped steps. The run then stops, and the last good checkpoint is
    kept."""
    compile: bool = False
    """Whether to compile the blocks with torch.compile; about a tenth faster on a CPU, after half a minute of
    compilation."""
    recompute: bool = False
    """Activation checkpointing: store only the input of each block for the backward pass. Saves memory on
    long sequences for a third more compute."""
    ema_decay: float | None = number(None, above=0, high=0.999999)
    """Decay per step of an exponential moving average of the weights, which is then validated, saved and
    converted instead of the weights (null: no averaging)."""
    wandb: str | None = None
    """Weights & Biases project to log to, in addition to metrics.csv and TensorBoard (null: none). Requires
    the extra [wandb]; WANDB_MODE=offline is supported."""
    loggers: list[Component] = field(default_factory=list)
    """Loggers of Lightning, in addition to metrics.csv and TensorBoard: class paths, or mappings of
    class_path and init_args. A logger that takes a ``save_dir`` gets the folder ``loggers`` of the run."""
    callbacks: list[Component] = field(default_factory=list)
    """Callbacks of Lightning, in addition to those of the run: class paths, or mappings of class_path and
    init_args."""
    profiler: Component | None = None
    """Profiler of Lightning (null: none): simple, advanced, pytorch, a class path, or a mapping of class_path
    and init_args. It writes into the folder ``profile`` of the run, on the first rank."""
    sample_prompt: str | None = text(None, empty=True)
    """Prompt of the sample that is generated at each validation (null: the first words of the text that is
    validated on; for conversations, none)."""
    sample_tokens: int = number(64, low=0, high=100_000)
    """Maximum number of tokens of each sample; 0 disables samples."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpointing of the run."""

    every_n_steps: int = number(500, low=1)
    """Number of optimizer steps between saves of last.ckpt. The checkpoint before it is kept as
    previous.ckpt."""
    format: str = choice("file", "file", "sharded")
    """Format of checkpoints: file (one file, which the first rank assembles and writes while the training
    waits) or sharded (every rank writes its shards while the training continues, and the checkpoint becomes
    valid when all are written), for strategy=fsdp and hsdp only. Both can be converted and resumed on any
    number of devices."""


@dataclass(kw_only=True)
class ConversionConfig:
    """Conversion of kernels to recurrences.

    The default method of a new run is auto if the recurrences of etsc would take 1 GiB or more.
    """

    method: str = choice("etsc", "balanced", "auto", "etsc", "window", "companion", "multirate", "gradient")
    """Conversion method: balanced (the fewest poles that meet the tolerance), etsc (the published conversion,
    exact below the horizon), window (direct convolution over the most recent inputs), companion (the exact
    recurrence that a kernel such as rtf defines), multirate (the exact recurrence of sgconv, for few
    operations per token), auto (per layer, whichever of these has the smallest state within the tolerance)
    or gradient (fitted with Adam, a slow baseline)."""
    horizon: int | str = number("auto", low=1, high=1 << 20, word="auto")
    """Number of lags that the recurrence must reproduce; auto: the lags until the remaining energy of the
    kernel is below float32 rounding, or the training length if it does not decay."""
    tolerance: float = number(1e-3, above=0, high=0.999)
    """Maximum relative error of the taps, for balanced and auto."""
    order: int | None = number(None, low=1, high=1 << 20)
    """State size in real numbers per channel (null: the smallest that meets the tolerance; 16 for
    gradient)."""
    poles: str = choice("shared", "shared", "channel")
    """Whether all channels of a layer share one set of poles or each channel has a separate set, for
    balanced."""
    window_taps: int = number(0, low=0, high=1 << 20)
    """Number of lags that are computed exactly by direct convolution before the poles take over, for
    balanced."""
    gradient_steps: int = number(2000, low=1, high=100_000_000)
    """Number of Adam steps, for gradient."""
    gradient_lr: float = number(1e-2, above=0, high=100)
    """Learning rate of Adam, for gradient."""
    chunk: int = number(256, low=1, high=1 << 20)
    """Number of tokens per prefill chunk when the recurrent form is validated."""


MASK_TOKEN = "<|mask|>"
"""Default of ``data.mask_token`` for task=masked."""
SMALLEST_TEXT = 257
"""Minimum vocabulary size for text: every byte and an end-of-document token."""
SMALLEST_MASKED = 258
"""Minimum size of a tokenizer trained for task=masked: every byte, an end-of-document and a mask token."""
LABELLED = ("listops", "lra")
"""Values of ``data.source`` that provide labelled sequences, for task=classify."""
TASKS = ("causal", "masked", "classify")
"""Values of ``task``."""


@dataclass(kw_only=True)
class Config:
    """All settings of a run."""

    name: str = "demo"
    """Name of the run, which is its folder under ``runs_dir``."""
    task: str = choice("causal", *TASKS)
    """Training task: causal (next-token prediction), masked (bidirectional masked language modelling) or
    classify (classification of whole sequences)."""
    seed: int = number(0, low=0, high=2**32 - 1)
    """Random seed of the initialisation, data order, dropout, masking and validation split."""
    runs_dir: str = "runs"
    """Folder that contains the runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    conversion: ConversionConfig = field(default_factory=ConversionConfig)

    @property
    def runs_folder(self) -> Path:
        """Path of ``runs_dir``; a shell doesn't expand the ``~`` in ``runs_dir=~/runs``."""
        return Path(os.path.expanduser(self.runs_dir))  # Path.expanduser fails for an unknown user
