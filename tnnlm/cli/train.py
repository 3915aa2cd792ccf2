"""Train a language model with FFT convolutions and convert its checkpoints into recurrences.

The run is written to runs/NAME: settings, checkpoints, metrics (CSV and TensorBoard) and samples. A setting
is a key=value pair; they are listed below, and --print-config prints all of them with their values.

Examples:
  tnnlm train                                           # the demo, on Python's sources
  tnnlm train data.files=book.txt name=book
  tnnlm train --config tnn_wt103 --dry-run              # settings, parameters, memory
  tnnlm train --resume                                  # resume the newest run
  tnnlm train --resume book trainer.max_steps=20000     # extend a finished run
  tnnlm train init.weights=runs/demo data.files=book.txt    # new run, from its weights
  tnnlm train --job nightly --config rtf_demo           # start it, or resume it
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tnnlm.cli.configured import configured
from tnnlm.cli.settings_help import SettingsParser
from tnnlm.cli.usage import (
    Condition,
    add_settings,
    add_trust,
    check_effective,
    given_options,
    parser_of,
    trust_of,
)
from tnnlm.config.interpolation import escaped
from tnnlm.config.loader import config_to_yaml
from tnnlm.config.schema import Config
from tnnlm.errors import UserError, collect_failure
from tnnlm.trust import Trust

if TYPE_CHECKING:
    from tnnlm.training.initial import InitialWeights

MODULE = "model.kernel.module="
"""Setting by which the user names the module of a kernel."""
CONDITIONS = {
    "--config": Condition(
        lambda args: args.resume is None,
        "has no effect with --resume, which takes the settings of the run",
        "omit it, and override settings with key=value",
    ),
    "--from": Condition(
        lambda args: args.resume is not None, "selects a checkpoint for --resume", "add --resume, or omit it"
    ),
    "--job": Condition(
        lambda args: args.resume is None, "selects the run by itself", "omit --resume or --job"
    ),
    "--init-from": Condition(
        lambda args: args.resume is None, "sets the weights of a new run", "omit --resume, or omit it"
    ),
    "--json": Condition(
        lambda args: args.dry_run, "formats the output of --dry-run", "add --dry-run, or omit it"
    ),
    "--print-config": Condition(
        lambda args: not args.dry_run and not args.find_lr,
        "prints all settings and nothing else",
        "omit --dry-run and --find-lr, or omit it",
    ),
    "--print-schema": Condition(
        lambda args: not (args.dry_run or args.find_lr or args.print_config or args.overrides),
        "prints the schema of all settings and nothing else",
        "omit the other options and settings",
    ),
    "--find-lr": Condition(
        lambda args: args.resume is None and args.job is None and not args.dry_run,
        "tries learning rates on a new model, without a run",
        "omit --resume, --job and --dry-run",
    ),
}
"""Conditions under which options have an effect. With --dry-run, the options of the run that it previews may
be given."""


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of("train", __doc__, SettingsParser)
    add_settings(parser)
    add = parser.add_argument_group("resuming").add_argument
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="Resume a run, given by name or folder. (default without RUN: the newest)",
    )
    add(
        "--from",
        dest="source",
        choices=("last", "previous"),
        default="last",
        help="Checkpoint that --resume starts from: last.ckpt or the one before it. (default: last)",
    )
    add(
        "--job",
        nargs="?",
        const="",
        metavar="NAME",
        help="Resume the run that this job started, or start one; on SIGUSR1, the signal before the time "
        "limit, save it and requeue the SLURM job. (default without NAME: the SLURM job ID)",
    )
    add = parser.add_argument_group("new runs").add_argument
    add(
        "--init-from",
        metavar="RUN|CKPT|CONVERTED|NAME",
        help="Start a new run from the weights and tokenizer of a run, a checkpoint, a converted folder or "
        "one of the Hugging Face Hub, with a new optimizer; the same as init.weights=... Its model settings "
        "are taken unless --config or settings override them.",
    )
    group = parser.add_argument_group("code of others")
    add_trust(group.add_argument, module=False, compiled=False, training=True)
    add = parser.add_argument_group("before training").add_argument
    add(
        "--dry-run",
        action="store_true",
        help="Print the changed settings, parameters and estimated memory, and exit; reads no data.",
    )
    add("--json", action="store_true", help="Print the output of --dry-run as JSON, with all settings.")
    add(
        "--print-config",
        action="store_true",
        help="Print all settings as YAML, which --config reads, and exit.",
    )
    add(
        "--print-schema",
        action="store_true",
        help="Print the JSON schema by which editors complete and check configuration files, and exit.",
    )
    add("--find-lr", action="store_true", help="Run the learning rate finder for 100 steps, and exit.")
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    parser = arguments()
    args = parser.parse_intermixed_args(words)
    # argparse takes the word after --resume or --job as its value, even if it is a setting.
    for option in ("resume", "job"):
        given = getattr(args, option) or ""
        if "=" in given and not any(os.path.isdir(folder) for folder in (given, f"runs/{given}")):
            args.overrides.insert(0, getattr(args, option))
            setattr(args, option, "")
    check_effective(parser, words, args, CONDITIONS)
    if args.init_from is not None:
        if any(word.startswith("init.weights=") for word in args.overrides):
            raise UserError("--init-from: init.weights is given as well", "omit one of them")
        args.overrides.append(f"init.weights={escaped(args.init_from)}")
    args.named = "--config" in given_options(parser, words)
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    if args.print_schema:
        from tnnlm.config.json_schema import schema_text

        print(schema_text(), end="")
        return 0
    if args.print_config:
        print(config_to_yaml(choose(args).config), end="")
        return 0
    if args.dry_run:
        from tnnlm.cli.dry_run import show

        show(choose(args).config, args.json)
        return 0
    if args.find_lr:
        chosen = choose(args)
        search(chosen.config, chosen.initial)
        return 0
    from tnnlm.training.callbacks.checkpoint import TrainingDiverged, TrainingStopped
    from tnnlm.training.resume import SOURCES, is_complete
    from tnnlm.training.run import is_main_process, train
    from tnnlm.training.slurm import TimeLimit, time_limit_noticed

    try:
        with time_limit_noticed():
            config, run, job, initial = choose(args)
            if job is not None and run is not None and is_complete(config, run):
                print(f"{run}: is complete; nothing to do")
                return 0
            train(config, run, source=SOURCES[args.source], job=job, initial=initial)
    except TrainingStopped as stopped:
        # Only the main process reports and requeues; on an exit code other than 0 of another process,
        # Lightning would terminate all of them.
        return on_stop(args, str(stopped), stopped.time_limit) if is_main_process() else 0
    except TimeLimit:
        return on_stop(args, "stopped outside of the training loop", True) if is_main_process() else 0
    except TrainingDiverged:
        if is_main_process():
            raise
    return 0


class Choice(NamedTuple):
    """Run that the arguments select."""

    config: Config
    """Settings of the run."""
    run: Path | None
    """Run to resume; None for a new one."""
    job: str | None
    """Name of its job, if any."""
    initial: InitialWeights | None = None
    """Weights that a new run starts from."""


def choose(args: argparse.Namespace) -> Choice:
    """Return the run that the arguments select."""
    if args.resume is not None:
        from tnnlm.checkpoints.locate import find_run
        from tnnlm.training.resume import resumed_config

        run = find_run(args.resume or None, Path("runs"))
        return Choice(resumed_config(run, args.overrides, trust(args)), run, None)
    config, initial = configured(args.config, args.overrides, named=args.named, trust=trust(args))
    if args.job is None:
        return Choice(config, None, None, initial)
    from tnnlm.training.slurm import find_job, job_name

    job = job_name(args.job)
    found = find_job(job, config, trust(args))
    if found is not None:
        config.name = found.name
    return Choice(config, found, job, initial)


def trust(args: argparse.Namespace) -> Trust:
    """Return the code that may run: besides ``--trust-code``, the kernel module on the command line."""
    named = [word for word in args.overrides if word.startswith(MODULE)]
    return replace(trust_of(args), module=named[-1].removeprefix(MODULE) if named else None)


def on_stop(args: argparse.Namespace, line: str, time_limit: bool) -> int:
    """Print why the run stopped, requeue the SLURM job on its time limit, and return the exit code."""
    from tnnlm.training.slurm import requeue, slurm_job

    print(line, file=sys.stderr)
    if not time_limit:
        return 130
    if slurm_job() is None:
        return 0
    if args.job is None and not args.resume:
        print("not requeued: without --job the same command would begin another run", file=sys.stderr)
        return 0
    print(f"requeued job {requeue()}", file=sys.stderr)
    return 0


def search(config: Config, initial: InitialWeights | None) -> None:
    """Run the learning rate finder; print its suggestion and write its plot next to the runs."""
    from tnnlm.training.lr_finder import find_lr, plot_rates

    found = find_lr(config, initial)
    path = config.runs_folder / f"{config.name}-lr_find.png"
    print(f"suggested: optim.lr={found.suggestion:.1e}")
    print(f"the loss falls fastest at {found.steepest:.1e} and is lowest at {found.lowest:.1e}")
    print("a rate found in 100 steps is a starting point, not an optimum")
    failures: dict[str, str] = {}
    with collect_failure(failures, str(path)):
        plot_rates(found, path)
    print("".join(f"warning: {place}: {reason}" for place, reason in failures.items()) or f"plot: {path}")
