"""Benchmark of convert.py: seconds for whole runs, and for one layer of a large shape times its layers.

Runs are converted by the command, with perplexities and without a compiled step; their converted folders are
replaced. Layers of the large shape have random weights. They are converted one after the other and hold
equally many channels, so that the time of the model is that of one layer times the number of layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.installed import run_command
from experiments.commits import ROOT, provenance
from tnnlm.checkpoints.locate import CONVERTED
from tnnlm.config.loader import load_config
from tnnlm.config.schema import ConversionConfig
from tnnlm.config.shipped import find_config
from tnnlm.conversion import convert_layers, measure
from tnnlm.errors import run_script
from tnnlm.files import write_text
from tnnlm.models.causal_lm import CausalLM

OUT = ROOT / "docs/records/convert.json"
METHOD = "auto"


def time_of_run(run: Path) -> dict[str, str]:
    """Convert a run by the command, and return its row of the table.

    Raises:
        UserError: If the conversion fails.
    """
    started = time.perf_counter()
    run_command("convert.py", str(run), "--method", METHOD, "--force", "--no-compile")
    seconds = time.perf_counter() - started
    report = json.loads((run / CONVERTED / "conversion.json").read_text(encoding="utf-8"))
    tokens = ", ".join(f"{count:,} at {int(length):,}" for length, count in report["ppl_tokens"].items())
    methods = ", ".join(sorted({layer["method"] for layer in report["layers"]}))
    return {
        "run": run.name,
        "methods of the layers": methods,
        "conversion, s": f"{report['seconds']:.1f}",
        "command, s": f"{seconds:.0f}",
        "tokens scored": tokens,
    }


def time_of_layer(name: str) -> dict[str, float]:
    """Convert one layer of a configuration with random weights, and return the seconds and those of all."""
    config = load_config(find_config(name)).model
    torch.manual_seed(0)
    # The vocabulary does not matter for a conversion.
    model = CausalLM(replace(config, n_layers=1, vocab_size=512)).eval()
    started = time.perf_counter()
    horizon, layers = convert_layers(model, ConversionConfig(method=METHOD))
    seconds = time.perf_counter() - started
    measure(model, layers, method=METHOD, horizon=horizon, seconds=seconds)
    total = time.perf_counter() - started
    return {
        "layer_seconds": total,
        "layers": config.n_layers,
        "channels": len(layers[0].params.taps(1)),
        "minutes": total * config.n_layers / 60,
    }


def main() -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="Folders of runs, which are converted.")
    parser.add_argument("--shape", default="tnn_1b3_fineweb", help="Configuration of the large shape.")
    parser.add_argument("--machine", default="an unnamed machine", help="Description of the machine.")
    parser.add_argument("--out", type=Path, default=OUT, help="Record to write.")
    args = parser.parse_args()
    command = f"python -m benchmarks.convert_time {' '.join(map(str, args.runs))}".strip()
    record = provenance(command, args.machine) | {
        "values": time_of_layer(args.shape),
        "tables": {"runs": [time_of_run(run) for run in args.runs]},
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    print(args.out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
