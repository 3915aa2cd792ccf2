"""Parallel form of a converted folder, from which a run can start: its weights with the kernels.

The kernels are in a separate file next to the recurrences, and share the other weights with them.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from tnnlm.checkpoints.converted import conv_prefix, load_converted
from tnnlm.checkpoints.manifest import KERNELS, REMEDY, verify_folder
from tnnlm.checkpoints.training import Loaded
from tnnlm.checkpoints.weights import check_finite, check_sizes, load_weights
from tnnlm.config.loader import config_from_dict
from tnnlm.errors import CheckpointError, one_line
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.reading import check_regular, read_json
from tnnlm.trust import NO_CODE, Trust


def load_parallel(folder: Path, trust: Trust = NO_CODE) -> Loaded:
    """Load the trained model of a converted folder in its parallel form on the CPU.

    Its kernel module, if it names one, runs only as ``trust`` allows, or if this machine ran it before.

    Raises:
        ConfigError: If the kernel module may not run.
        CheckpointError: If the folder has no kernels, a file is missing or damaged, or the files are
            inconsistent.
    """
    if not os.path.lexists(folder / KERNELS):
        raise CheckpointError(
            f"{folder}: has recurrences only, no kernels to train (written with convert.py --inference-only, "
            "or by an earlier version)",
            "start from its run, or convert that again without --inference-only",
        )
    check_regular(folder / KERNELS, REMEDY)
    entries = read_json(folder / "config.json", REMEDY)
    converted = load_converted(folder)
    verify_folder(folder, entries, kernels=True)
    given = {"tokenizer": "tokenizer.json", "eos_token": entries["eos_token"]}
    config = config_from_dict({"model": entries["model"], "data": given}, str(folder), trust)
    try:
        kernels = load_file(folder / KERNELS)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / KERNELS}: is damaged ({one_line(error)})", REMEDY) from None
    check_finite(kernels, folder / KERNELS)
    recurrences = tuple(conv_prefix(index) for index in range(config.model.n_layers))
    rest = {
        name: tensor
        for name, tensor in converted.model.state_dict().items()
        if not name.startswith(recurrences)
    }
    check_sizes(config.model, rest | kernels, folder)
    with without_weights():
        model = CausalLM(config.model)
    load_weights(model, rest | kernels, folder)
    return Loaded(config, converted.tokenizer, model)
