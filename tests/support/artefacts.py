"""The files that are read back, each with what reads it, for the harness in :mod:`tests.support.fuzz`."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.damage import Damage
from tests.support.fuzz import Subject
from tests.support.imported import write_fairseq, write_tokenizer
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.importers.formats import import_checkpoint
from tnnlm.checkpoints.locate import LAST, load_for_decoding, load_trained
from tnnlm.checkpoints.shards import SHARDS, moment_name, weight_name
from tnnlm.checksums import list_files
from tnnlm.config.loader import config_to_dict, load_config
from tnnlm.data.report import read_report
from tnnlm.deployment.save import save
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.state_file import load_state, save_state
from tnnlm.tokenizer import load_tokenizer
from tnnlm.training.callbacks.checkpoint import AtomicCheckpointIO
from tnnlm.training.initial import InitialWeights
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import check_resumable, is_complete, resumed_config
from tnnlm.training.run import train
from tnnlm.training.slurm import find_job, record_job

RUN, OTHER, SHARDED = Path("runs/tiny"), Path("runs/other"), Path("runs/sharded")
BOMB = 64 << 20
"""Size in bytes of what a bomb unpacks to."""


def digest(value: Any) -> str:
    """Return the hash of nested plain data with tensors and models."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, torch.nn.Module):
            add(part.state_dict())
        elif isinstance(part, dict):
            for key in part:
                found.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            found.update(f"{len(part)} ".encode())
            for item in part:
                add(item)
        elif hasattr(part, "to_json"):
            found.update(part.to_json().encode())
        else:
            found.update(f"{part!r} ".encode())

    add(value)
    return found.hexdigest()


def subjects(*, transformers: bool = True) -> Iterator[Subject]:
    """Write every kind of file into the current folder, and yield them with their readers.

    Args:
        transformers: Whether files are read by Transformers as well, which takes long to import.
    """
    write_runs()
    yield from of_checkpoints()
    yield from of_converted()
    if transformers:
        yield from of_transformers()
    yield from of_states()
    yield from of_runs()
    yield from of_foreign_files()


def write_runs() -> None:
    """Train two tiny runs that differ in their seed, and save one of them sharded as well."""
    for name, seed in ((RUN.name, "0"), (OTHER.name, "1")):
        train(tiny_run(f"name={name}", "trainer.max_steps=4", f"seed={seed}"), None)
    shutil.copytree(RUN, SHARDED)
    for index, name in enumerate((SHARDED, Path("runs/sharded-other"))):
        source = (RUN, OTHER)[index]
        if name != SHARDED:
            shutil.copytree(OTHER, name)
        for path in (name / "checkpoints").glob("*.ckpt"):
            path.unlink()
        write_sharded(source / LAST, name / LAST)


