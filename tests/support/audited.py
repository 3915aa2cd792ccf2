"""Program that runs commands under an audit hook and reports every event that touches a stranger's folder.

    python audited.py FOLDER WHAT      # in the folder, WHAT is commands or transformers

Prints one JSON object: the exit codes, and the events that must not happen.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

FOLDER = os.path.realpath(sys.argv[1])
WRITABLE = (f"{FOLDER}/runs/", f"{FOLDER}/out/", f"{FOLDER}/cache/", os.environ["TMPDIR"], "/dev/")
"""Places that the commands may write to: the run that is resumed, outputs, cache and temporary files."""
HARMLESS = ("torch", "numpy", "collections", "tnnlm", "_codecs", "datasets", "pyarrow")
"""Packages whose classes a pickle may name."""
PATHS = {"import": 1, "compile": 1, "code.__new__": 1, "ctypes.dlopen": 0}
"""Events with the path of code, and the place of the path in their arguments."""
found: list[str] = []
"""Events that must not happen."""


def inside(value: object) -> bool:
    """Return whether a value is a path in the folder."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    # Names such as <string> are no paths, although they look like files of the current folder.
    is_path = isinstance(value, str) and "\0" not in value and os.path.lexists(value)
    return is_path and os.path.realpath(str(value)).startswith(FOLDER + os.sep)


def mentions(value: object) -> bool:
    """Return whether a path in the folder is an argument, or in a list of arguments."""
    if isinstance(value, list | tuple):
        return any(mentions(item) for item in value)
    return inside(value)


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.startfile"):
        if mentions(args):
            found.append(f"{event} {args[:2]}")
    elif event == "exec":
        if inside(args[0].co_filename):
            found.append(f"exec {args[0].co_filename}")
    elif event in PATHS:
        if inside(args[PATHS[event]]):
            found.append(f"{event} {args[PATHS[event]]}")
    elif event == "pickle.find_class":
        if args[0].split(".")[0] not in HARMLESS:
            found.append(f"{event} {args}")
    elif event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, str | bytes):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(WRITABLE) and not os.path.isdir(real):  # a file without a name
                found.append(f"write {real}")
    elif event == "socket.connect" and args[1][0] != "127.0.0.1":
        found.append(f"{event} {args[1]}")


def run_commands() -> dict[str, int]:
    """Run every command that loads a model on the run, the checkpoints and the converted model."""
    import torch

    from tnnlm import cli

    def loader(path: str, *_: object) -> Any:
        found.append(f"native library {path}")
        raise RuntimeError("not loaded")

    torch._C._aoti.AOTIModelPackageLoader = loader  # type: ignore[misc,assignment]
    text = ("--prompt", "The ", "--max-new-tokens", "2")
    codes = {}

    def call(name: str, *words: str) -> None:
        codes[name] = cli.main(words)

    for engine in ("auto", "compiled", "graph", "packed", "eager"):
        call(f"generate {engine}", "generate", "--model", "runs/tiny/converted", "--engine", engine, *text)
    call("generate checkpoint", "generate", "--model", "runs/tiny/checkpoints/best.ckpt", *text)
    call("generate named", "generate", "--model", "named", *text)
    call("generate pickle", "generate", "--model", "pickle/checkpoints/last.ckpt", *text)
    call("convert", "convert", "runs/tiny", "--out", "out/converted", "--method", "etsc", "--no-compile")
    call("convert named", "convert", "named", "--out", "out/other")
    call("convert pickle", "convert", "pickle", "--out", "out/other")
    call("dry run", "train", "--resume", "runs/tiny", "--dry-run")
    call("dry run named", "train", "--resume", "named", "--dry-run")
    call("init", "train", "--init-from", "runs/tiny", "--dry-run")
    call("init named", "train", "--init-from", "named", "--dry-run")
    call("weights", "train", "init.weights=runs/tiny/checkpoints/best.ckpt", "--dry-run")
    call("weights named", "train", "init.weights=runs/tiny/converted", "--dry-run")
    call("weights pickle", "train", "init.weights=pickle/checkpoints/last.ckpt", "--dry-run")
    call("import pickle", "import", "evil.pt", "--tokenizer", "tokenizer.json", "--output", "out/imported")
    call("resume", "train", "--resume", "runs/tiny", "trainer.max_steps=5")
    codes["serve"] = serve_once(cli.main)
    return codes


def serve_once(main: Callable[[list[str]], int]) -> int:
    """Serve the converted model until one request is answered."""
    from tnnlm.serving import server

    ports: queue.Queue[int] = queue.Queue()
    listen = server.listen

    def listening(host: str, port: int) -> Any:
        listener = listen(host, port)
        ports.put(listener.getsockname()[1])
        return listener

    def request() -> None:
        try:
            connection = HTTPConnection("127.0.0.1", ports.get(), timeout=120)
            body = json.dumps({"prompt": "The ", "max_tokens": 2})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if connection.getresponse().status != 200:
                found.append("the server did not answer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    server.listen = listening
    client = threading.Thread(target=request)
    client.start()
    code = main(["serve", "--model", "runs/tiny/converted", "--port", "0"])
    client.join()
    return code


def run_transformers() -> dict[str, int]:
    """Load the converted model with Transformers: without our package, with it, and with trust."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    codes = {}

    def refused(name: str, load: Callable[[], Any]) -> None:
        try:
            load()
        except (ValueError, OSError):
            codes[name] = 2
        else:
            codes[name] = 0

    hostile, shim = "runs/tiny/converted", "shim"
    refused("not trusted", lambda: AutoModelForCausalLM.from_pretrained(hostile, trust_remote_code=False))
    # The module of the configuration is that of convert.py; the one of the model is not.
    refused("other module", lambda: AutoModelForCausalLM.from_pretrained(shim, trust_remote_code=True))
    import tnnlm.hf  # noqa: F401

    def registered() -> None:
        model = AutoModelForCausalLM.from_pretrained(hostile, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(hostile, trust_remote_code=False)
        model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=2)

    refused("registered", registered)
    # Transformers then takes the classes of the package, whatever the folder has.
    refused("trusted", lambda: AutoModelForCausalLM.from_pretrained(hostile, trust_remote_code=True))
    return codes


def check_modules() -> None:
    """Report modules that were loaded from the folder, or whose file maps into this process."""
    for name, module in list(sys.modules.items()):
        if name != "__main__" and inside(getattr(module, "__file__", None)):
            found.append(f"module {name}")
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", encoding="utf-8") as file:
            # Weights may be mapped to be read, but not to be executed.
            lines = [line.split() for line in file]
        code = [line[5] for line in lines if len(line) > 5 and "x" in line[1]]
        found.extend(f"mapped {path}" for path in code if inside(path))


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script
    sys.addaudithook(hook)
    outcome = {"commands": run_commands, "transformers": run_transformers}[sys.argv[2]]()
    check_modules()
    print(json.dumps({"codes": outcome, "found": sorted(set(found))}))
