"""The memory on paper is close to the live tensors that torch's memory tracker counts in a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.conversion.convert import convert_layers
from tnnlm.evaluation import parallel_nll, recurrent_nll
from tnnlm.models.factory import build_model
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.modules import RecurrentConv
from tnnlm.training import estimate, memory
from tnnlm.training.announce import attached_line
from tnnlm.training.attached import attached_recurrences
from tnnlm.training.memory import estimate_memory, on_path_of
from tnnlm.training.optim import build_optimizer


def tracked_step(config: Config) -> int:
    """Return the peak of live bytes in a step of the whole model, as torch's memory tracker counts them."""
    mixed = config.trainer.precision == "bf16-mixed"
    with on_path_of(config.trainer.accelerator), FakeTensorMode():
        model = build_model(config)
        model.recompute = config.trainer.recompute
        optimizer = build_optimizer(model, config.optim)
        rows = torch.zeros(config.data.batch_size, config.model.max_length + 1, dtype=torch.long)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates the moments
        tracker = MemTracker()
        tracker.track_external(model, optimizer, rows, *(p.grad for p in model.parameters()))
        with tracker:
            # Lightning frees the gradients of the step before only after the forward pass.
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
                loss = model.loss(rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
    return peak_of(tracker)


def tracked_validation(config: Config) -> int:
    """Return the peak of live bytes in the validation of a batch in both forms, after a training step."""
    _, found = convert_layers(build_model(config), config.conversion)
    with FakeTensorMode() as fake:
        model = build_model(config)
        moments = torch.empty(3 * model.n_params)  # as many gradients as moments of each kind
        convs = [RecurrentConv(type(layer.params)(*map(fake.from_tensor, layer.params))) for layer in found]
        rows = torch.zeros(config.data.batch_size, config.model.max_length + 1, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, moments, *convs, rows)
        with tracker, Readable():
            BothForms(model, convs)(rows, config.conversion.chunk)
    return peak_of(tracker)


class BothForms(nn.Module):
    """Validation as a single module, because the tracker runs the outermost module once only."""

    def __init__(self, model: Any, convs: list[RecurrentConv]) -> None:
        super().__init__()
        self.model, self.convs = model, convs

    def forward(self, rows: torch.Tensor, chunk: int) -> None:
        """Score the rows in both forms."""
        parallel_nll(self.model, rows)
        with in_recurrent_form(self.model, self.convs):
            recurrent_nll(self.model, rows, chunk)


class Readable(TorchDispatchMode):
    """Mode that gives every number that Python reads the value 1, because fake tensors have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or return 1."""
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def peak_of(tracker: MemTracker) -> int:
    """Return the peak of all live bytes on the CPU."""
    snapshot: Any = tracker.get_tracker_snapshot("peak")
    return int(snapshot[torch.device("cpu")]["Total"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demo", ["trainer.precision=32-true"]),
        ("sgconv_wt103", ["trainer.precision=bf16-mixed"]),
        ("rtf_wt103", ["trainer.precision=32-true", "trainer.recompute=true"]),
        ("tnn_125m_fineweb", ["trainer.devices=1", "trainer.strategy=auto", "trainer.accumulate=1"]),
    ],
    ids=["demo", "sgconv 48.8M bf16", "rtf 48.1M recomputed", "tno 125M bf16"],
)
def test_step_takes_the_memory_on_paper(name: str, words: list[str]) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml", ["trainer.accelerator=cpu", *words])
    assert estimate_memory(config).step == pytest.approx(tracked_step(config), rel=0.1)


def test_step_on_a_gpu_takes_the_memory_of_its_own_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tracker does not see the work space of the transforms.
    monkeypatch.setattr(memory, "_work", lambda device, operator, args: 0)
    words = ["trainer.precision=bf16-mixed", "trainer.devices=1", "trainer.accumulate=1", "model.n_layers=3"]
    path, steps = ROOT / "configs/tnn_125m_fineweb.yaml", {}
    for device in ("cpu", "cuda"):
        config = load_config(path, [*words, f"trainer.accelerator={device}", "trainer.strategy=auto"])
        steps[device] = estimate_memory(config).step
    assert steps["cuda"] == pytest.approx(tracked_step(config), rel=0.1)
    # 2^26 logits at once instead of 2^22, in float32, are far from the only difference.
    assert steps["cuda"] - steps["cpu"] > 4 * (2**26 - 2**22)


def test_weights_in_other_dtypes_take_their_size() -> None:
    words = ["trainer.accelerator=cpu", "model.kernel.rpe_layers=0", "model.d_model=32"]
    names = ("bf16-true", "32-true", "64-true")
    states = [estimate_memory(load_config(None, [*words, f"trainer.precision={n}"])).state for n in names]
    batch = 8 * (load_config(None, words).model.max_length + 1) * load_config(None, words).data.batch_size
    sizes = [state - batch for state in states]
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 2, 4], rel=0.01)


