"""The CI workflows refer to versions, targets and files that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.scripts import ROOT

FILE = ROOT / ".github/workflows/ci.yml"
TEXT = FILE.read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = [step["run"] for step in STEPS if "run" in step]
NIGHTLY_TEXT = (ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8")
NIGHTLY: dict[Any, Any] = yaml.safe_load(NIGHTLY_TEXT)


def supported_versions() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in project["classifiers"])
    return [match[1] for match in found if match]


def test_pushes_and_pull_requests_run_all_jobs() -> None:
    assert set(WORKFLOW[True]) == {"push", "pull_request"}  # YAML parses the key ``on`` as a truth value
    assert set(JOBS) == {"lint", "test", "wheel", "audit"}
    assert not any("if" in job for job in JOBS.values())


def test_oldest_and_newest_python_are_tested_on_every_system() -> None:
    oldest, *_, newest = supported_versions()
    matrix = JOBS["test"]["strategy"]["matrix"]
    assert matrix["python"] == [oldest, newest]
    assert matrix["os"] == ["ubuntu-latest", "ubuntu-24.04-arm", "macos-latest"]
    # GitHub merges an entry into a combination that it matches; the third value makes it a new one.
    assert matrix["include"] == [{"os": "ubuntu-latest", "python": oldest, "cpu": "avx2"}]
    assert matrix["cpu"] == ["native"]
    given = [step["with"]["python-version"] for step in STEPS if "setup-python" in step.get("uses", "")]
    assert sorted(given) == sorted([oldest, oldest, oldest, "${{ matrix.python }}"])


def test_avx2_run_limits_every_library() -> None:
    (step,) = (step for step in STEPS if "avx2" in step.get("if", ""))
    names = set(re.findall(r"echo (\w+)=AVX2 ", step["run"], re.IGNORECASE))
    assert names == {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"}


def test_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {match for command in COMMANDS for match in re.findall(r"\bmake (\w+)", command)}
    assert targets == {"lint", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    lists = [
        step["with"]["cache-dependency-path"]
        for step in STEPS
        if "cache-dependency-path" in step.get("with", {})
    ]
    text = "\n".join([*COMMANDS, *lists]).replace("$GITHUB_WORKSPACE/", "")
    names = set(re.findall(r"[\w/.]+\.(?:py|txt|toml)\b", text))
    assert {"constraints.txt", "pyproject.toml"} <= names
    assert all((ROOT / name).is_file() for name in names), names


@pytest.mark.parametrize("name", JOBS)
def test_jobs_may_read_only_and_end(name: str) -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in JOBS[name]
    assert 0 < JOBS[name]["timeout-minutes"] <= 90
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_actions_are_pinned_and_no_host_appears() -> None:
    folder = ROOT / ".github/workflows"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
    assert TEXT in texts
    # The text as well, since a reusable workflow or a composite action would not be a step of a job.
    used = [line for text in texts for line in re.findall(r"\buses:.*", text)]
    assert len(used) > len(JOBS)
    assert all(re.fullmatch(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in used)
    assert "://" not in TEXT
    assert WORKFLOW["env"] == {"PIP_EXTRA_INDEX_URL": "${{ vars.PIP_EXTRA_INDEX_URL }}"}


def test_vulnerabilities_of_the_pinned_packages_are_looked_up() -> None:
    *_, step = JOBS["audit"]["steps"]
    assert re.search(r"^python -m pip install pip-audit==[\d.]+$", step["run"], re.MULTILINE)
    assert "--requirement constraints.txt" in step["run"]
    assert "pip_audit" not in (ROOT / ".ci/run").read_text(encoding="utf-8")  # it needs a network


@pytest.mark.skipif(os.name != "posix", reason="the job runs in bash")
@pytest.mark.parametrize("name", ["tnnlm/files/atomic.py", "tests/test_docs.py", "tools/serve.py"])
def test_a_wheel_with_tests_or_tools_fails_its_job(name: str, tmp_path: Path) -> None:
    (step,) = (step for step in JOBS["wheel"]["steps"] if "neither tests" in step.get("name", ""))
    (tmp_path / "dist").mkdir()
    with zipfile.ZipFile(tmp_path / "dist/a.whl", "w") as wheel:
        wheel.writestr(name, "")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-e", "-c", step["run"]]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, check=False
    )
    assert (done.returncode == 0) is name.startswith("tnnlm/")


def test_nightly_job_runs_its_target_with_the_oldest_python() -> None:
    assert set(NIGHTLY[True]) == {"schedule", "workflow_dispatch"}
    for key in ("permissions", "concurrency", "env"):
        assert NIGHTLY[key] == WORKFLOW[key]
    assert "://" not in NIGHTLY_TEXT
    (job,) = NIGHTLY["jobs"].values()
    assert 0 < job["timeout-minutes"] <= 60
    *setup, run = job["steps"]
    assert setup == JOBS["lint"]["steps"][:-1]
    assert run == {"run": "make nightly PYTHON=python"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^nightly:.*\n\t(.+)", makefile, re.MULTILINE)
    assert recipe is not None
    assert recipe[1].startswith("TNNLM_NIGHTLY=1 ")
    tests = [word for word in recipe[1].split() if word.startswith("tests/")]
    assert tests
    assert all((ROOT / path).exists() for path in tests)
