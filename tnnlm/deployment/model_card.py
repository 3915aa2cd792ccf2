"""README.md of a converted folder: a model card, written from what the run and its conversion measured.

The front matter is what the Hugging Face hub reads. A number that was not measured is not named.
"""

from __future__ import annotations

import json
from pathlib import Path

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config, DataConfig
from tnnlm.evaluation import ppl_gap
from tnnlm.models.causal_lm import CausalLM

KERNELS = {
    "tno": "Toeplitz neural operator kernels (TNN, [arXiv 2305.04749](https://arxiv.org/abs/2305.04749))",
    "fd_tno": "frequency-domain Toeplitz neural operator kernels "
    "(FD-TNN, [arXiv 2305.09028](https://arxiv.org/abs/2305.09028))",
    "sgconv": "SGConv kernels ([arXiv 2210.09298](https://arxiv.org/abs/2210.09298))",
    "rtf": "rational transfer functions (RTF, [arXiv 2405.06147](https://arxiv.org/abs/2405.06147))",
}
METHODS = {
    "balanced": "balanced reduction: few poles per layer, as many as the tolerance needed",
    "auto": "per layer the smallest of several forms that met the tolerance",
    "etsc": "exact Toeplitz-to-SSM conversion (ETSC, [arXiv 2311.08756](https://arxiv.org/abs/2311.08756)): "
    "exact at lags below the horizon",
    "window": "the last inputs themselves: exact at lags below the horizon, zero from there on",
    "companion": "the recurrence that the kernel has by itself: exact at every lag",
    "gradient": "a recurrence of fixed order, fitted by Adam",
}


def model_card(
    config: Config, step: int, trained: CausalLM, report: ModelReport, note: str | None = None
) -> str:
    """The text of README.md.

    Args:
        config: of the run.
        step: optimizer steps that the checkpoint had seen.
        trained: the model in its parallel form.
        report: of the conversion, with perplexities if there are any.
        note: why there are none.
    """
    parts = [
        _front_matter(config),
        f"# {config.name}",
        _summary(config, step, trained, report),
        "## Data\n\n" + _data(config.data, trained.config.vocab_size),
        "## Perplexity\n\n"
        + (
            _perplexities(report)
            or f"Not measured ({(note or 'no text was at hand').removeprefix('no perplexities: ')})."
        ),
        "## Conversion\n\n" + _conversion(report),
        "## Use\n\n" + _USE,
        "## Licence\n\nNot stated yet: whoever publishes this model names one, here and as `license:` above.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Config) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [
        "tags:",
        "- tnnlm",
        f"- {json.dumps(config.model.kernel.name)}",
        "- long-convolution",
        "- recurrent",
    ]
    name = config.data.hub_name
    if config.data.source == "hub" and name and not _is_local(name):
        lines += ["datasets:", f"- {json.dumps(name)}"]
    return "\n".join(["---", *lines, "# license: name one before publishing", "---"])


def _summary(config: Config, step: int, trained: CausalLM, report: ModelReport) -> str:
    sizes = trained.config
    kernel = KERNELS.get(sizes.kernel.name, f"kernels of its own kind (`{sizes.kernel.name}`)")
    rows = {
        "trained parameters": f"{trained.n_params:,}",
        "layers, width, mixer channels": f"{sizes.n_layers}, {sizes.d_model}, {sizes.expand * sizes.d_model}",
        "vocabulary": f"{sizes.vocab_size:,}",
        "trained on rows of": f"{sizes.max_length:,} tokens",
        "optimizer steps": f"{step:,}",
        "state per sequence": f"{report.state_bytes:,} bytes, at any length",
    }
    return (
        f"A language model of long convolutions with {kernel}. Trained in parallel by FFT convolutions; here "
        "every convolution is a small linear recurrence, so that a token costs the same time and memory "
        "however long the text is.\n\n" + _table(["", ""], [list(row) for row in rows.items()])
    )


def _data(data: DataConfig, vocab_size: int) -> str:
    if data.source == "stdlib":
        text = "The Python sources of the standard library of the Python that trained it."
    elif data.source == "files":
        text = "Files of the trainer's own: " + ", ".join(f"`{Path(name).name}`" for name in data.files) + "."
    else:
        hub_name = data.hub_name or ""
        shown = Path(hub_name).name if _is_local(hub_name) else hub_name
        named = [shown, data.hub_config or "", f"split {data.hub_split}"]
        text = "The data set " + ", ".join(f"`{part}`" for part in named if part) + "."
    if data.max_documents:
        text += f" At most {data.max_documents:,} documents of it."
    if data.source == "hub" and data.hub_val_split:
        text += f" Validated on split `{data.hub_val_split}`."
    else:
        text += f" {100 * data.val_fraction:.3g} % of the text, by document, was held out for validation."
    if data.tokenizer:
        return f"{text}\n\nTokenizer: `{Path(data.tokenizer).name}`."
    return f"{text}\n\nTokenizer: byte-level BPE of at most {vocab_size:,} entries, trained on the same text."


def _is_local(name: str) -> bool:
    """Whether a data set's name is a folder's: its place on a disk is nobody's business."""
    return name.startswith(("/", ".", "~")) or Path(name).exists()


def _perplexities(report: ModelReport) -> str | None:
    parallel = report.ppl.get("parallel")
    if not parallel:
        return None
    names = {"parallel": "parallel (FFT), as trained", "recurrent": "**recurrent, these weights**"}
    rows = []
    for form, values in report.ppl.items():
        cells = [f"{value:.4f}" for value in values.values()]
        if form != "parallel":
            gaps = (ppl_gap(parallel[length], value) for length, value in values.items())
            cells = [f"{cell} ({gap:+.1e})" for cell, gap in zip(cells, gaps, strict=True)]
        rows.append([names.get(form, form), *cells])
    return (
        "Per token of held-out text, in rows of so many tokens; in brackets the relative difference to the "
        "parallel form. Further rows are other forms of the same model, measured beside it.\n\n"
        + _table(["form", *(f"{int(length):,} tokens" for length in parallel)], rows)
        + "".join(f"\n\nNot measured: {form} ({why})." for form, why in report.not_measured.items())
    )


def _conversion(report: ModelReport) -> str:
    text = f"Method `{report.method}`: {METHODS[report.method]}. Horizon: {report.horizon:,} lags."
    if report.warning:
        text += f"\n\n**Limit:** {report.warning}."
    head = [
        "layer",
        "method",
        "order",
        "tap error",
        "l1 error",
        "tail energy",
        "Hankel ratio",
        "largest pole",
    ]
    rows = [[str(index), layer.method, *layer.figures()] for index, layer in enumerate(report.layers)]
    return (
        f"{text}\n\n{_table(head, rows)}\n\n"
        "Measured on the stored numbers. Order: real state numbers per channel. Tap error: of the kernel, "
        "relative, below the horizon. l1 error: of the worst channel, relative, past the horizon too; times "
        "the kernel's own l1 norm it bounds the error of an output for inputs within 1. Tail energy: the "
        "worst channel's share past the horizon. Hankel ratio: the error over the smallest that any "
        "recurrence of this order can have; - where that is rounding or not defined."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_USE = """Both ways need the package tnnlm; the first one its extra `[hf]`. `FOLDER` is this folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))
```

```sh
python generate.py --model FOLDER --prompt "The"
```

The end token of a document is its padding as well; there is no token for a beginning. Nothing cuts off the
context. What a model writes is what its data made likely, true or not."""
