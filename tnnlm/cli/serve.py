"""Serve a converted model: OpenAI-compatible completions and chat, web page at /, /health and /metrics.

Requests are batched. A sequence needs a few hundred kilobytes of state, whatever its length.

Examples:
  tnnlm serve                                        # the newest converted model
  tnnlm serve --model runs/demo --port 9000
  tnnlm serve --dtype int8 --max-batch 64            # quantized weights
  TNNLM_API_KEY=secret tnnlm serve --host 0.0.0.0    # reachable from the network
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def "}'

Needs the extra [serve]: fastapi, uvicorn and prometheus-client.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tnnlm.cli.usage import add_device, add_trust, errors_name_options, parser_of, trust_of
from tnnlm.errors import UserError, install_command

GRACE = 30
RANGES = {"port": (0, 65_535), "cache_mb": (0, 1 << 20), "max_answer_mb": (1, 1 << 20), "grace": (0, 86_400)}
"""Smallest and largest value of options that are not limits of the application, or have another unit."""
LIMITS = (
    ("max-batch", int, "N", 256, "Maximum sequences per batch."),
    ("max-queue", int, "N", 1024, "Maximum waiting sequences; further ones are rejected with status 429."),
    ("max-request-rows", int, "N", 64, "Maximum sequences of a request: prompts times n."),
    ("max-prompt-tokens", int, "N", 131_072, "Maximum tokens of the prompts of a request."),
    ("max-tokens", int, "N", 131_072, "Maximum new tokens of a sequence."),
    (
        *("max-answer-mb", int, "N", 32),
        "Maximum size in MiB of the answer to a request, estimated from prompts, n, max_tokens, logprobs and "
        "echo.",
    ),
    ("max-connections", int, "N", 2048, "Maximum open connections; further ones are closed."),
    (
        *("send-timeout", float, "S", 30),
        "Seconds after which the connection of a client that does not read is closed.",
    ),
    ("timeout", float, "S", 600, "Seconds per request, including the time in the queue."),
    ("cache-mb", int, "N", 256, "Memory in MiB of the prefix cache of prompt states; 0 disables it."),
    ("grace", int, "S", GRACE, "Seconds for running requests to finish after SIGTERM, SIGHUP or Ctrl-C."),
)
"""Options of the group of limits: name, type, unit, default and help."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "TNNLM_API_KEY"


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of("serve", __doc__)
    add = parser.add_argument_group("model and machine").add_argument
    add(
        "--model",
        metavar="DIR|RUN|CKPT",
        help="Converted model, run or checkpoint. (default: the newest converted model under runs/)",
    )
    add("--name", help="Model name reported by the API. (default: name of the run)")
    add_device(add)
    add(
        "--parse-special",
        action="store_true",
        help="Encode the names of special tokens in prompts, such as <|endoftext|>, as these tokens; for "
        "trusted clients only. (default: as text)",
    )
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="Engine: compiled (CPU), graph (GPU), packed or eager; auto selects the first available one. "
        "(default: auto)",
    )
    add(
        "--reproducible",
        action="store_true",
        help="Make completions bitwise independent of concurrent requests; a single client waits longer for "
        "each token. Needs an x86 CPU, with --dtype float32 or int8; other dtypes are refused where rounding "
        "depends on the batch. (default: rounding depends on the load)",
    )
    add(
        "--compile",
        action="store_true",
        help="Before serving, compile the decoding steps into the folder of the model, unless this machine "
        "did so earlier, for --engine auto and compiled on a CPU; needs a C++ compiler.",
    )
    add_trust(add)
    _add_network(parser)
    _add_limits(parser)
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="Address to listen on. (default: 127.0.0.1, this machine only)")
    add(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="Port to listen on; 0 selects a free one. (default: 8000)",
    )
    add(
        "--api-key",
        action="append",
        metavar="KEY",
        help="API key that clients must send; can be repeated, for one key per client. Prefer the "
        "environment variable TNNLM_API_KEY, where spaces separate keys. (default: none)",
    )
    add(
        "--allowed-hosts",
        metavar="NAME,NAME",
        help="Names in the Host header of requests that are served; * serves all. (default: this machine's "
        "names and --host if that is this machine only, else all)",
    )
    add(
        "--allow-origin",
        action="append",
        metavar="URL",
        help="Origin whose web pages may call the API (CORS); can be repeated. (default: none)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    for option, kind, unit, default, text in LIMITS:
        add(f"--{option}", type=kind, default=default, metavar=unit, help=f"{text} (default: {default})")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; None takes ``sys.argv``."""
    return arguments().parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    check_ranges(args)
    keys = api_keys(args.api_key, os.environ.get(KEY))
    try:
        from tnnlm.serving.app import create_app
        from tnnlm.serving.connections import raise_descriptors
        from tnnlm.serving.server import listen, run
        from tnnlm.serving.settings import Limits, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: is not installed", f"run: {install_command('serve')}") from None
    with errors_name_options(arguments()):
        limits = Limits(
            max_batch=args.max_batch,
            max_queue=args.max_queue,
            max_request_rows=args.max_request_rows,
            max_prompt_tokens=args.max_prompt_tokens,
            max_tokens=args.max_tokens,
            max_answer_bytes=args.max_answer_mb << 20,
            max_connections=args.max_connections,
            send_timeout=args.send_timeout,
            timeout=args.timeout,
            cache_bytes=args.cache_mb << 20,
        )
    enough = raise_descriptors(limits.max_connections)
    listener = listen(args.host, args.port)
    # The thread that loads the model also runs it.
    thread = ThreadPoolExecutor(1, "model")
    generator, engine, name, parameters, prompts = thread.submit(load, args).result()
    settings = Settings(
        name=args.name or name,
        engine=engine,
        parameters=parameters,
        prompts=prompts,
        api_keys=keys,
        allowed_hosts=allowed_hosts(args.host, args.allowed_hosts),
        parse_special=args.parse_special,
        reproducible=args.reproducible,
        limits=dataclasses.replace(limits, max_connections=enough),
    )
    app = create_app(generator, settings, thread)
    if args.allow_origin:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=args.allow_origin, allow_methods=["*"], allow_headers=["*"]
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{settings.name}: {engine}", file=sys.stderr)
    print(f"chat template: {app.state.service.chat.description}", file=sys.stderr)
    print(f"http://{host}:{listener.getsockname()[1]}/  (Ctrl-C stops)", file=sys.stderr, flush=True)
    if enough < limits.max_connections:
        print(f"--max-connections: {enough}, by the limit of open files (ulimit -n)", file=sys.stderr)
    if not keys and not _local(args.host):
        print("no API key: anyone who reaches this address can use it; set TNNLM_API_KEY", file=sys.stderr)
    run(app, listener, args.grace)
    return 0


def check_ranges(args: argparse.Namespace) -> None:
    """Check the options that are not limits of the application.

    Raises:
        UserError: If a number is out of range, or a text is empty.
    """
    for option, (least, most) in RANGES.items():
        value = getattr(args, option)
        if not least <= value <= most:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be from {least} to {most:,}")
    for option in ("name", "model", "allowed_hosts"):
        if getattr(args, option) == "":
            raise UserError(f"--{option.replace('_', '-')}: is empty", "give at least one character")


def api_keys(options: Sequence[str] | None, variable: str | None) -> tuple[str, ...]:
    """Return the API keys of the option --api-key, else of the environment variable; none if both are unset.

    Raises:
        UserError: If a key is empty or can't be sent in a header.
    """
    where, keys = (KEY, (variable or "").split()) if options is None else ("--api-key", [*options])
    if (options is not None or variable is not None) and not all(keys or [""]):
        raise UserError(f"{where}: is empty", "give at least one character, or leave it out")
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"{where}: has characters that are not printable ASCII, or spaces")
    return tuple(keys)


def allowed_hosts(host: str, option: str | None) -> tuple[str, ...] | None:
    """Return the hosts that requests may name, with the names of this machine; None for all."""
    names = [name.strip() for name in (option or "").split(",")]
    if "*" in names or (option is None and not _local(host)):
        return None
    return (*LOOPBACK, host, *filter(None, names))


def _local(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    return host in LOOPBACK or host.startswith("127.")


def compile_steps(converted: Any, folder: Path, dtype: str) -> None:
    """Compile the decoding steps that the folder of a converted model lacks, and report it on stderr.

    Raises:
        UserError: If the model was loaded from a checkpoint, or the steps can't be compiled.
    """
    from tnnlm.inference.aot import compile_missing

    if not folder.is_dir():
        raise UserError(f"--compile: {folder} is a checkpoint", "convert it with convert.py")
    compile_missing(
        converted.model,
        folder,
        dtype,
        converted.fingerprint,
        lambda line: print(line, file=sys.stderr, flush=True),
    )


def load(args: argparse.Namespace) -> tuple[Any, str, str, int, tuple[str, ...]]:
    """Return the generator, its engine in one line, and name, number of parameters and prompts of the model.

    The prompts are from the text that the model was trained on; there are none if that is not known.
    """
    from tnnlm.checkpoints.locate import CONVERTED, load_for_decoding, outdated
    from tnnlm.checkpoints.prompts import stored_prompts
    from tnnlm.inference.engine import open_engine, usable_device
    from tnnlm.machine.threads import limit_threads
    from tnnlm.serving.weights import hold_in_memory

    limit_threads()
    if warning := outdated(args.model, Path("runs")):
        print(f"warning: {warning}", file=sys.stderr)
    trust = trust_of(args)
    found, converted = load_for_decoding(args.model, Path("runs"), trust)
    if args.compile:
        compile_steps(converted, found, args.dtype)
    hold_in_memory(converted.model)
    parameters = sum(p.numel() for p in converted.model.parameters())
    folder = found if found.is_dir() else found.parent
    own = folder.resolve()
    name = own.parent.name if own.name in (str(CONVERTED), "checkpoints") else own.name
    device = usable_device(args.device)
    generator, info = open_engine(
        converted, folder, device=device, dtype=args.dtype, engine=args.engine, trust=trust
    )
    if args.reproducible and not info.batch_invariant:
        raise UserError(
            f"--reproducible: rounding depends on the batch in the {info}",
            "omit it, or use --engine auto and --dtype float32 on an x86 CPU",
        )
    return generator, str(info), name, parameters, stored_prompts(found)
