"""Kernels of all layers in one batch: equal to layer by layer, and only where nothing forbids it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import FAMILIES, tiny_config
from tnnlm.kernels import FDTNOConfig, HyenaConfig, KernelConfig, TNOConfig, TNOKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM
from tnnlm.models.joint_kernels import joint_features, joint_kernels
from tnnlm.modules import ContextConv
from tnnlm.ops.context import ContextGroup
from tnnlm.training.fsdp import shard

LENGTH = 13
KERNELS = {
    "tno": TNOConfig(rpe_dim=8, rpe_layers=2, decay=0.9),
    "tno without decay": TNOConfig(rpe_dim=8, rpe_layers=2, decay=1.0),
    "tno without hidden layers": TNOConfig(rpe_dim=8, rpe_layers=0),
    **{
        f"fd_tno {activation} {norm} {given}": FDTNOConfig(
            name="fd_tno", rpe_dim=8, rpe_layers=2, activation=activation, rpe_norm=norm, rpe_input=given
        )
        for activation, norm, given in (
            ("gelu", True, "cosine"),
            ("silu", False, "angle"),
            ("relu", True, "angle"),
            ("relu", False, "cosine"),
        )
    },
    "hyena": HyenaConfig(name="hyena", width=8, layers=1, bands=2, frequency=2.0),
    "hyena with trained encoding": HyenaConfig(name="hyena", width=8, frequency=2.0, train_encoding=True),
    "hyena that is short": HyenaConfig(name="hyena", width=8, layers=0, frequency=2.0, length=7),
}


def model_of(kernel: KernelConfig | None = None, **changes: object) -> CausalLM:
    """Return a model of three layers whose kernels have random parameters, in training mode."""
    model = CausalLM(tiny_config(kernel=kernel or FAMILIES["tno"](), n_layers=3, **changes)).train()
    for block in model.layers:
        for parameter in block.mixer.conv.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def results(model: CausalLM, joint: bool, rows: Tensor) -> list[Tensor]:
    """Return the loss, the final hidden states and the gradients of all parameters."""
    model.zero_grad()
    with joint_kernels(joint):
        loss = model.loss(rows)
        loss.backward()
        features = model.features(rows[:, :-1])
    return [
        loss.detach(),
        features.detach(),
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
    ]


def assert_equal(model: CausalLM, rows: Tensor, tolerance: float) -> None:
    """Assert that the batch changes no result, with gradients of every parameter."""
    alone, joint = results(model, False, rows), results(model, True, rows)
    assert len(alone) == len(joint) == 2 + len(list(model.parameters()))
    for a, b in zip(alone, joint, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def is_joint(model: Any) -> bool:
    """Return whether the kernels are computed in one batch where the device does not matter."""
    with joint_kernels(True):
        return joint_features(model.layers, LENGTH) is not None


@pytest.mark.parametrize("name", KERNELS)
def test_outputs_and_gradients_are_those_of_separate_layers(name: str) -> None:
    model = model_of(KERNELS[name])
    assert is_joint(model)
    rows = torch.randint(300, (2, LENGTH + 1))
    assert_equal(model, rows, 1e-5)  # of the largest value, in float32
    assert_equal(model.double(), rows, 1e-12)
    # Longer than the training length.
    assert_equal(model, torch.randint(300, (1, 46)), 1e-12)


@pytest.mark.parametrize("wiring", ["hyena", "s4", "s4_glu"])
def test_every_wiring_passes_the_features_on(wiring: str) -> None:
    assert_equal(model_of(block=wiring, expand=1).double(), torch.randint(300, (2, LENGTH + 1)), 1e-12)


def test_decays_and_outputs_may_differ_between_layers() -> None:
    model = model_of().double()
    for index, block in enumerate(model.layers):
        block.mixer.conv.kernel.decays.fill_(0.9 + 0.03 * index)
    assert is_joint(model)
    assert_equal(model, torch.randint(300, (2, LENGTH + 1)), 1e-12)


def test_a_kernel_stays_exact_under_autocast() -> None:
    model = model_of()
    rows = torch.randint(300, (2, LENGTH + 1))
    with torch.autocast("cpu", torch.bfloat16), joint_kernels(True):
        joint = joint_features(model.layers, LENGTH)
    assert joint is not None
    assert joint[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        alone, joint = results(model, False, rows), results(model, True, rows)
    torch.testing.assert_close(joint[0], alone[0], rtol=1e-3, atol=1e-3)


class Operators(TorchDispatchMode):
    """Mode that counts the operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it if it isn't a view."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_further_layer_needs_fewer_operators() -> None:
    counts = {}
    for joint in (False, True):
        for layers in (1, 2):
            model = CausalLM(tiny_config(n_layers=layers, kernel=TNOConfig(rpe_dim=8, rpe_layers=6))).train()
            with joint_kernels(joint), Operators() as operators:
                model.loss(torch.zeros(1, LENGTH + 1, dtype=torch.long)).backward()
            counts[joint, layers] = operators.count
    further = {joint: counts[joint, 2] - counts[joint, 1] for joint in (False, True)}
    print(f"operators of a further layer, forward and backward: {further[False]}, in a batch {further[True]}")
    assert further[True] < further[False] / 2


