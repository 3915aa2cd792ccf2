"""Kernels that take the weights of another training length keep their taps; the others refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES
from tests.support.scripts import assert_refused
from tests.training.test_initial import SHORT, STILL, done
from tnnlm.checkpoints.locate import load_trained
from tnnlm.kernels import Kernel, build_kernel

CONTINUES = {"tno": "position network", "rtf": "exactly", "sgconv": "1 scale more"}


def two_lengths(name: str, before: int, after: int) -> tuple[Kernel, Kernel]:
    """Return a kernel with other weights than initial ones, and a new one for another length."""
    trained = build_kernel(FAMILIES[name](), 6, before).double()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return trained, build_kernel(FAMILIES[name](), 6, after).double()


@pytest.mark.parametrize("name", CONTINUES)
@pytest.mark.parametrize(("before", "after"), [(32, 64), (21, 35), (33, 17)])
def test_taps_stay_at_the_lags_of_both_lengths(name: str, before: int, after: int) -> None:
    trained, kernel = two_lengths(name, before, after)
    how = kernel.continue_from(trained)
    assert how is not None
    if before < after:
        assert CONTINUES[name] in how
    lags = min(before, after)
    torch.testing.assert_close(kernel(lags), trained(lags), rtol=0, atol=1e-10)
    if name != "sgconv":  # which has no taps past its length
        torch.testing.assert_close(kernel(99), trained(99), rtol=0, atol=1e-10)


def test_further_scale_of_sgconv_starts_at_zero_and_is_trained() -> None:
    trained, kernel = two_lengths("sgconv", 32, 64)
    kernel.continue_from(trained)
    taps = kernel(64)
    assert not taps[:, 32:].any()
    taps[:, 32:].sum().backward()
    scales = dict(kernel.named_parameters())["scales"]
    assert scales.grad is not None
    assert scales.grad[-1].all()


@pytest.mark.parametrize("name", ["fd_tno", "hyena"])
def test_kernel_of_one_length_refuses_and_stays_unchanged(name: str) -> None:
    trained, kernel = two_lengths(name, 32, 64)
    before = kernel(64)
    assert kernel.continue_from(trained) is None
    assert torch.equal(kernel(64), before)
    assert kernel.fixed_because != Kernel.fixed_because


def test_run_of_rtf_continues_at_a_longer_context_and_hyena_names_its_length(
    run_here: Path, script: Any
) -> None:
    sizes = ("model.d_model=16", "model.n_layers=1", "model.vocab_size=400", "model.max_length=32")
    rtf = ("model.kernel.name=rtf", "model.kernel.state_size=4", "model.kernel.init=xavier")
    done(script("train", *SHORT, *sizes, *rtf, "model.kernel.constraint=montel", "name=rtf"))
    out = done(script("train", *STILL, "init.weights=rtf", "model.max_length=80", "name=longer"))
    assert "trained at 32 tokens, each kernel continues: its recurrence continues exactly" in out
    tokens = torch.randint(300, (1, 32))
    old, new = (load_trained(f"runs/{name}").model for name in ("rtf", "longer"))
    torch.testing.assert_close(new(tokens), old(tokens), rtol=0, atol=1e-5)

    hyena = ("model.kernel.name=hyena", "model.kernel.width=8", "model.kernel.layers=1")
    done(script("train", *SHORT, *sizes, *hyena, "name=hyena"))
    longer = ("init.weights=hyena", "model.max_length=48", "name=more")
    refused = script("train", *STILL, *longer)
    assert_refused(refused, "kernel hyena can't continue", "set model.kernel.length=32 too")
    out = done(script("train", *STILL, *longer, "model.kernel.length=32"))
    assert "it still ends at lag 32" in out
