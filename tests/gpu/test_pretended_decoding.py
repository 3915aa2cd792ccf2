"""Conversion, generation by every engine and the server, on tensors of a pretended GPU.

The counts of host synchronisations and launches are printed: ``pytest -s``.
"""

from __future__ import annotations

import math

from tests.support.pretend.launch import pretended

FEW = (
    "trainer.max_steps=2",
    "trainer.val_every_n_steps=2",
    "trainer.sample_tokens=2",
    "trainer.precision=32-true",
)
MOST_SYNCS = 2
"""Waits of the host per token: for the largest logit to be finite, and for the token."""
MOST_LAUNCHES = {"eager float32": 36, "packed float32": 36, "packed bfloat16": 45}
"""Largest number of launches per layer of a step; those outside of the layers count too."""
GRAPH = 3
"""Launches of a replayed step: inputs in, the graph, outputs out."""


def test_a_model_is_trained_converted_generates_by_every_engine_and_is_served_on_a_gpu() -> None:
    report = pretended("decoded", *FEW)
    engines, served, layers = report["engines"], report["served"], 2
    for name, found in engines.items():
        print(f"{name}: {found['launches']} launches per step; {found['stream']} {found['batch']}")
    print(f"server: {served['syncs']}")
    assert math.isfinite(report["summary"]["val/ppl_recurrent"])
    assert report["automatic"] == "graph"
    assert "needs a CPU" in report["compiled"]
    for name, found in engines.items():
        assert found["info"].startswith(f"{name.split()[0]} engine, cuda, ")
        if "float32" in name:
            assert found["text"] == report["cpu"] == served["greedy"][0]
        assert found["launches"] <= MOST_LAUNCHES.get(name, GRAPH) * (1 if "graph" in name else layers)
        for syncs in (found["stream"], found["batch"]):
            assert sum(syncs.values()) <= MOST_SYNCS
    assert len(served["sampled"]) == 3
    assert sum(served["syncs"].values()) <= MOST_SYNCS
