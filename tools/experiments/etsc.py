"""The tables of ETSC's paper (arXiv 2311.08756): perplexity, error and time of conversion, token cost."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments import etsc_report
from experiments.comparison import Sizes, Taps, scaling
from experiments.etsc_cost import token_cost
from experiments.experiment import Experiment, Row, Verdict
from experiments.scoring import score, spread
from experiments.sizing import text_models
from experiments.training import train_family
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.evaluation import ppl_gap
from tnnlm.kernels import TNOConfig, TNOKernel
from tnnlm.models.causal_lm import CausalLM

_FAMILIES = ("tnn", "sgconv")
_STEPS = {"tiny": 20, "small": 400, "paper": 0}
_MULTIPLES = {"tiny": (1, 4), "small": (1, 2, 4, 8, 16), "paper": (1, 2, 4, 8, 16, 28)}
"""contexts, in training lengths"""
_TOKENS = {"tiny": 1 << 9, "small": 1 << 15, "paper": 1 << 16}
"""held-out tokens per context, one row at the least"""
_LENGTHS = {"tiny": (16, 64), "small": (64, 256, 1024, 4096, 16384)}
_WIDTHS = {"tiny": (8, 32), "small": (64, 256, 1024, 4096)}
_WIDTH_LENGTH = {"tiny": 32, "small": 1024, "paper": 2048}
_CHANNELS = 64
_COST = {
    "tiny": {"length": (16, 128), "width": (16,), "depth": (1, 2)},
    "small": {
        "length": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
        "width": (64, 128, 256, 512, 768, 1280),
        "depth": (1, 2, 4, 8, 12),
    },
}
_COST["paper"] = _COST["small"]
_LENGTHS["paper"] = _LENGTHS["small"]
_WIDTHS["paper"] = (*_WIDTHS["small"], 16384)
_BASE = {
    "tiny": {"length": 32, "width": 16, "depth": 1},
    "small": {"length": 1024, "width": 256, "depth": 2},
    "paper": {"length": 2048, "width": 512, "depth": 6},
}
"""what is not varied"""


class ETSC(Experiment):
    """Is the conversion exact, is it fast, and is the token cheap."""

    name = "etsc"
    title = "Exact Toeplitz-to-SSM conversion"

    def cells(self, size: str) -> list[Row]:
        """Perplexity by family, conversion by taps and channels, token cost by length, width and depth."""
        cells: list[Row] = [
            {"part": "perplexity", "family": family, "seed": 0, "steps": _STEPS[size], "size": size}
            for family in _FAMILIES
        ]
        cells += [
            {"part": "conversion", "sweep": "length", "n": n, "d": _CHANNELS, "size": size}
            for n in _LENGTHS[size]
        ]
        cells += [
            {"part": "conversion", "sweep": "width", "n": _WIDTH_LENGTH[size], "d": d, "size": size}
            for d in _WIDTHS[size]
        ]
        return cells + [
            {"part": "cost", "sweep": sweep, **_BASE[size], sweep: value}
            for sweep, values in _COST[size].items()
            for value in values
        ]

    def measure(self, cell: Row) -> Row:
        """One cell of one part."""
        if cell["part"] == "perplexity":
            return self._perplexity(cell)
        if cell["part"] == "conversion":
            return _conversion(cell)
        return token_cost(cell["length"], cell["width"], cell["depth"])

    def _perplexity(self, cell: Row) -> Row:
        models = text_models(_FAMILIES, cell["size"], cell["steps"], self.data)
        family = models.families[cell["family"]]
        model, _ = train_family(family, models.rows, cell["seed"])
        assert isinstance(model, CausalLM)
        model.eval()
        contexts: Row = {}
        for multiple in _MULTIPLES[cell["size"]]:
            length = multiple * family.config.model.max_length
            available = models.corpus.rows("val", length)
            if not len(available):
                continue
            rows = spread(available, _TOKENS[cell["size"]])
            parallel = score(model, rows, None)
            found: Row = {"tokens": parallel.tokens, "parallel": parallel.ppl, "gap": {}}
            recipes = {
                "etsc": ConversionConfig(method="etsc", horizon=length),
                "auto": ConversionConfig(method="auto"),
            }
            for name, recipe in recipes.items():
                try:
                    converted = convert_model(model, recipe)
                except UserError as error:
                    found[name], found["gap"][name] = str(error), None
                    continue
                ppl = score(converted, rows, family.config.conversion.chunk).ppl
                found[name], found["gap"][name] = ppl, ppl_gap(parallel.ppl, ppl)
            contexts[str(length)] = found
        return {"contexts": contexts, "params": family.params}

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """See :mod:`experiments.etsc_report`."""
        return etsc_report.verdicts(rows)

    def tables(self, rows: list[Row]) -> str:
        """One per part and sweep."""
        return etsc_report.tables(rows)

    def plot(self, rows: list[Row], path: Path) -> None:
        """Error and time of conversion above, time and memory of a token below."""
        etsc_report.plot(rows, path)


def _conversion(cell: Row) -> Row:
    """Of the taps of an untrained TNO layer, by every method that the package has."""
    tiny = cell["size"] == "tiny"
    sizes = Sizes(
        lengths=(cell["n"],),
        channels=cell["d"],
        widths=(),
        order=8 if tiny else 32,
        gradient_steps=20 if tiny else 1000,
    )
    torch.manual_seed(0)
    kernel = TNOKernel(TNOConfig(), cell["d"])

    def taps(length: int) -> Taps:
        with torch.no_grad():
            return Taps(kernel(length), kernel.decay)

    rows = scaling(taps, sizes)
    return {"methods": {row["method"]: _kept(row) for row in rows}}


def _kept(row: Row) -> Row:
    return {key: row[key] for key in ("seconds", "error", "condition", "skipped") if key in row}
