"""Exact recurrence that a kernel defines itself, and the checks before it is used.

A pole outside the unit circle makes it diverge. Poles that lie close together make it lose its digits: w, of
which the state holds the last values, is then much larger than inputs and outputs, and rounding errors of the
state grow as w does. Such a recurrence is exact in theory only.
"""

from __future__ import annotations

import torch

from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.ops.recurrence import Params

AGREEMENT = 1e-3
"""Largest accepted difference between the outputs of steps and of prefill, relative to the largest output of
the channel. In float32, stable recurrences with separate poles stay below 1e-5."""
_TOKENS = 200
OWN_METHODS = ("companion", "multirate")
"""Methods that use a recurrence which the kernel defines."""
OTHERS = "use --method auto or window"
"""Remedy if a kernel defines no such recurrence."""


@torch.no_grad()
def companion(own: Params | None) -> Params:
    """Return a copy of the recurrence that the kernel defines, if it is stable and its steps are accurate.

    Steps and prefill are run on the same noise in the dtype of ``own``, whose tensors may be the kernel's
    own parameters; the copy doesn't change with them and has no gradient.

    Raises:
        UserError: If the kernel defines none, it has a pole on or outside the unit circle, or its steps are
            inaccurate.
    """
    if own is None or own.METHOD != "companion":
        raise UserError("method companion: the kernel defines no such recurrence", OTHERS)
    radius = own.largest_pole()
    if radius >= 1:
        raise UserError(
            f"the denominator has a pole of modulus {radius:.5f}, on or outside the unit circle, so the "
            "recurrence would not decay",
            "use --method auto or window, or train with model.kernel.constraint=montel",
        )
    difference = _disagreement(own)
    if not difference <= AGREEMENT:  # NaN disagrees.
        raise UserError(
            f"method companion: the poles lie too close together for the state's precision, prefill and step "
            f"disagree by {difference:.1e} of the largest output, and at most {AGREEMENT:g} is accepted",
            OTHERS,
        )
    return type(own)(*(part.detach().clone() for part in own))


def check_kernel(kernel: Kernel, name: str, method: str, setting: str, remedy: str = OTHERS) -> None:
    """Check that a kernel defines the recurrence that a method of ``OWN_METHODS`` uses.

    Args:
        kernel: Kernel, trained or not.
        name: Name under which it is registered.
        method: Conversion method.
        setting: Setting or option, with its value, that asks for the method.
        remedy: Remedy in the error message.

    Raises:
        UserError: If the kernel defines none.
    """
    with torch.no_grad():
        own = kernel.recurrence()
    if own is None or method != own.METHOD:
        raise UserError(f"{setting}: the kernel {name} defines no such recurrence", remedy)


def _disagreement(own: Params) -> float:
    """Return the largest difference between steps and prefill, relative to the channel's largest output."""
    one = own.init_state(1)
    device, dtype = one[0].device, one[0].dtype
    noise = torch.randn(1, _TOKENS, own.taps(1).shape[0], generator=torch.Generator().manual_seed(0))
    x = noise.to(device, dtype)
    y, _ = own.prefill(x, one)
    outputs, state = [], one
    for token in x.unbind(1):
        stepped, state = own.step(token, state)
        outputs.append(stepped)
    difference = (torch.stack(outputs, dim=1) - y).abs().amax((0, 1))
    scale = y.abs().amax((0, 1)).clamp(min=torch.finfo(dtype).tiny)
    return float((difference / scale).max())
