"""Compiled steps and exports of a converted folder, which are added after the folder is complete."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tnnlm.checkpoints.converted import ConvertedModel, check_unchanged, load_converted
from tnnlm.deployment.bars import bar
from tnnlm.deployment.save import only_writer
from tnnlm.errors import UserError, collect_failure, one_line
from tnnlm.files import cache_root, check_no_link
from tnnlm.inference.aot import compile_batch, compile_step, package_path
from tnnlm.inference.aot_package import check_compiler, check_compiler_cache
from tnnlm.inference.export import FOLDERS, check_onnx, export_onnx, export_torch
from tnnlm.inference.speculation_compiled import compile_pass
from tnnlm.machine.capabilities import switched_off
from tnnlm.machine.resident import available_memory
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import CausalLM
from tnnlm.trust import can_remember

COPIES = 4
"""Free memory and disk space that a compilation must find, in sizes of the weights: an assumption, not a
measurement, with which a machine that is far too small is not asked to compile."""
_EXPORTS = {"torch": "--export", "onnx": "--onnx"}
"""Options of convert.py by export format."""
_FIXED_SECONDS, _SECONDS_PER_LAYER = 15.0, 1.5
"""Assumed duration of a compilation: a part that every model needs, and one per layer. Only the demo with
four layers was timed, on two cores, and took a little less; other sizes are extrapolated."""


@dataclass(frozen=True)
class Packages:
    """Optional files to add to a converted folder."""

    compiled: Sequence[str] = ()
    """Steps to compile: a weight dtype for one sequence, ``batch-DTYPE`` for batches, or ``pass4-DTYPE`` for
    passes over four tokens."""
    exported: Sequence[str] = ()
    """Export formats: ``torch``, ``onnx``."""
    required: bool = True
    """Whether a compiled step that can't be made is a failure; otherwise a note says why there is none."""

    @property
    def options(self) -> list[str]:
        """Options of convert.py that add these files to a converted folder."""
        words = (word for name in self.compiled for word in reversed(name.split("-")))
        named = dict.fromkeys("speculate" if word.startswith("pass") else word for word in words)
        compiled = ["--compile", *named] if named else []
        return compiled + [_EXPORTS[target] for target in self.exported]

    def without_optional(self) -> Packages:
        """Return the files without steps that are not required."""
        return self if self.required else replace(self, compiled=())


NO_PACKAGES = Packages()
"""No optional files."""


@dataclass(frozen=True)
class Written:
    """Outcome of writing :class:`Packages`."""

    packages: list[Path] = field(default_factory=list)
    """Compiled steps and exports that were written."""
    failures: dict[str, str] = field(default_factory=dict)
    """Options whose file could not be written, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Reasons why a step that was not required isn't compiled."""


def check_packages(packages: Packages) -> None:
    """Check, before any work is done, that the required files can be made on this machine.

    Raises:
        UserError: If they can't; the message says what is missing.
    """
    switched_off()  # Raises for an unknown name in TNNLM_WITHOUT.
    if packages.compiled and packages.required:
        check_compiler()
    if "onnx" in packages.exported:
        check_onnx()


def possible(packages: Packages, model: CausalLM, folder: Path) -> tuple[Packages, list[str]]:
    """Return the packages without steps that are not required and can't be compiled here, and the reasons.

    Args:
        packages: Files to add.
        model: Converted model.
        folder: Folder of the converted model.
    """
    if packages.required or not packages.compiled:
        return packages, []
    try:
        _check_compilation(model, folder)
    except (UserError, OSError) as error:
        return packages.without_optional(), [_note(one_line(error))]
    return packages, []


def announcements(packages: Packages, model: CausalLM, folder: Path) -> list[str]:
    """Return a line for each step that is going to be compiled: roughly how long it takes, and its file."""
    seconds = _FIXED_SECONDS + _SECONDS_PER_LAYER * len(model.layers)
    about = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    omit = "" if packages.required else "; --no-compile omits it"
    return [
        f"compiling the {' '.join(reversed(name.split('-')))} decoding step (about {about}) into "
        f"{package_path(folder, name)}{omit}"
        for name in packages.compiled
    ]


def write_packages(converted: ConvertedModel, folder: Path, packages: Packages) -> Written:
    """Compile and export a converted model into its folder; what fails does not stop the rest."""
    written = Written()
    skipped: dict[str, str] = {}
    for name in bar(packages.compiled, "compiling"):
        option, dtype = " ".join(Packages((name,)).options), name.rpartition("-")[2]
        with collect_failure(written.failures if packages.required else skipped, option):
            check_unchanged(folder, converted.fingerprint)
            compile_one = _compiler(name.removesuffix(dtype))
            path = compile_one(copy.deepcopy(converted.model), folder, dtype, converted.fingerprint)
            written.packages.append(path)
    written.notes.extend(map(_note, skipped.values()))
    for target in bar(packages.exported, "exporting"):
        with collect_failure(written.failures, _EXPORTS[target]):
            check_unchanged(folder, converted.fingerprint)
            export = {"torch": export_torch, "onnx": export_onnx}[target]
            written.packages.append(export(converted, folder))
    return written


def package_converted(folder: Path, packages: Packages) -> Written:
    """Compile or export a model that is already converted.

    Args:
        folder: Folder of the converted model.
        packages: Files to add to it.

    Raises:
        UserError: If ``folder`` holds no converted model, or a required file can't be made on this machine.
    """
    limit_threads()
    check_packages(packages)
    if folder.is_symlink():
        folder = folder.resolve()
    for target in packages.exported:  # a folder that is replaced, and may be a stranger's link to another one
        check_no_link(folder / FOLDERS[target], "delete the link")
    with only_writer(folder):
        return write_packages(load_converted(folder), folder, packages)


def _compiler(kind: str) -> Callable[[CausalLM, Path, str, str], Path]:
    """Return the function that compiles packages whose names begin with ``kind``."""
    if kind.startswith("pass"):
        return partial(compile_pass, width=int(kind.removeprefix("pass").removesuffix("-")))
    return compile_batch if kind else compile_step


def _note(reason: str) -> str:
    return f"no compiled step: {reason.removeprefix('--compile: ')}"


def _check_compilation(model: CausalLM, folder: Path) -> None:
    """Check everything that a compilation needs, without starting it.

    Raises:
        UserError: If there is no compiler, its cache or the record of the step can't be used, or there is too
            little memory or disk space.
    """
    check_compiler()
    check_compiler_cache()
    if not can_remember():
        raise UserError(f"{cache_root()}: can't record that this machine compiled it")
    needed = COPIES * sum(part.numel() * part.element_size() for part in model.state_dict().values())
    available = available_memory()
    if available is not None and available < needed:
        free = available / 2**30
        raise UserError(f"it needs about {needed / 2**30:.1f} GiB of memory, and {free:.1f} are free")
    for place in (Path(tempfile.gettempdir()), folder):
        if shutil.disk_usage(place).free < needed:
            raise UserError(f"{place}: has less than {needed / 2**20:,.0f} MiB of free disk space")
