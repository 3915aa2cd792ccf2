#!/usr/bin/env python
"""Render figures and reference tables into README.md and docs, from docs/records, docs/results and the code.

Links in README.md become absolute once pyproject.toml has the address of the repository.

Examples:
  python tools/render_docs.py            # write the pages that are out of date
  python tools/render_docs.py --check    # exit code 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import sys
import tomllib

from documentation.records import ROOT
from documentation.regions import absolute_links, pages, render
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import write_text


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if a page is stale.")
    return parser.parse_args()


def repository() -> str:
    """Return the address of the repository from pyproject.toml, or an empty string."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", "")).rstrip("/")


def main() -> int:
    """Run the command, and return its exit code."""
    args = parse()
    stale = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            rendered = render(text)
            if page == ROOT / "README.md":
                rendered = absolute_links(rendered, repository())
        except UserError as error:
            raise UserError(f"{page.relative_to(ROOT)}: {error}") from None
        if rendered != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'out of date' if args.check else 'rendered'}")
            if not args.check:
                write_text(page, rendered)
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
