"""Serve a converted model: OpenAI-compatible completions API, web page at /, /health and /metrics.

Requests are batched. A sequence needs a few hundred kilobytes of state, whatever its length.

Examples:
  tnnlm serve                                        # the newest converted model
  tnnlm serve --model runs/demo --port 9000
  tnnlm serve --dtype int8 --max-batch 64            # quantized weights
  TNNLM_API_KEY=secret tnnlm serve --host 0.0.0.0    # reachable from the network
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def "}'

Needs: pip install 'tnnlm[serve]'
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tnnlm.cli.usage import add_device, add_trust, errors_name_options, parser_of, trust_of
from tnnlm.errors import UserError

GRACE = 30
RANGES = {"port": 65_535, "cache_mb": 1 << 20, "grace": 86_400}
"""Largest value of the options whose smallest value is 0 and that are not limits of the application."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
        default="packed",
        metavar="NAME",
        help="Engine: packed makes completions independent of concurrent requests (CPU), auto is faster for "
        "one client if a compiled step exists; also compiled, graph and eager. (default: packed)",
    )
    add_trust(add)
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
        metavar="KEY",
        help="API key that clients must send; prefer the environment variable TNNLM_API_KEY. (default: none)",
    )
    add(
        "--allow-origin",
        action="append",
        metavar="URL",
        help="Origin whose web pages may call the API (CORS); can be repeated. (default: none)",
    )
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add("--max-batch", type=int, default=256, metavar="N", help="Maximum sequences per batch. (default: 256)")
    add(
        "--max-queue",
        type=int,
        default=1024,
        metavar="N",
        help="Maximum waiting sequences; further ones are rejected with status 429. (default: 1024)",
    )
    add(
        "--max-prompt-tokens",
        type=int,
        default=131_072,
        metavar="N",
        help="Maximum tokens of a prompt. (default: 131072)",
    )
    add(
        "--max-tokens",
        type=int,
        default=131_072,
        metavar="N",
        help="Maximum new tokens of a sequence. (default: 131072)",
    )
    add(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="Seconds per request, including the time in the queue. (default: 600)",
    )
    add(
        "--cache-mb",
        type=int,
        default=256,
        metavar="N",
        help="Memory in MiB of the prefix cache of prompt states; 0 disables it. (default: 256)",
    )
    add(
        "--grace",
        type=int,
        default=GRACE,
        metavar="S",
        help=f"Seconds for running requests to finish after SIGTERM or Ctrl-C. (default: {GRACE})",
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; None takes ``sys.argv``."""
    return arguments().parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    check_ranges(args)
    try:
        import uvicorn

        from tnnlm.serving.app import create_app
        from tnnlm.serving.settings import Limits, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: is not installed", "run: pip install 'tnnlm[serve]'") from None
    with errors_name_options(arguments()):
        limits = Limits(
            max_batch=args.max_batch,
            max_queue=args.max_queue,
            max_prompt_tokens=args.max_prompt_tokens,
            max_tokens=args.max_tokens,
            timeout=args.timeout,
            cache_bytes=args.cache_mb << 20,
        )
    listener = listen(args.host, args.port)
    api_key = args.api_key or os.environ.get("TNNLM_API_KEY") or None
    # The thread that loads the model also runs it.
    thread = ThreadPoolExecutor(1, "model")
    generator, engine, name, parameters = thread.submit(load, args).result()
    settings = Settings(
        name=args.name or name,
        engine=engine,
        parameters=parameters,
        api_key=api_key,
        parse_special=args.parse_special,
        limits=limits,
    )
    app = create_app(generator, settings, thread)
    if args.allow_origin:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=args.allow_origin, allow_methods=["*"], allow_headers=["*"]
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{settings.name}: {engine}", file=sys.stderr)
    print(f"http://{host}:{listener.getsockname()[1]}/  (Ctrl-C stops)", file=sys.stderr, flush=True)
    if api_key is None and args.host not in LOOPBACK:
        print("no API key: anyone who reaches this address can use it; set TNNLM_API_KEY", file=sys.stderr)
    serve(uvicorn, app, listener, args.grace)
    return 0


def check_ranges(args: argparse.Namespace) -> None:
    """Check the options that are not limits of the application.

    Raises:
        UserError: If a number is out of range, or a text is empty.
    """
    for option, most in RANGES.items():
        value = getattr(args, option)
        if not 0 <= value <= most:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be from 0 to {most:,}")
    for option in ("api_key", "name", "model"):
        if getattr(args, option) == "":
            raise UserError(f"--{option.replace('_', '-')}: is empty", "give at least one character")


def load(args: argparse.Namespace) -> tuple[Any, str, str, int]:
    """Return the generator, its engine in one line, the model's name and its number of parameters."""
    from tnnlm.checkpoints.locate import CONVERTED, load_for_decoding, outdated
    from tnnlm.inference.engine import open_engine, usable_device
    from tnnlm.machine.threads import limit_threads

    limit_threads()
    if warning := outdated(args.model, Path("runs")):
        print(f"warning: {warning}", file=sys.stderr)
    trust = trust_of(args)
    found, converted = load_for_decoding(args.model, Path("runs"), trust)
    parameters = sum(p.numel() for p in converted.model.parameters())
    folder = found if found.is_dir() else found.parent
    own = folder.resolve()
    name = own.parent.name if own.name in (str(CONVERTED), "checkpoints") else own.name
    device = usable_device(args.device)
    generator, info = open_engine(
        converted, folder, device=device, dtype=args.dtype, engine=args.engine, trust=trust
    )
    return generator, str(info), name, parameters


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: If the address is invalid or in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # Connections inherit the option. Without it, a chunk of a stream waits 40 ms for the acknowledgement
        # of the chunk before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}") from None


def serve(uvicorn: Any, app: Any, listener: socket.socket, grace: int) -> None:
    """Run the server until SIGTERM or Ctrl-C; running requests then have ``grace`` seconds to finish."""
    # After shutdown, uvicorn restores these handlers and raises the signal again; the defaults would end the
    # process by the signal instead of exit code 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=grace, timeout_keep_alive=30, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])
