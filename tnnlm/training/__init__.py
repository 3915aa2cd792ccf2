"""Training with PyTorch Lightning: LightningModule, Trainer, callbacks, loggers, resuming and SLURM.

Only this package and ``tnnlm.data`` may import Lightning.
"""
