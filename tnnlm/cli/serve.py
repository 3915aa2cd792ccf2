"""Serve a converted model: OpenAI's completions API, a page to try it at /, /health and /metrics.

Texts of many clients are written together; each takes a few hundred kilobytes of state, whatever its length.

Examples:
  tnnlm serve                                # the newest converted model, on http://127.0.0.1:8000
  tnnlm serve --model runs/demo --port 9000
  TNNLM_API_KEY=secret tnnlm serve --host 0.0.0.0
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

from tnnlm.cli.usage import add_device, parser_of
from tnnlm.errors import UserError

GRACE = 30
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; ``words`` are those of the command line, None takes them from there."""
    parser = parser_of("serve", __doc__)
    add = parser.add_argument_group("model and machine").add_argument
    add("--model", metavar="DIR|RUN|CKPT", help="default: the newest converted model under runs/")
    add("--name", help="of the model, as the API reports it (default: its run's)")
    add_device(add)
    add(
        "--engine",
        default="packed",
        metavar="NAME",
        help="packed (default): on a CPU a completion does not depend on what runs beside it; auto is faster "
        "for a single client where there is a compiled step",
    )
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    add("--api-key", metavar="KEY", help="that clients must send (better: in the variable TNNLM_API_KEY)")
    add("--allow-origin", action="append", metavar="URL", help="web pages that may use the API; repeatable")
    add = parser.add_argument_group("limits").add_argument
    add("--max-batch", type=int, default=256, metavar="N", help="sequences in a batch (default: 256)")
    add("--max-queue", type=int, default=1024, metavar="N", help="sequences that may wait (default: 1024)")
    add("--max-prompt-tokens", type=int, default=131_072, metavar="N", help="default: 131072")
    add("--max-tokens", type=int, default=131_072, metavar="N", help="new tokens (default: 131072)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds for a request (default: 600)")
    add(
        "--cache-mb",
        type=int,
        default=256,
        metavar="N",
        help="for prompt states; 0 is off (default: 256)",
    )
    add("--grace", type=int, default=GRACE, metavar="S", help=f"seconds for requests at a stop ({GRACE})")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parse(words)
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: must be from 0 to 65535")
    try:
        import uvicorn

        from tnnlm.serving.app import create_app
        from tnnlm.serving.settings import Limits, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", "run: pip install 'tnnlm[serve]'") from None
    limits = Limits(
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        max_prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        cache_bytes=args.cache_mb << 20 if args.cache_mb >= 0 else -1,
    )
    listener = listen(args.host, args.port)
    api_key = args.api_key or os.environ.get("TNNLM_API_KEY") or None
    # One thread loads the model and runs it.
    thread = ThreadPoolExecutor(1, "model")
    generator, engine, name, parameters = thread.submit(load, args).result()
    settings = Settings(
        name=args.name or name, engine=engine, parameters=parameters, api_key=api_key, limits=limits
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
        print(
            "open to everyone who reaches this address: set TNNLM_API_KEY to ask for a key", file=sys.stderr
        )
    serve(uvicorn, app, listener, args.grace)
    return 0


def load(args: argparse.Namespace) -> tuple[Any, str, str, int]:
    """The generator, what runs in a line, the model's name, and its number of parameters."""
    from tnnlm.checkpoints.locate import CONVERTED, load_for_decoding
    from tnnlm.inference.engine import open_engine, usable_device
    from tnnlm.machine.threads import limit_threads

    limit_threads()
    found, converted = load_for_decoding(args.model, Path("runs"))
    parameters = sum(p.numel() for p in converted.model.parameters())
    folder = found if found.is_dir() else found.parent
    own = folder.resolve()
    name = own.parent.name if own.name in (str(CONVERTED), "checkpoints") else own.name
    device = usable_device(args.device)
    generator, info = open_engine(converted, folder, device=device, dtype=args.dtype, engine=args.engine)
    return generator, str(info), name, parameters


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: if the address can't be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # Connections inherit it. Without, a piece of a stream waits 40 ms for the last one's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}") from None


def serve(uvicorn: Any, app: Any, listener: socket.socket, grace: int) -> None:
    """Until SIGTERM or Ctrl-C; then running texts have ``grace`` seconds to end."""
    # Once it has shut down, the server raises the signal again, for whoever else waits for it: nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=grace, timeout_keep_alive=30, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])
