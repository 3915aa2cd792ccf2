#!/usr/bin/env python
"""The command ``tnnlm convert``, from a checkout; ``--help`` shows its arguments."""

import sys

from tnnlm.cli import run

if __name__ == "__main__":
    sys.exit(run("convert"))
