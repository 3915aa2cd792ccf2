"""Model card of a converted folder (README.md), rendered from the measurements of the run and its conversion.

The template is model_card.md.j2. The card begins with metadata for the Hugging Face Hub. It contains
measured numbers only.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config
from tnnlm.deployment.card_metadata import NOTHING_STATED, Stated, card_metadata, data_names, is_local, line
from tnnlm.deployment.perplexity import perplexity_cells
from tnnlm.models.causal_lm import CausalLM

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def model_card(
    config: Config,
    step: int,
    trained: CausalLM,
    report: ModelReport,
    note: str | None = None,
    stated: Stated = NOTHING_STATED,
    prompt: str = "",
) -> ModelCard:
    """Return the model card, whose text is the content of README.md.

    Args:
        config: Configuration of the run.
        step: Number of optimizer steps of the checkpoint; 0 for imported weights.
        trained: Trained model, in its parallel form.
        report: Report of the conversion, with perplexities if they were measured.
        note: Reason why perplexities were not measured.
        stated: License, languages and data sets that the user states.
        prompt: Prompt of the examples, in the language of the data; empty if none is known.
    """
    sizes = trained.config
    base = config.init.weights
    public = base if base is not None and not is_local(base) else None
    text = _template().render(
        metadata=card_metadata(config, step > 0, report, stated, public).to_yaml(),
        license=stated.license,
        prompt=json.dumps(prompt or "TEXT", ensure_ascii=False),
        known_prompt=bool(prompt),
        shell_prompt=shlex.quote(prompt or "TEXT"),
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
        data_names=data_names(config.data),
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
    return ModelCard(text)


def _template() -> Template:
    # The card is Markdown, so HTML is not escaped; the filters `line` and `code` keep values on one line.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"line": line, "code": _code}
    return environment.get_template(TEMPLATE.name)


def _code(text: str) -> str:
    """Format a user's string as inline code, with backticks replaced, because they would end it."""
    return f"`{line(text).replace('`', chr(39))}`"
