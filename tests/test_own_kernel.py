"""Custom kernels: the documented example trains, converts and generates without a change to the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.errors import ConfigError
from tnnlm.models.causal_lm import CausalLM

EXAMPLE = ROOT / "examples" / "hyena_kernel.py"


def test_example_trains_converts_and_generates(script: Any) -> None:
    write_text()
    shutil.copy(EXAMPLE, "hyena_kernel.py")
    words = [word for word in SETTINGS if not word.startswith("model.kernel.")]
    words += ["model.kernel.name=hyena_style", "model.kernel.module=hyena_kernel.py", "model.kernel.bands=4"]
    trained = script("train", *words, "conversion.method=auto", "name=hyena")
    assert trained.code == 0, trained.err
    converted = script("convert", "runs/hyena", "--method", "auto", "--verify")
    assert converted.code == 0, converted.err
    report = json.loads(Path("runs/hyena/converted/conversion.json").read_text())
    assert {layer["method"] for layer in report["layers"]} <= {"balanced", "etsc", "window"}
    # Decoding only needs the recurrence.
    Path("hyena_kernel.py").unlink()
    written = script(
        "generate", "--model", "runs/hyena/converted", "--prompt", "The ", "--max-new-tokens", "3"
    )
    assert written.code == 0, written.err


def test_example_is_a_causal_kernel_of_any_length() -> None:
    config = load_config(
        overrides=["model.kernel.name=hyena_style", f"model.kernel.module={EXAMPLE}", "model.max_length=64"]
    )
    kernel = CausalLM(config.model).blocks[0].mixer.conv.kernel
    torch.testing.assert_close(kernel(40), kernel(200)[:, :40])
    assert kernel(400)[:, 300:].abs().max() < 1e-3 * kernel(400).abs().max()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("1 +", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_module_that_cannot_be_imported_is_reported(text: str | None, reason: str) -> None:
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.kernel\.module=mine\.py: can't be imported .*{reason}"):
        load_config(overrides=["model.kernel.module=mine.py"])


def test_setting_of_a_type_that_cannot_be_read_is_reported() -> None:
    Path("odd.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from tnnlm.kernels import KernelConfig, TNOKernel, register_kernel\n"
        "@dataclass(kw_only=True)\nclass OddConfig(KernelConfig):\n"
        "    sizes: list[int] = field(default_factory=lambda: [1])\n    table: dict[str, int] | None = None\n"
        "register_kernel('odd', OddConfig)(TNOKernel)\n"
    )
    with pytest.raises(ConfigError, match=r"^model\.kernel\.table: a setting can't have the type dict"):
        load_config(overrides=["model.kernel.module=odd.py", "model.kernel.name=odd"])


def test_settings_of_a_kernel_may_be_lists_and_groups() -> None:
    Path("lists.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from tnnlm.kernels import KernelConfig, TNOKernel, register_kernel\n"
        "@dataclass(kw_only=True)\nclass Inner:\n    rate: float\n"
        "@dataclass(kw_only=True)\nclass ListsConfig(KernelConfig):\n"
        "    sizes: list[int] = field(default_factory=lambda: [1])\n    inner: Inner\n"
        "register_kernel('lists', ListsConfig)(TNOKernel)\n"
    )
    words = ["model.kernel.module=lists.py", "model.kernel.name=lists"]
    kernel: Any = load_config(
        overrides=[*words, "model.kernel.sizes=[1e2, 3]", "model.kernel.inner.rate=2"]
    ).model.kernel
    assert (kernel.sizes, kernel.inner.rate) == ([100, 3], 2.0)
    with pytest.raises(ConfigError, match=r"^model\.kernel\.inner\.rate: must be set$"):
        load_config(overrides=words)
    with pytest.raises(ConfigError, match=r"^model\.kernel\.sizes=\[1:30\]: expected an integer"):
        load_config(overrides=[*words, "model.kernel.inner={rate: 1}", "model.kernel.sizes=[1:30]"])


def test_module_that_registers_something_else_is_reported() -> None:
    Path("mine.py").write_text("")
    with pytest.raises(ConfigError, match="unknown kernel"):
        load_config(overrides=["model.kernel.module=mine.py", "model.kernel.name=mine"])


def test_dry_run_survives_a_kernel_that_reads_values(script: Any) -> None:
    Path("reading.py").write_text(
        "from dataclasses import dataclass\n"
        "from tnnlm.kernels import TNOConfig, TNOKernel, register_kernel\n"
        "@dataclass(kw_only=True)\nclass ReadingConfig(TNOConfig):\n    name: str = 'reading'\n"
        "@register_kernel('reading', ReadingConfig)\nclass Reading(TNOKernel):\n"
        "    def forward(self, length):\n"
        "        taps = super().forward(length)\n        return taps / float(taps.detach().numpy().max())\n"
    )
    words = ["model.kernel.module=reading.py", "model.kernel.name=reading", "--dry-run"]
    shown = script("train", *words)
    assert shown.code == 0, shown.err
    last = shown.out.splitlines()[-1]
    assert last.startswith("estimated memory: unknown, because reading.py fails with tensors without values")
    assert "name: reading" in shown.out
    assert json.loads(script("train", *words, "--json").out)["memory_bytes"] is None
