"""Process with a pretended GPU: runs one scenario and writes what it observed as JSON.

Usage: python -m tests.support.pretend.worker LIBRARY REPORT SCENARIO [KEY=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.pretend.launch import load_device_guard


def main() -> None:
    """Run the scenario of the command line."""
    _, library, report, name, *words = sys.argv
    load_device_guard(library)
    from tests.support.pretend import cuda, tensors

    cuda.replace_inference_mode()
    from tests.support.pretend.scenarios import SCENARIOS

    observed = SCENARIOS[name](*words)
    observed["syncs"] = [[*what, n] for what, n in tensors.LEDGER.syncs.items()]
    observed["launches"] = dict(tensors.LEDGER.launches)
    Path(report).write_text(json.dumps(observed))


if __name__ == "__main__":
    main()
