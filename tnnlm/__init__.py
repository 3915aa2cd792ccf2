"""tnnlm: train long-convolution language models in parallel, deploy them as recurrences.

Every public name is here, and documented with an example in docs/api.md. A name is imported when it is first
used, so that ``import tnnlm`` loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnnlm.checkpoints.locate import load_trained
    from tnnlm.config.loader import load_config
    from tnnlm.config.schema import Config, ConversionConfig, ModelConfig
    from tnnlm.conversion.convert import convert_model
    from tnnlm.conversion.taps import convert_taps
    from tnnlm.data.datamodule import TextDataModule
    from tnnlm.deployment.save import save
    from tnnlm.errors import UserError
    from tnnlm.inference.generator import TextGenerator
    from tnnlm.inference.load import load
    from tnnlm.inference.sampling import SamplingParams
    from tnnlm.kernels import FDTNOConfig, RTFConfig, SGConvConfig, TNOConfig
    from tnnlm.kernels.base import Kernel, KernelConfig, build_kernel, register_kernel
    from tnnlm.models.causal_lm import CausalLM
    from tnnlm.modules.long_conv import LongConv
    from tnnlm.modules.recurrent_conv import RecurrentConv
    from tnnlm.tokenizer import TextTokenizer
    from tnnlm.training.lit_module import LitModel
    from tnnlm.training.run import train

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
    "tnnlm.kernels": ("FDTNOConfig", "RTFConfig", "SGConvConfig", "TNOConfig"),
    "tnnlm.kernels.base": ("Kernel", "KernelConfig", "build_kernel", "register_kernel"),
    "tnnlm.models.causal_lm": ("CausalLM",),
    "tnnlm.modules.long_conv": ("LongConv",),
    "tnnlm.modules.recurrent_conv": ("RecurrentConv",),
    "tnnlm.tokenizer": ("TextTokenizer",),
    "tnnlm.training.lit_module": ("LitModel",),
    "tnnlm.training.run": ("train",),
}
"""module -> the public names that it defines; the same as what type checkers read above"""
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CausalLM",
    "Config",
    "ConversionConfig",
    "FDTNOConfig",
    "Kernel",
    "KernelConfig",
    "LitModel",
    "LongConv",
    "ModelConfig",
    "RTFConfig",
    "RecurrentConv",
    "SGConvConfig",
    "SamplingParams",
    "TNOConfig",
    "TextDataModule",
    "TextGenerator",
    "TextTokenizer",
    "UserError",
    "__version__",
    "build_kernel",
    "convert_model",
    "convert_taps",
    "load",
    "load_config",
    "load_trained",
    "register_kernel",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __name__:
            raise
        raise ImportError(
            f"tnnlm.{name} needs the package {error.name}: install it with: pip install 'tnnlm[train]'"
        ) from error
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
