"""Settings of the optimizer and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from tnnlm.fields import choice, number


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    optimizer: str = choice("adamw", "adamw", "muon")
    """Optimizer: adamw, or muon (Muon for the matrices of the blocks outside of the kernels, AdamW for
    embedding, head, kernels, norms and biases; PyTorch 2.9 or newer, and no strategy that shards weights).
    Updates of Muon are scaled to those of AdamW, so that ``optim.lr`` and ``optim.weight_decay`` serve
    both."""
    lr: float = number(2e-3, above=0, high=100)
    """Peak learning rate."""
    beta1: float = number(0.9, low=0, high=0.9999)
    """AdamW beta1, the decay rate of the running mean of the gradient."""
    beta2: float = number(0.98, low=0, high=0.999999)
    """AdamW beta2, the decay rate of the running mean of the squared gradient."""
    eps: float = number(1e-8, above=0, high=1)
    """AdamW epsilon, added to the denominator for numerical stability."""
    weight_decay: float = number(0.1, low=0, high=100)
    """Decoupled weight decay of the parameters that ``optim.decayed`` selects."""
    decayed: str = choice("matrices", "matrices", "all")
    """Parameters with weight decay: matrices (excluding biases, norms and kernels, because decaying a kernel
    shortens the memory) or all, as in the published TNN language models."""
    kernel_lr_scale: float = number(1.0, above=0, high=1_000)
    """Learning rate of the kernel parameters as a multiple of ``optim.lr``."""
    schedule: str = choice("cosine", "cosine", "wsd", "inverse_sqrt", "constant")
    """Learning rate schedule after the warm-up: cosine, wsd (warm-up, stable, decay: constant, then linear
    over the last ``optim.decay_share`` of the steps), inverse_sqrt or constant. A run with wsd that has not
    begun to decay can be extended on resume, with the same result as if it had been longer from the start."""
    decay_share: float = number(0.1, above=0, high=1)
    """Share of the steps of the schedule over which the learning rate of wsd decays."""
    warmup_steps: int = number(100, low=0)
    """Number of optimizer steps of linear warm-up."""
    warmup_start_lr: float = number(0.0, low=0, high=100)
    """Learning rate of the first step of the warm-up, at most ``optim.lr``. 0: ``optim.lr`` divided by
    ``optim.warmup_steps``, because a step at the learning rate 0 has no effect."""
    schedule_steps: int | None = number(None, low=1)
    """Step at which the schedules cosine and wsd reach their end (null: ``trainer.max_steps``). The learning
    rate is constant afterwards."""
    min_lr_ratio: float = number(0.01, low=0, high=1)
    """Final learning rate of the schedules cosine and wsd as a fraction of ``optim.lr``."""
    grad_clip: float = number(1.0, low=0)
    """Maximum gradient norm; 0 disables clipping."""