def test_a_cpu_and_evaluation_compute_layers_separately() -> None:
    model = model_of()
    assert joint_features(model.layers, LENGTH) is None
    with joint_kernels(False):
        assert joint_features(model.layers, LENGTH) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["tno", "fd_tno", "hyena"])
def test_a_gpu_computes_layers_in_one_batch(family: str) -> None:
    model = model_of(FAMILIES[family]()).cuda()
    assert joint_features(model.layers, LENGTH) is not None
    assert_equal(model, torch.randint(300, (2, LENGTH + 1), device="cuda"), 1e-4)


@pytest.mark.parametrize("setting", ["eval", "recompute"])
def test_blocks_get_features_only_while_their_activations_are_kept(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    model.recompute = setting == "recompute"
    model.train(setting != "eval")
    rows = torch.randint(300, (2, LENGTH + 1))
    expected = results(model, False, rows)
    monkeypatch.setattr("tnnlm.models.backbone.joint_features", None)  # a call would fail
    for a, b in zip(expected, results(model, True, rows), strict=True):
        assert torch.equal(a, b)


class Shifted(TNOKernel):
    """Kernel of a user, derived from ours."""

    def forward(self, length: int, features: Tensor | None = None) -> Tensor:
        """Return other taps."""
        return super().forward(length) + 1


class Adapted(nn.Linear):
    """Linear layer with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return other outputs."""
        return super().forward(x) + 1


def _other_kernel(model: CausalLM) -> None:
    model.layers[1].mixer.conv.kernel = Shifted(TNOConfig(rpe_dim=8, rpe_layers=2), 48)


def _only_other_kernels(model: CausalLM) -> None:
    for block in model.layers:
        block.mixer.conv.kernel = Shifted(TNOConfig(rpe_dim=8, rpe_layers=2), 48)


def _other_shape(model: CausalLM) -> None:
    model.layers[1].mixer.conv.kernel = TNOKernel(TNOConfig(rpe_dim=8, rpe_layers=3), 48)


def _other_dtype(model: CausalLM) -> None:
    model.layers[1].mixer.conv.kernel.double()


def _adapter(model: CausalLM) -> None:
    model.layers[1].mixer.conv.kernel.rpe.hidden[0] = Adapted(8, 8)


def _hook(model: CausalLM) -> None:
    model.layers[1].mixer.conv.kernel.rpe.hidden[0].register_forward_hook(lambda layer, x, y: y + 1)


def _context(model: CausalLM) -> None:
    conv = model.layers[1].mixer.conv
    model.layers[1].mixer.conv = ContextConv(conv.kernel, ContextGroup())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize(
    "change",
    [
        _other_kernel,
        _only_other_kernels,
        _other_shape,
        _other_dtype,
        _adapter,
        _hook,
        _context,
        CausalLM.compile_blocks,
    ],
)
def test_layers_that_differ_or_run_other_code_compute_their_own_kernel(
    change: Callable[[CausalLM], None],
) -> None:
    model = model_of()
    assert is_joint(model)
    change(model)
    assert not is_joint(model)


def test_settings_of_kernels_are_compared() -> None:
    model = model_of(KERNELS["fd_tno relu True angle"])
    model.layers[2].mixer.conv.kernel.rpe_input = "cosine"
    assert not is_joint(model)


def test_bidirectional_models_and_kernels_without_network_are_left_alone() -> None:
    assert not is_joint(MaskedLM(tiny_config()))
    for family in ("sgconv", "rtf"):
        assert not is_joint(model_of(FAMILIES[family]()))


@pytest.fixture
def process_group() -> Iterator[None]:
    """Process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_layers_compute_their_own_kernel(process_group: None) -> None:
    rows = torch.randint(300, (2, LENGTH + 1))
    for rounded in (False, True):
        model = model_of()
        expected = results(model, False, rows)
        shard(model, init_device_mesh("cpu", (1,)), rounded=rounded)
        for _ in range(2):  # also after weights were gathered
            assert not is_joint(model)
            with joint_kernels(True):
                loss = model.loss(rows)
            loss.backward()
            torch.testing.assert_close(loss.detach(), expected[0])


def test_data_parallelism_sees_a_gradient_of_every_parameter(process_group: None) -> None:
    model = model_of()
    rows = torch.randint(300, (2, LENGTH + 1))
    # Without a gradient of every parameter the second step fails; gradients in another layout are a warning.
    parallel = DistributedDataParallel(model)
    found = []
    for joint in (False, True, True):
        model.zero_grad()
        with joint_kernels(joint):
            parallel(rows[:, :-1]).logsumexp(2).mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[1]) == len(list(model.parameters()))
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
