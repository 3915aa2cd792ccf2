#!/usr/bin/env python
"""Script for a checkout: the same as the command ``tnnlm push``."""

import sys

from tnnlm.cli import run

if __name__ == "__main__":
    sys.exit(run("push"))
