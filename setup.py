"""Description of the distributions: README.md with links that work on the page of an index of packages.

Everything else is in pyproject.toml. Links to files of the repository become links to its address, if
pyproject.toml has one under ``[project.urls]``, and plain text otherwise; so do images.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:)([^)\s]+)\)")


def description(text: str, repository: str) -> str:
    """Return the text of README.md for an index of packages.

    Args:
        text: Text of README.md, with relative links.
        repository: Address of the repository; empty if it has none.
    """

    def replaced(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        if not repository or target.startswith("#"):
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return LINK.sub(replaced, re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL))


def main() -> None:
    """Build what pip or build ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    address = project.get("urls", {}).get("Repository", "").rstrip("/")
    setup(long_description=description(text, address), long_description_content_type="text/markdown")


if __name__ == "__main__":
    main()