def test_validation_takes_the_memory_on_paper() -> None:
    words = ["trainer.accelerator=cpu", "model.kernel.rpe_layers=1", "model.vocab_size=300"]
    for more in (["conversion.method=etsc"], ["conversion.method=window", "model.kernel.decay=0.9"]):
        config = load_config(None, [*words, *more])
        assert estimate_memory(config).validation == pytest.approx(tracked_validation(config), rel=0.1)


def test_several_devices_hold_the_buckets_of_ddp() -> None:
    words = ["trainer.accelerator=cpu", "model.kernel.rpe_layers=0"]
    one, two = (estimate_memory(load_config(None, [*words, f"trainer.devices={n}"])) for n in (1, 2))
    assert one.buckets == 0
    assert two.buckets == 4 * build_model(load_config(None, words)).n_params
    assert two.step - one.step == two.buckets


def test_attached_recurrences_have_the_size_of_converted_ones() -> None:
    words = ["trainer.accelerator=cpu", "model.d_model=32", "model.max_length=64", "model.n_layers=2"]
    for more in (["model.kernel.decay=0.9"], ["conversion.method=window"], ["model.kernel.name=rtf"]):
        config = load_config(None, [*words, *more])
        horizon, layers = convert_layers(build_model(config), config.conversion)
        attached = attached_recurrences(config)
        assert attached.horizon == pytest.approx(horizon, rel=0.1)
        size = sum(part.nbytes for layer in layers for part in layer.params)
        assert attached.nbytes(2) == pytest.approx(size, rel=0.1)


def test_attached_recurrences_do_not_depend_on_the_random_state() -> None:
    config = load_config(None, ["trainer.accelerator=cpu", "model.d_model=32", "model.max_length=512"])
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(attached_recurrences(config).horizon)
        assert torch.equal(state, torch.get_rng_state())
    assert len(set(found)) == 1


def test_kernels_that_share_parameters_between_groups_are_sampled_whole() -> None:
    words = ["model.kernel.name=rtf", "model.kernel.denominators=32", "model.d_model=64"]
    config = load_config(None, [*words, "conversion.method=companion"])
    _, layers = convert_layers(build_model(config), config.conversion)
    size = sum(part.nbytes for layer in layers for part in layer.params)
    assert attached_recurrences(config).nbytes(config.model.n_layers) == pytest.approx(size, rel=0.1)


def test_a_run_of_1b3_parameters_names_a_smaller_choice_than_etsc() -> None:
    config = load_config(ROOT / "configs/tnn_1b3_fineweb.yaml", ["conversion.method=etsc"])
    attached = attached_recurrences(config)
    assert attached.nbytes(24) / 1e9 == pytest.approx(1.9, abs=0.1)
    line = attached_line(config, attached)
    assert line.startswith("each checkpoint and validation holds recurrences of 1.7")
    assert " GiB (conversion.method=etsc, horizon 3,1" in line
    assert line.endswith("; conversion.method=auto selects the smallest within conversion.tolerance")
    config.conversion.method = "auto"
    assert attached_recurrences(config).nbytes(24) < attached.nbytes(24) / 20


@pytest.mark.parametrize(("precision", "width"), [("bf16-true", 2), ("64-true", 8), ("16-mixed", 4)])
def test_every_precision_is_estimated(precision: str, width: int) -> None:
    config = load_config(None, ["trainer.accelerator=cpu", f"trainer.precision={precision}"])
    memory = estimate_memory(config)
    with torch.device("meta"):
        weights = build_model(config).n_params
    # Kernels stay in float32 in half precision; decays are buffers.
    assert memory.state == pytest.approx(4 * width * weights, rel=0.1)


def test_precision_of_a_gpu_elsewhere_does_not_depend_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(estimate, "capability", lambda name: SimpleNamespace(available=False))
    precisions = {
        name: estimate.resolve_precision(load_config(None, [f"trainer.accelerator={name}"]))
        for name in ("auto", "cpu", "cuda", "gpu")
    }
    assert precisions == {"auto": "32-true", "cpu": "32-true", "cuda": "bf16-mixed", "gpu": "bf16-mixed"}
