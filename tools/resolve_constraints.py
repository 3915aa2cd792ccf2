#!/usr/bin/env python
"""Check that constraints.txt resolves for every supported Python version and system.

Lists packages that must be built from source and packages that are not pinned, for the extra [dev], which
includes all dependencies of the tests. uv reads only the metadata of packages; nothing is installed. Builds
of torch differ by machine: the pinned version must be installed here, and the dependencies that all builds
share are resolved. Exit code 1 if the pins of a Python version and system cannot be resolved.

Examples:
  python tools/resolve_constraints.py
  python tools/resolve_constraints.py --python 3.13 --python 3.14 --system macos-arm64
  python tools/resolve_constraints.py --newest > newest.txt     # updated pins

Needs: pip install uv
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name, parse_wheel_filename

from tnnlm.errors import OneLineParser, UserError, run_script

ROOT = Path(__file__).parents[1]
CLASSIFIER = "Programming Language :: Python :: 3."


class System(NamedTuple):
    """An operating system and processor."""

    uv_platform: str
    """Value of uv's ``--python-platform``."""
    tags: list[str]
    """Platform tags of the wheels that can be installed on the system."""


def _manylinux(machine: str) -> list[str]:
    """Return the manylinux tags that glibc 2.28 supports, newest first."""
    names = (*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "2010", "1")
    return [f"manylinux{name}_{machine}" for name in names]


MACOS = "14.0"
"""Oldest macOS version that torch is built for."""
SYSTEMS = {
    "linux-x86_64": System("x86_64-manylinux_2_28", _manylinux("x86_64")),
    "linux-aarch64": System("aarch64-manylinux_2_28", _manylinux("aarch64")),
    "macos-arm64": System("aarch64-apple-darwin", list(mac_platforms((14, 0), "arm64"))),
    "windows-amd64": System("x86_64-pc-windows-msvc", ["win_amd64"]),
}


def supported_versions() -> list[str]:
    """Return the Python versions in the classifiers of pyproject.toml, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    minors = [word.removeprefix(CLASSIFIER) for word in project["classifiers"] if word.startswith(CLASSIFIER)]
    return [f"3.{minor}" for minor in sorted(map(int, minors))]


def pins() -> dict[str, str]:
    """Return the pinned versions of constraints.txt by canonical package name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def torch_settings(version: str) -> str:
    """Return a uv.toml that overrides torch's dependencies by those that all of its builds share.

    Raises:
        UserError: If the installed torch, whose metadata is read, has another version.
    """
    try:
        installed = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = "missing"
    if installed != version:
        raise UserError(f"torch=={version} must be installed to read its dependencies; it is {installed}")
    given = [Requirement(text) for text in importlib.metadata.requires("torch") or ()]
    # Dependencies of CUDA builds have a platform marker, optional dependencies an extra marker.
    shared = [str(requirement) for requirement in given if requirement.marker is None]
    lines = ("[[dependency-metadata]]", 'name = "torch"', f'version = "{version}"')
    return "\n".join((*lines, f"requires-dist = {json.dumps(shared)}", ""))


def compile_pins(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``uv pip compile`` on the project with the extra ``dev``.

    Raises:
        UserError: If uv is not installed.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    uv = shutil.which("uv", path=path)
    if uv is None:
        raise UserError("uv is not installed; run: pip install uv")
    common = ("--extra", "dev", "--config-file", str(folder / "uv.toml"), "--python", sys.executable)
    return subprocess.run(
        [uv, "pip", "compile", *common, "--quiet", *words, "pyproject.toml"],
        cwd=ROOT,
        env=os.environ | {"UV_PYTHON_DOWNLOADS": "never", "MACOSX_DEPLOYMENT_TARGET": MACOS},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


class NoResolution(UserError):
    """Error for pins that no set of versions satisfies."""


def resolve(version: str, system: System, folder: Path) -> list[dict[str, Any]]:
    """Return the resolved packages of a Python version and system, as in a pylock.toml.

    Raises:
        NoResolution: If the pins cannot be satisfied.
    """
    lock = folder / "pylock.toml"
    target = ("--python-version", version, "--python-platform", system.uv_platform)
    output = ("--format", "pylock.toml", "--output-file", str(lock))
    done = compile_pins(folder, "--constraints", "constraints.txt", *target, *output)
    if done.returncode:
        raise NoResolution(done.stderr.strip())
    found: list[dict[str, Any]] = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    lock.unlink()  # uv would prefer the versions of an existing file
    return found


def tags_of(version: str, system: System) -> frozenset[Tag]:
    """Return the tags of the wheels that a Python version can install on a system."""
    python = (3, int(version.partition(".")[2]))
    native = cpython_tags(python, platforms=system.tags)
    return frozenset((*native, *compatible_tags(python, f"cp{python[0]}{python[1]}", system.tags)))


def without_wheel(packages: list[dict[str, Any]], tags: frozenset[Tag]) -> list[str]:
    """Return the names of the packages that must be built from source."""
    return [
        package["name"]
        for package in packages
        if not any(tags & parse_wheel_filename(wheel_name(wheel))[3] for wheel in package.get("wheels", ()))
    ]


def wheel_name(wheel: dict[str, Any]) -> str:
    """Return the file name of a wheel from its entry in a pylock.toml."""
    place = wheel.get("name") or wheel.get("url") or wheel["path"]
    return str(place).rsplit("/", 1)[-1].replace("%2B", "+")


def check(version: str, name: str, folder: Path) -> bool:
    """Print how the pins resolve for a Python version and a system of ``SYSTEMS``; return whether they do."""
    system = SYSTEMS[name]
    try:
        packages = resolve(version, system, folder)
    except NoResolution as error:
        reason = error.reason.replace("\n", "\n  ")
        print(f"Python {version}, {name}: can't be resolved\n  {reason}", flush=True)
        return False
    built = without_wheel(packages, tags_of(version, system))
    loose = sorted({package["name"] for package in packages} - pins().keys())
    print(f"Python {version}, {name}: {len(packages)} packages resolve")
    print(f"  built from source: {', '.join(built) or 'none'}")
    print(f"  not pinned: {', '.join(loose) or 'none'}", flush=True)
    return True


def newest(folder: Path, oldest: str, torch: str) -> str:
    """Return the newest pins for all Python versions from ``oldest``, with markers where they differ.

    Raises:
        UserError: If no pins satisfy all versions.
    """
    (folder / "torch.txt").write_text(f"torch=={torch}\n", encoding="utf-8")
    words = ("--universal", "--python-version", oldest, "--no-annotate", "--no-header")
    done = compile_pins(folder, *words, "--constraints", str(folder / "torch.txt"))
    if done.returncode:
        raise UserError(f"no pins suit every Python: {done.stderr.strip()}")
    return done.stdout


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = supported_versions()
    add = parser.add_argument
    add("--python", action="append", choices=known, help="Python version; can be repeated. (default: all)")
    add("--system", action="append", choices=SYSTEMS, help="System; can be repeated. (default: all)")
    add("--newest", action="store_true", help="Print the newest compatible pins instead of checking.")
    return parser.parse_args()


def main() -> int:
    """Check all requested versions and systems, or print the newest pins; return 1 if pins do not resolve."""
    args = parse()
    torch = pins()["torch"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "uv.toml").write_text(torch_settings(torch), encoding="utf-8")
        if args.newest:
            print(newest(folder, supported_versions()[0], torch), end="")
            return 0
        results = [
            check(version, system, folder)
            for version in args.python or supported_versions()
            for system in args.system or SYSTEMS
        ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
