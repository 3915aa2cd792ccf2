"""Converted models as Hugging Face Transformers models (extra ``[hf]``).

``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`` finds these classes through the
``auto_map`` in config.json. After ``import tnnlm.hf``, ``trust_remote_code`` is not needed.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from tnnlm.checkpoints.hf_files import MODEL_TYPE
from tnnlm.hf.cache import RecurrentCache
from tnnlm.hf.config import TnnlmConfig
from tnnlm.hf.model import TnnlmForCausalLM

AutoConfig.register(MODEL_TYPE, TnnlmConfig, exist_ok=True)
AutoModelForCausalLM.register(TnnlmConfig, TnnlmForCausalLM, exist_ok=True)

__all__ = ["RecurrentCache", "TnnlmConfig", "TnnlmForCausalLM"]
