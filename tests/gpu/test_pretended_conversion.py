"""Conversion on a pretended GPU: no operator mixes devices, and the files are those of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.pretend.launch import pretended
from tnnlm.config.schema import ConversionConfig
from tnnlm.deployment.pipeline import convert_checkpoint


def test_a_conversion_on_the_gpu_equals_that_on_the_cpu(run_here: Path) -> None:
    found = pretended("conversion", "balanced")
    assert found["launches"]["mm"] > 0
    assert found["note"] is None
    assert found["failures"] == {}
    assert all(found["checks"])
    assert len(found["checks"]) == 3
    assert set(found["not_measured"]) == {"int8 weights"}  # no fast operator on a GPU
    recipe = ConversionConfig(method="balanced")
    done = convert_checkpoint(str(run_here), recipe, out=Path("cpu"), force=False, verify=False)
    for name, lengths in found["ppl"].items():
        # oneDNN applies SiLU to a product before it is rounded to bfloat16, a GPU afterwards in float32.
        within = 1e-3 if name == "bfloat16 weights" else 1e-4
        assert lengths == pytest.approx(done.report.ppl[name], rel=within), name
    own, other = (load_file(f"{folder}/model.safetensors") for folder in ("gpu", "cpu"))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.shape == other[name].shape, name
        assert (tensor - other[name]).norm() <= 1e-4 * other[name].norm(), name
    assert json.loads(Path("gpu/conversion.json").read_text())["method"] == "balanced"
