#!/usr/bin/env python
"""Train a language model with FFT convolutions, and turn its checkpoints into recurrences.

Examples:
  python train.py                                                # the demo, on Python's own sources
  python train.py data.source=files data.files=book.txt name=book
  python train.py --config configs/tnn_wt103.yaml --dry-run
  python train.py --resume                                       # the newest run; or --resume NAME
  python train.py --job nightly name=book data.files=book.txt    # begin, or go on: the same command each time
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tnnlm.config.loader import config_to_yaml, load_config
from tnnlm.config.schema import Config
from tnnlm.errors import run_script

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: configs/demo.yaml)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run by name or folder (default: the newest)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=("last", "previous"),
        default="last",
        help="with --resume: the checkpoint to go on from (default: last)",
    )
    parser.add_argument(
        "--job",
        nargs="?",
        const="",
        metavar="NAME",
        help="continue the run that this job began, else begin one (default NAME: the SLURM job's number); "
        "on the time limit's signal, SIGUSR1, it is saved and the SLURM job requeued",
    )
    parser.add_argument(
        "--find-lr", action="store_true", help="try 100 rising learning rates, suggest one, train nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="show settings and sizes, train nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    args = parser.parse_intermixed_args()
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


def main() -> int:
    args = parse()
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
    config = load_config(args.config or DEMO, args.overrides)
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
    from tnnlm.training.estimate import make_plan

    plan = make_plan(config)
    if as_json:
        print(json.dumps(plan.to_dict(config), indent=2))
        return
    print(config_to_yaml(config))
    print(f"params: {plan.params:,} trainable, {plan.buffers:,} frozen")
    print(f"tokens per update: {plan.tokens_per_update:,} ({plan.total_tokens:,} in all)")
    print(
        f"estimated memory: {plan.memory_bytes / 2**30:.2f} GiB per device ({plan.devices}), {plan.precision}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
