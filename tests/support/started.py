"""Modules that a command has imported at its end, in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
"""Modules of PyTorch's compiler, which take a second to import."""
_CODE = """
import json, os, sys
from tnnlm.cli import run
code = run(sys.argv[1], sys.argv[2:])
sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps([code, sorted(sys.modules)]))
"""


def modules_after(name: str, words: Sequence[str]) -> set[str]:
    """Run a subcommand, which must succeed, and return the names of the modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, name, *words], capture_output=True, encoding="utf-8", check=True
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return {*modules}
