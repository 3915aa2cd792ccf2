"""Long-convolution language models: parallel training, deployment as recurrences.

This module exports every public name; docs/reference/api.md documents them with examples. A name is imported
on first use, so that ``import tnnlm`` loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnnlm.checkpoints.locate import load_trained as load_trained
    from tnnlm.config.loader import load_config as load_config
    from tnnlm.config.schema import Config as Config
    from tnnlm.config.schema import ConversionConfig as ConversionConfig
    from tnnlm.config.schema import ModelConfig as ModelConfig
    from tnnlm.conversion.convert import convert_model as convert_model
    from tnnlm.conversion.taps import convert_taps as convert_taps
    from tnnlm.data.datamodule import TextDataModule as TextDataModule
    from tnnlm.deployment.save import save as save
    from tnnlm.errors import UserError as UserError
    from tnnlm.inference.generator import TextGenerator as TextGenerator
    from tnnlm.inference.load import load as load
    from tnnlm.inference.sampling import SamplingParams as SamplingParams
    from tnnlm.kernels import FDTNOConfig as FDTNOConfig
    from tnnlm.kernels import HyenaConfig as HyenaConfig
    from tnnlm.kernels import RTFConfig as RTFConfig
    from tnnlm.kernels import SGConvConfig as SGConvConfig
    from tnnlm.kernels import TNOConfig as TNOConfig
    from tnnlm.kernels.base import Kernel as Kernel
    from tnnlm.kernels.base import KernelConfig as KernelConfig
    from tnnlm.kernels.base import build_kernel as build_kernel
    from tnnlm.kernels.base import register_kernel as register_kernel
    from tnnlm.models.causal_lm import CausalLM as CausalLM
    from tnnlm.modules.long_conv import LongConv as LongConv
    from tnnlm.modules.recurrent_conv import RecurrentConv as RecurrentConv
    from tnnlm.tokenizer import TextTokenizer as TextTokenizer
    from tnnlm.training.lit_module import LitModel as LitModel
    from tnnlm.training.run import train as train
    from tnnlm.trust import Trust as Trust

__version__ = "0.1.0"

_HOMES = {
    "tnnlm.checkpoints.locate": ("load_trained",),
    "tnnlm.config.loader": ("load_config",),
    "tnnlm.config.schema": ("Config", "ConversionConfig", "ModelConfig"),
    "tnnlm.conversion.convert": ("convert_model",),
    "tnnlm.conversion.taps": ("convert_taps",),
    "tnnlm.data.datamodule": ("TextDataModule",),
    "tnnlm.deployment.save": ("save",),
    "tnnlm.errors": ("UserError",),
    "tnnlm.inference.generator": ("TextGenerator",),
    "tnnlm.inference.load": ("load",),
    "tnnlm.inference.sampling": ("SamplingParams",),
    "tnnlm.kernels": ("FDTNOConfig", "HyenaConfig", "RTFConfig", "SGConvConfig", "TNOConfig"),
    "tnnlm.kernels.base": ("Kernel", "KernelConfig", "build_kernel", "register_kernel"),
    "tnnlm.models.causal_lm": ("CausalLM",),
    "tnnlm.modules.long_conv": ("LongConv",),
    "tnnlm.modules.recurrent_conv": ("RecurrentConv",),
    "tnnlm.tokenizer": ("TextTokenizer",),
    "tnnlm.training.lit_module": ("LitModel",),
    "tnnlm.training.run": ("train",),
    "tnnlm.trust": ("Trust",),
}
"""Public names by the module that defines them; equal to the imports for type checkers above."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __name__:
            raise
        install = import_module(f"{__name__}.errors").install_command("train")
        raise ImportError(f"tnnlm.{name}: needs the package {error.name}; run: {install}") from error
    globals()[name] = value  # later look-ups do not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
