#!/usr/bin/env python
"""Take the screenshots of the web page in docs/: run a server, use its page in headless Chromium, save PNGs.

Examples:
  python tools/page_screenshots.py --model runs/demo
  python tools/page_screenshots.py --model runs/demo --out pictures --tokens 300

Needs: pip install playwright, and Chromium on the path
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnnlm.errors import OneLineParser, UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = 'class Stack:\n    """A list that grows at one end."""\n\n    def push(self, value):\n'
MESSAGES = ("Write a function add that returns a plus b.", "Now one that returns a minus b.")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
WAIT_MS = 600_000
SEEDS = 20
"""Number of seeds that are tried for a long completion."""


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    text = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=text)
    parser.add_argument("--model", default="runs/demo", help="Converted model or run. (default: runs/demo)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="Folder of the PNGs. (default: docs)")
    parser.add_argument("--tokens", type=int, default=1400, metavar="N", help="New tokens. (default: 1400)")
    return parser.parse_args()


def main() -> int:
    """Run the command and return its exit code."""
    args = parse()
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UserError(f"none of {', '.join(BROWSERS)} is on the path; install Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise UserError("playwright is not installed; run pip install playwright") from None
    args.out.mkdir(parents=True, exist_ok=True)
    with server(args.model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        for name, size in SIZES.items():
            page = browser.new_page(viewport=size, device_scale_factor=1 if name == "desktop" else 2)
            page.set_default_timeout(WAIT_MS)
            page.goto(url)
            completion(page, args.tokens)
            save(page, args.out / f"page-{name}.png")
            chat(page)
            save(page, args.out / f"page-chat-{name}.png")
            page.close()
        browser.close()
    return 0


def completion(page: Any, tokens: int) -> None:
    """Generate a completion on the page, with the first seed whose text is at least half as long as asked."""
    for field, value in {"prompt": PROMPT, "max_tokens": str(tokens), "temperature": "0.7"}.items():
        fill(page, field, value)
    for seed in range(SEEDS):
        fill(page, "seed", str(seed))
        page.click("#generate")
        finished(page)
        found = re.search(r": ([\d,]+) token", page.inner_text("#status"))
        if found and 2 * int(found[1].replace(",", "")) >= tokens:
            break


def chat(page: Any) -> None:
    """Write two messages on the page, each with two answers."""
    page.check("#view-chat")
    for field, value in {"max_tokens": "60", "n": "2"}.items():
        fill(page, field, value)
    for message in MESSAGES:
        fill(page, "prompt", message)
        page.press("#prompt", "Enter")
        finished(page)


def fill(page: Any, field: str, value: str) -> None:
    """Set a field of the page, also inside of the panel that phones fold."""
    if not page.is_visible(f"#{field}"):
        page.click("#sampling summary")
    page.fill(f"#{field}", value)


def finished(page: Any) -> None:
    """Wait for the end of a request.

    Raises:
        UserError: If the page shows an error.
    """
    page.locator("#status:text-matches('^Finished'), #error:not(:empty)").first.wait_for()
    if error := page.inner_text("#error"):
        raise UserError(f"the page shows an error: {error}")


def save(page: Any, path: Path) -> None:
    """Save the whole page as a PNG."""
    page.screenshot(path=path, full_page=True)
    sys.stdout.write(f"{path}\n")


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """Serve a model on a free port, and return its address."""
    words = [sys.executable, str(ROOT / "tools/serve.py"), "--model", model, "--port", "0"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as process:
        try:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                if address := re.search(r"http://[\d.]+:\d+", line):
                    yield address[0]
                    return
            raise UserError(f"the server did not start: {''.join(lines).strip()}")
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(run_script(main))