def write_sharded(source: Path, path: Path) -> None:
    """Write a checkpoint as an index and one file of shards."""
    data = torch.load(source, weights_only=True)
    names = [key for key in data["state_dict"] if data["state_dict"][key].is_floating_point()]
    large = {weight_name(key): value for key, value in data["state_dict"].items() if value.ndim}
    state = data["optimizer_states"][0]
    parameters = names[: len(state["state"])]
    small: dict[str, Any] = {}
    for number, moments in state["state"].items():
        small[parameters[number]] = {key: value for key, value in moments.items() if not value.ndim}
        large |= {
            moment_name(0, parameters[number], key): value for key, value in moments.items() if value.ndim
        }
    groups = [
        {**group, "params": [parameters[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    folder = path.with_name("last-4.shards")
    folder.mkdir()
    offsets = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in large.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
    save_file(
        {name: tensor.contiguous() for name, tensor in large.items()}, folder / "a.safetensors", metadata
    )
    scalars = {key: value for key, value in data["state_dict"].items() if not value.ndim}
    entry = {
        "folder": folder.name,
        "files": list_files(folder, ["a.safetensors"]),
        "shapes": {name: [*tensor.shape] for name, tensor in large.items()},
        "parameters": parameters,
    }
    index = {**data, "state_dict": scalars, SHARDS: entry}
    index["optimizer_states"] = [{"state": small, "param_groups": groups}]
    torch.save(index, path)


def resume(run: Path) -> str:
    """Read a run as ``train --resume`` does before it trains."""
    config = resumed_config(run, ["trainer.max_steps=9"])
    step = check_resumable(config, run)
    return digest([step, config_to_dict(config), AtomicCheckpointIO().load_checkpoint(run / LAST)])


def generate(target: Path) -> str:
    """Load a model as ``generate`` does."""
    return digest([*load_for_decoding(str(target), Path("runs"))[1]])


def convert(target: Path) -> str:
    """Load a checkpoint as ``convert`` does."""
    found = load_trained(target)
    return digest([found.model, found.tokenizer, config_to_dict(found.config), found.step, found.ssm])


def begin(target: Path) -> str:
    """Load a checkpoint as ``train --init-from`` does."""
    loaded = InitialWeights(str(target)).loaded
    return digest([loaded.model, loaded.tokenizer, config_to_dict(loaded.config)])


def of_checkpoints() -> Iterator[Subject]:
    for run, other, kind in ((RUN, OTHER, "single"), (SHARDED, Path("runs/sharded-other"), "sharded")):
        for use in (resume, convert, generate, begin):
            if run == RUN and use != resume:
                (run / "checkpoints/best.ckpt").unlink(missing_ok=True)

            def call(use: Any = use, run: Path = run) -> str:
                return str(use(run))

            bombs = () if kind == "sharded" else (deflated, overlapping, Damage("layers", many_layers))
            yield Subject(f"checkpoint-{kind}-{use.__name__}", run / LAST, call, (other / LAST,), extra=bombs)
            if kind == "sharded" and use in (resume, convert):
                file = "checkpoints/last-4.shards/a.safetensors"
                yield Subject(f"checkpoint-shard-{use.__name__}", run / file, call, (other / file,))


def _deflated(intact: Path, path: Path) -> None:
    with zipfile.ZipFile(intact) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item.filename, data + bytes(BOMB) if item.filename.endswith("data.pkl") else data)


def _overlapping(intact: Path, path: Path) -> None:
    """Write an archive whose directory lists one large member many times."""
    with zipfile.ZipFile(intact) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
        target.writestr("archive/large", bytes(1 << 20))
        target.filelist += [target.filelist[-1]] * 40_000


def many_layers(intact: Path, path: Path) -> None:
    """Write a checkpoint whose settings claim very many layers."""
    data = torch.load(intact, weights_only=True)
    data["tnnlm"]["config"]["model"]["n_layers"] = 10**8
    torch.save(data, path)


deflated = Damage("deflated to a bomb", _deflated)
overlapping = Damage("overlapping members", _overlapping)


def of_converted() -> Iterator[Subject]:
    for folder, run in ((Path("out"), RUN), (Path("out2"), OTHER)):
        trained = load_trained(run)
        save(trained.model, trained.tokenizer, folder, method="etsc", horizon=32)
    for path in sorted(Path("out").iterdir()):
        other = Path("out2") / path.name
        extra = tuple(Damage(f"{key}={value}", _set(key, value)) for key, value in CLAIMS)
        yield Subject(
            f"converted-{path.name}",
            path,
            lambda: generate(Path("out")),
            (other,),
            extra=extra if path.name == "config.json" else (),
        )


CLAIMS = (
    ("n_layers", 10**8),
    ("d_model", 10**9),
    ("vocab_size", 10**12),
    ("n_layers", -1),
    ("d_model", "x" * 10_000),
)
"""Settings of a model that its weights don't have."""


def _set(key: str, value: Any) -> Any:
    def make(intact: Path, path: Path) -> None:
        data = json.loads(intact.read_text())
        data["model"][key] = value
        path.write_text(json.dumps(data))

    return make


def of_transformers() -> Iterator[Subject]:
    from tnnlm.hf import TnnlmForCausalLM

    def use() -> str:
        model = TnnlmForCausalLM.from_pretrained("out")
        return digest([model.model, model.config.to_dict(), model.generation_config.to_dict()])

    for name in ("config.json", "model.safetensors", "generation_config.json"):
        yield Subject(f"transformers-{name}", Path("out") / name, use, (Path("out2") / name,))


def of_states() -> Iterator[Subject]:
    for folder, path in ((Path("out"), Path("a.state")), (Path("out2"), Path("b.state"))):
        loaded = load_converted(folder)
        writer = TextGenerator(*loaded)
        save_state(path, writer, writer.prefill(["The"]), torch.Generator().manual_seed(1))
        save_state(path.with_suffix(".later"), writer, writer.prefill(["The end of"]))
    generator = TextGenerator(*load_converted(Path("out")))

    def use() -> str:
        state, random = load_state(Path("a.state"), generator)
        return digest(
            [[*layer] for layer in state.model_state.layers] + [state.logits, state.lengths, random]
        )

    yield Subject("state", Path("a.state"), use, (Path("b.state"),))


def of_runs() -> Iterator[Subject]:
    record_job(RUN, "nightly")
    record_job(OTHER, "weekly")
    config = load_config(RUN / "config.yaml", saved=True)
    other = load_config(OTHER / "config.yaml", saved=True)
    yield Subject("run-config.yaml", RUN / "config.yaml", lambda: resume(RUN), (OTHER / "config.yaml",))
    tokenizer = RUN / "tokenizer.json"
    yield Subject("run-tokenizer.json", tokenizer, lambda: resume(RUN), (Path("out/config.json"),))
    yield Subject("run-data.json", RUN / "data.json", lambda: digest(read_report(RUN)), own=True)
    path = RUN / "metrics.csv"
    intact = read_metrics(path)
    yield Subject(
        "run-metrics.csv", path, lambda: str([row for row in read_metrics(path) if row not in intact])
    )
    job = RUN / "job.json"
    yield Subject("run-job.json", job, lambda: str(find_job("nightly", config)), (OTHER / "job.json",))
    yield Subject("run-job.json-of-another", job, lambda: str(find_job("weekly", other)))
    # The summary of another step: a damaged one must not make the run complete.
    text = (RUN / "summary.json").read_text()
    (RUN / "summary.json").write_text(text.replace('"tokens_seen": 512', '"tokens_seen": 513'))
    yield Subject("run-summary.json", RUN / "summary.json", lambda: str(is_complete(config, RUN)))


def of_foreign_files() -> Iterator[Subject]:
    """Files of the user or of other programs, which have no checksum of ours."""
    from tnnlm.cli.generate import read_prompts

    Path("own.yaml").write_text("\n".join(f"{a}: {b}" for a, b in (("seed", 1), ("name", "own"))) + YAML)
    bombs = tuple(Damage(name, _constant(text)) for name, text in BOMBS.items())
    yield Subject(
        "own-config.yaml",
        Path("own.yaml"),
        lambda: digest(config_to_dict(load_config("own.yaml"))),
        own=True,
        extra=bombs,
    )
    shutil.copy(RUN / "tokenizer.json", "tokenizer.json")
    yield Subject(
        "own-tokenizer.json",
        Path("tokenizer.json"),
        lambda: digest(load_tokenizer("tokenizer.json", "<|endoftext|>")),
        own=True,
    )
    Path("prompts.txt").write_text("one\ntwo\n")
    yield Subject(
        "own-prompts", Path("prompts.txt"), lambda: digest(read_prompts(Path("prompts.txt"))), own=True
    )
    write_fairseq(Path("other.pt"))
    write_tokenizer(12, Path("letters.json"))
    length = ("model.max_length=16",)

    def importing(path: Path) -> str:
        found = import_checkpoint(path, overrides=length)
        return digest([config_to_dict(found.config), found.weights])

    yield Subject(
        "import-pt", Path("other.pt"), lambda: importing(Path("other.pt")), extra=(deflated, overlapping)
    )
    weights = torch.load("other.pt", weights_only=False)["model"]
    save_file({key: value.clone() for key, value in weights.items()}, "other.safetensors")
    yield Subject(
        "import-safetensors",
        Path("other.safetensors"),
        lambda: importing(Path("other.safetensors")),
        own=True,
    )


YAML = """
data:
  files: [a.txt, b.txt]
  source: files
model: {d_model: 32, n_layers: 2}
"""
ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
BOMBS = {
    "aliases": ALIASES,
    "aliases in a list": ALIASES + "data: {files: *a11}\n",
    "aliases of groups": "model: &a0 {d_model: 3}\n"
    + "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 12)),
    "deep flow": "data: " + "[" * 100_000,
    "deep maps": "{a: " * 100_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(3000)),
    "deep items": "data: " + "- " * 100_000 + "x",
    "huge integer": f"seed: {'9' * 1_000_000}\n",
    "huge exponent": "optim: {lr: 1e999999999}\n",
    "large": "# " + "x" * 10_000_000 + "\nseed: 1\n",
    "many keys": "".join(f"k{n}: 1\n" for n in range(100_000)),
    "many items": "data: {files: [" + "a," * 500_000 + "]}\n",
    "long text": "name: " + "x" * 5_000_000 + "\n",
    "many layers": "model: {n_layers: 100000000}\n",
}
"""YAML that takes a parser or a reader much time or memory."""


def _constant(text: str) -> Any:
    return lambda intact, path: path.write_text(text)
