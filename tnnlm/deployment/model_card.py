"""Model card of a converted folder (README.md), rendered from the measurements of the run and its conversion.

The template is model_card.md.j2. The card begins with metadata for the Hugging Face Hub. It contains
measured numbers only.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config, DataConfig
from tnnlm.config.sources import kind_of
from tnnlm.config.text_sources import SourceConfig
from tnnlm.deployment.perplexity import perplexity_cells
from tnnlm.models.causal_lm import CausalLM

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def model_card(
    config: Config,
    step: int,
    trained: CausalLM,
    report: ModelReport,
    note: str | None = None,
    license: str | None = None,
) -> str:
    """Return the content of README.md.

    Args:
        config: Configuration of the run.
        step: Number of optimizer steps of the checkpoint; 0 for imported weights.
        trained: Trained model, in its parallel form.
        report: Report of the conversion, with perplexities if they were measured.
        note: Reason why perplexities were not measured.
        license: License identifier of the model on the Hub, such as ``apache-2.0``; None if not stated.
    """
    sizes = trained.config
    base = config.init.weights
    public = base if base is not None and not _is_local(base) else None
    metadata = ModelCardData(
        license=_line(license) if license else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=_line(public) if public else None,
        tags=["tnnlm", _line(config.model.kernel.name), "long-convolution", "recurrent"],
        datasets=_public_data(config.data) if step else None,
    )
    return _template().render(
        metadata=metadata.to_yaml(),
        license=license,
        name=config.name,
        kernel=sizes.kernel.name,
        sizes={
            "trained parameters": f"{trained.n_params:,}",
            "layers, width, mixer channels": f"{sizes.n_layers}, {sizes.d_model}, "
            f"{sizes.expand * sizes.d_model}",
            "vocabulary": f"{sizes.vocab_size:,}",
            "training length": f"{sizes.max_length:,} tokens",
            "optimizer steps": f"{step:,}" if step else "not known",
            "state per sequence": f"{report.state_bytes:,} bytes, at any length",
        },
        imported=not step,
        base=public or (base and Path(base).name),
        data=config.data,
        data_names=_data_names(config.data),
        tokenizer=Path(config.data.tokenizer).name if config.data.tokenizer else None,
        vocab_size=sizes.vocab_size,
        report=report,
        lengths=[f"{int(length):,} tokens" for length in report.ppl.get("parallel", {})],
        measured_on=[
            f"{n_tokens:,} tokens at a context of {int(length):,}"
            for length, n_tokens in report.ppl_tokens.items()
        ],
        perplexities=perplexity_cells(report),
        note=note or "no validation data was available",
        layers=[[str(index), layer.method, *layer.figures()] for index, layer in enumerate(report.layers)],
    )


def _template() -> Template:
    # The card is Markdown, so HTML is not escaped; the filters `line` and `code` keep values on one line.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"line": _line, "code": _code}
    return environment.get_template(TEMPLATE.name)


def _line(text: str) -> str:
    """Join the lines of a user's string, because a second line could be a heading or end the metadata."""
    return " ".join(text.split())


def _code(text: str) -> str:
    """Format a user's string as inline code, with backticks replaced, because they would end it."""
    return f"`{_line(text).replace('`', chr(39))}`"


def _public_data(data: DataConfig) -> list[str] | None:
    """Return the Hub data set for the metadata, as a list of one name, or None for local data."""
    name = data.hub_name
    return [_line(name)] if data.source == "hub" and name and not _is_local(name) else None


def _data_names(data: DataConfig | SourceConfig) -> list[str]:
    """Return the names of the data files, or of the data set with its configuration and split."""
    if isinstance(data, DataConfig) and data.source == "mixture":
        return [name for part in data.sources if part.source != "stdlib" for name in _data_names(part)]
    kind = kind_of(data) if isinstance(data, SourceConfig) else data.source
    if kind in ("files", "tokens"):
        return [Path(name).name for name in (data.files if kind == "files" else data.tokens)]
    hub_name = data.hub_name or ""
    shown = Path(hub_name).name if _is_local(hub_name) else hub_name
    return [part for part in (shown, data.hub_config or "", f"split {data.hub_split}") if part]


def _is_local(name: str) -> bool:
    """Return whether a data set's name is a local path, which the card must not disclose."""
    return name.startswith(("/", ".", "~")) or Path(name).exists()
