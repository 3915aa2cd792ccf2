#!/usr/bin/env python
"""Render figures and reference tables into README.md and docs, and the schema of settings into configs.

Figures come from docs/records and docs/results, tables and the schema from the code.

Links in README.md become absolute once pyproject.toml has the address of the repository.

Examples:
  python tools/render_docs.py            # write the pages that are out of date
  python tools/render_docs.py --check    # exit code 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from documentation.records import ROOT
from documentation.regions import absolute_links, pages, render
from tnnlm.config.json_schema import schema_text
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import write_text

SCHEMA = ROOT / "configs/schema.json"
"""Schema of configuration files, for editors."""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if a page is stale.")
    return parser.parse_args()


def repository() -> str:
    """Return the address of the repository from pyproject.toml, or an empty string."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", "")).rstrip("/")


def rendered_page(page: Path, text: str) -> str:
    """Return a page with all its regions rendered."""
    try:
        found = render(text)
        return absolute_links(found, repository()) if page == ROOT / "README.md" else found
    except UserError as error:
        raise UserError(f"{page.relative_to(ROOT)}: {error}") from None


def main() -> int:
    """Run the command, and return its exit code."""
    args = parse()
    stale = 0
    for page in [*pages(), SCHEMA]:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        rendered = schema_text() if page == SCHEMA else rendered_page(page, text)
        if rendered != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'out of date' if args.check else 'rendered'}")
            if not args.check:
                write_text(page, rendered)
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
