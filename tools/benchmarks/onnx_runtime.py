"""Steps of a converted model in onnxruntime, as exported by ``convert.py --onnx``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tnnlm.checkpoints.converted import ConvertedModel
from tnnlm.errors import UserError, install_command
from tnnlm.inference.export import export_onnx
from tnnlm.models.causal_lm import ModelState
from tnnlm.ops.recurrence import named_tensors, with_tensors


class OnnxModel:
    """Converted model whose steps run in onnxruntime; PyTorch runs the prefill."""

    def __init__(self, converted: ConvertedModel, folder: Path) -> None:
        """Export the step into ``folder`` and load it, with the number of threads of PyTorch.

        Raises:
            UserError: If the extra ``[onnx]`` is not installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"not installed; run: {install_command('onnx')}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path = export_onnx(converted, folder) / "step.onnx"
        self._session = onnxruntime.InferenceSession(path, options)
        self._names = [part.name for part in self._session.get_inputs()]
        self.init_state = converted.model.init_state
        self.prefill = converted.model.prefill

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Run :meth:`tnnlm.models.causal_lm.CausalLM.step` in onnxruntime, on the memory of the tensors."""
        given = [tokens, *(part for part in state.tensors if part.numel())]
        feeds = {name: part.numpy() for name, part in zip(self._names, given, strict=True)}
        outputs = iter(self._session.run(None, feeds))
        logits = torch.from_numpy(next(outputs))
        layers = [
            with_tensors(
                layer,
                (
                    torch.from_numpy(next(outputs)) if part.numel() else part
                    for part in named_tensors(layer).values()
                ),
            )
            for layer in state.layers
        ]
        return logits, ModelState(tuple(layers))
