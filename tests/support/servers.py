"""A tiny model behind a real server on a TCP socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.models import tiny_config
from tnnlm.checkpoints.converted import save_converted
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, convert_model, measure
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.inference.generator import TextGenerator
from tnnlm.kernels import KernelConfig
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach
from tnnlm.serving.app import create_app
from tnnlm.serving.server import Server
from tnnlm.serving.service import Service
from tnnlm.serving.settings import Limits, Settings
from tnnlm.tokenizer import TextTokenizer, train_bpe

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 3


class Running(NamedTuple):
    """Server that accepts connections."""

    url: str
    service: Service


def tiny_generator(
    dtype: str = "float32", method: str = "balanced", kernel: KernelConfig | None = None
) -> TextGenerator:
    """Return a converted model with random weights, packed for decoding."""
    model, tokenizer = _tiny_parts(kernel)
    return TextGenerator(optimize_for_decoding(convert_model(model, method=method), dtype), tokenizer)


def tiny_converted(folder: Path) -> Path:
    """Write the model of :func:`tiny_generator` as a converted folder and return the folder."""
    model, tokenizer = _tiny_parts()
    horizon, layers = convert_layers(model, ConversionConfig())
    report = measure(model, layers, method="balanced", horizon=horizon, seconds=0.0)
    save_converted(folder, attach(model, [layer.params for layer in layers]), tokenizer, report)
    return folder


def _tiny_parts(kernel: KernelConfig | None = None) -> tuple[CausalLM, TextTokenizer]:
    """Return a model with weights so large that its greedy output varies, and its tokenizer."""
    torch.manual_seed(0)
    changes = {} if kernel is None else {"kernel": kernel}
    model = CausalLM(tiny_config(n_layers=2, d_model=32, **changes)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(3)
        for name, weight in model.named_parameters():
            if "mixer" in name and weight.dim() == 2:
                weight.mul_(3)
    return model, train_bpe([TEXT], 300, "<eos>", 1, False)


@contextmanager
def run_server(
    generator: TextGenerator,
    key: str | None = None,
    parse_special: bool = False,
    executor: Executor | None = None,
    hosts: tuple[str, ...] | None = None,
    reproducible: bool = False,
    **limits: float,
) -> Iterator[Running]:
    """Serve the model on a free port; ``executor`` runs the model, or a new thread.

    Tests that compare completions under load with those of requests alone need ``reproducible``.
    """
    most = Limits(**limits)  # type: ignore[arg-type]
    settings = Settings(
        name="tiny",
        parameters=1,
        api_keys=() if key is None else tuple(key.split()),
        allowed_hosts=hosts,
        parse_special=parse_special,
        reproducible=reproducible,
        limits=most,
    )
    app = create_app(generator, settings, executor)
    server = Server(app, grace=5)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app.state.service)
    finally:
        server.should_exit = True
        thread.join()
