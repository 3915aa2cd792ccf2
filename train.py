#!/usr/bin/env python
"""Script for a checkout: the same as the command ``tnnlm train``."""

import sys

from tnnlm.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
