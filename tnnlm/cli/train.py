"""Train a language model with FFT convolutions, and turn its checkpoints into recurrences.

Examples:
  tnnlm train                                                # the demo, on Python's own sources
  tnnlm train data.source=files data.files=book.txt name=book
  tnnlm train --config tnn_wt103 --dry-run
  tnnlm train --resume                                       # the newest run; or --resume NAME
  tnnlm train --job nightly --config rtf_demo                # begin, or go on: the same command each time
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tnnlm.cli.usage import add_settings, parser_of
from tnnlm.config.loader import config_to_yaml, load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; ``words`` are those of the command line, None takes them from there."""
    parser = parser_of("train", __doc__)
    add_settings(parser)
    add = parser.add_argument_group("runs that go on").add_argument
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run by name or folder (default: the newest)",
    )
    add(
        "--from",
        dest="source",
        choices=("last", "previous"),
        default="last",
        help="with --resume: the checkpoint to go on from (default: last)",
    )
    add(
        "--job",
        nargs="?",
        const="",
        metavar="NAME",
        help="continue the run that this job began, else begin one (default NAME: the SLURM job's number); "
        "on the time limit's signal, SIGUSR1, it is saved and the SLURM job requeued",
    )
    add = parser.add_argument_group("before training").add_argument
    add("--dry-run", action="store_true", help="show settings, sizes and memory, train nothing")
    add("--json", action="store_true", help="with --dry-run: as JSON")
    add("--find-lr", action="store_true", help="try 100 rising learning rates, suggest one, train nothing")
    args = parser.parse_intermixed_args(words)
    # "--resume key=value" means the newest run, "--job key=value" the SLURM job: no name has a "=".
    for option in ("resume", "job"):
        if "=" in (getattr(args, option) or ""):
            args.overrides.insert(0, getattr(args, option))
            setattr(args, option, "")
    if args.job is not None and args.resume is not None:
        parser.error("--job finds its own run: leave --resume out")
    if args.source != "last" and args.resume is None:
        parser.error("--from goes with --resume")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parse(words)
    if args.dry_run:
        show(choose(args)[0], args.json)
        return 0
    if args.find_lr:
        search(choose(args)[0])
        return 0
    from tnnlm.training.callbacks.checkpoint import TrainingDiverged, TrainingStopped
    from tnnlm.training.resume import SOURCES, is_complete
    from tnnlm.training.run import is_main_process, train
    from tnnlm.training.slurm import TimeLimit, time_limit_noticed

    try:
        with time_limit_noticed():
            config, run, job = choose(args)
            if job is not None and run is not None and is_complete(config, run):
                print(f"{run}: is complete, nothing is left to do")
                return 0
            train(config, run, source=SOURCES[args.source], job=job)
    except TrainingStopped as stopped:
        # One process speaks for all; Lightning would end the others' on a code of theirs.
        return on_stop(args, str(stopped), stopped.time_limit) if is_main_process() else 0
    except TimeLimit:
        return on_stop(args, "stopped outside of training", True) if is_main_process() else 0
    except TrainingDiverged:
        if is_main_process():
            raise
    return 0


def choose(args: argparse.Namespace) -> tuple[Config, Path | None, str | None]:
    """Settings, the run to continue if there is one, and the job it belongs to."""
    if args.resume is not None:
        from tnnlm.checkpoints.locate import find_run
        from tnnlm.training.resume import resumed_config

        run = find_run(args.resume or None, Path("runs"))
        return resumed_config(run, args.overrides), run, None
    config = load_config(find_config(args.config), args.overrides)
    if args.job is None:
        return config, None, None
    from tnnlm.training.slurm import find_job, job_name

    job = job_name(args.job)
    found = find_job(job, config)
    if found is not None:
        config.name = found.name
    return config, found, job


def on_stop(args: argparse.Namespace, line: str, time_limit: bool) -> int:
    """Say how to go on; on a cluster's time limit see to it that the job does."""
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


def search(config: Config) -> None:
    from tnnlm.training.lr_finder import find_lr, plot_rates

    found = find_lr(config)
    path = Path(config.runs_dir) / f"{config.name}-lr_find.png"
    plot_rates(found, path)
    print(f"suggested: optim.lr={found.suggestion:.1e}")
    print(f"the loss falls fastest at {found.steepest:.1e}, and is lowest at {found.lowest:.1e}")
    print(f"drawn in {path}; a rate found in 100 steps is a start, not an optimum")


def show(config: Config, as_json: bool) -> None:
    from tnnlm.training.estimate import estimate_run

    plan = estimate_run(config)
    if as_json:
        print(json.dumps({"config": asdict(config), **asdict(plan)}, indent=2))
        return
    print(config_to_yaml(config))
    print(f"params: {plan.params:,} trainable, {plan.buffers:,} frozen")
    print(f"tokens per update: {plan.tokens_per_update:,} ({plan.total_tokens:,} in all)")
    print(
        f"estimated memory: {plan.memory_bytes / 2**30:.2f} GiB per device ({plan.devices}), {plan.precision}"
    )
