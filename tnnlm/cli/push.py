"""Upload a converted model to the Hugging Face Hub, as a private repository unless --public is given.

The token is that of the environment variable HF_TOKEN, or of the login by `hf auth login`. All files are
checked before anything is sent: their checksums, and that code is that of tnnlm. Compiled steps, exported
programs and other files in the folder are not uploaded.

Examples:
  tnnlm push runs/demo me/tiny-python --dry-run    # list the files
  tnnlm push runs/demo me/tiny-python
  tnnlm push runs/demo/converted me/tiny-python --public
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tnnlm.cli.usage import parser_of
from tnnlm.errors import UserError


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = parser_of("push", __doc__)
    add = parser.add_argument
    add("target", metavar="RUN | CONVERTED", help="Run (name or folder) or converted folder to upload.")
    add("repo", metavar="OWNER/NAME", help="Repository on the Hub, which is created if it does not exist.")
    add("--public", action="store_true", help="Make a new repository public. (default: private)")
    add("--dry-run", action="store_true", help="Check and list the files, and exit; needs no network.")
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    args = arguments().parse_args(words)
    for name in ("target", "repo"):
        if not getattr(args, name):
            raise UserError(f"{'RUN' if name == 'target' else 'OWNER/NAME'}: is empty", "name it")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    from tnnlm.deployment.push import plan_upload, push

    upload = plan_upload(args.target, args.repo, args.public)
    total = sum(upload.files.values())
    kind = "public" if upload.public else "private"
    print(f"{upload.folder} -> {upload.repo} ({kind}), {len(upload.files)} files, {total:,} bytes")
    for name, size in upload.files.items():
        print(f"  {name:24} {size:>15,}")
    for name, reason in upload.left_out.items():
        print(f"left out: {name} ({reason})")
    for note in upload.notes:
        print(f"note: {note}")
    if not args.dry_run:
        print(f"uploaded: {push(upload)}")
    return 0
