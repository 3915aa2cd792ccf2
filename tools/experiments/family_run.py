"""The comparison of families from start to end, saved after every part so that it can go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.family_measure import Form, Sizes, decoding, forms_of, held_out_bits, perplexities
from experiments.family_training import device_of, train_family
from experiments.sizing import Family
from tnnlm.config.loader import config_to_dict
from tnnlm.config.schema import Config
from tnnlm.data.packing import PackedCorpus, PackedRows, prepare
from tnnlm.data.tasks import open_rows
from tnnlm.errors import UserError
from tnnlm.files import atomic_file, write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import cpu_level, processor
from tnnlm.machine.threads import limit_threads
from tnnlm.training.estimate import resolve_precision

VERSION = 1
"""of results.json: raise it when what is measured changes"""


class Results:
    """What is finished, in OUT/results.json and OUT/NAME.pt."""

    def __init__(self, out: Path, common: dict[str, Any]) -> None:
        """Open them, or start anew with settings that all families share.

        Raises:
            UserError: if ``out`` is no folder, or holds results of other settings or damaged ones.
        """
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is not a folder; give another --out")
        self.out = out
        self.path = out / "results.json"
        self.data: dict[str, Any] = {"common": _plain(common), "families": {}, "decoding": {}}
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before = found["common"]
            found["families"], found["decoding"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: damaged; remove it or give another --out") from None
        changed = [key for key, value in self.data["common"].items() if before.get(key) != value]
        if changed:
            raise UserError(
                f"{out}: holds results of other settings ({', '.join(changed)}); give another --out"
            )
        self.data = found

    def family(self, family: Family) -> dict[str, Any]:
        """What is known of a family: ``settings``, ``seeds`` by name and ``measured``.

        Raises:
            UserError: if it was trained with other settings.
        """
        settings = _plain({"config": config_to_dict(family.config), "params": family.params})
        fresh = {"settings": settings, "seeds": {}, "measured": None}
        known: dict[str, Any] = self.data["families"].setdefault(family.name, fresh)
        if known["settings"] != settings:
            raise UserError(
                f"{self.out}: holds results of other settings of {family.name}; give another --out"
            )
        return known

    def weights(self, name: str) -> Path:
        """Of the first seed."""
        return self.out / f"{name}.pt"

    def save(self) -> None:
        """Whole or not at all."""
        write_text(self.path, json.dumps(self.data, indent=2) + "\n")


def compare_families(
    base: Config,
    families: dict[str, Family],
    left_out: dict[str, str],
    seeds: Sequence[int],
    sizes: Sizes,
    out: Path,
) -> dict[str, Any]:
    """Train, measure and time all families; finished parts are taken from ``out``.

    Args:
        base: settings that all share.
        families: by name; at least one.
        left_out: why others are missing; families that fail here are added.
        seeds: the first one's weights are what is measured.
        sizes: how much is measured.
        out: folder of results.

    Returns:
        ``settings``, ``sizes``, ``machine``, ``seeds``, ``contexts``, ``left_out``, and ``rows``, one
        per family.

    Raises:
        UserError: for unusable input, and if no family is left.
    """
    keep_large_blocks()
    limit_threads()
    corpus = prepare(base.data, base.model.vocab_size, base.seed)
    rows, _ = open_rows(corpus, base)
    common = {
        "version": VERSION,
        "settings": config_to_dict(base),
        "sizes": asdict(sizes),
        "first seed": seeds[0],
        "text": corpus.folder.name,
        "machine": machine(base),
    }
    results = Results(out, common)
    for family in families.values():
        results.family(family)
    failed = _train_all(results, families, seeds, corpus, rows, sizes)
    left = {name: family for name, family in families.items() if name not in failed}
    reasons = left_out | failed
    if not left:
        raise UserError("no family is left: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    _measure(results, left, corpus, sizes)
    return {
        **{key: results.data["common"][key] for key in ("settings", "sizes", "machine")},
        "seeds": list(seeds),
        "contexts": list(sizes.contexts),
        "left_out": reasons,
        "rows": [_row(results, family, seeds) for family in left.values()],
    }


def machine(config: Config) -> dict[str, Any]:
    """What speeds depend on."""
    device = device_of(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} ({cpu_level()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": resolve_precision(config),
    }


def _train_all(
    results: Results,
    families: dict[str, Family],
    seeds: Sequence[int],
    corpus: PackedCorpus,
    rows: PackedRows,
    sizes: Sizes,
) -> dict[str, str]:
    """Train what is not finished; why families failed, by name."""
    failed: dict[str, str] = {}
    for seed in seeds:
        for name, family in families.items():
            known = results.family(family)
            first = seed == seeds[0]
            done = str(seed) in known["seeds"] and (not first or results.weights(name).exists())
            if name in failed or done:
                continue
            try:
                model, cell = train_family(family, rows, seed)
            except UserError as error:
                failed[name] = str(error)
                print(f"left out: {name}: {error}", file=sys.stderr)
                continue
            cell["bits_per_byte"] = held_out_bits(model, corpus, family.config, sizes)
            if first:
                with atomic_file(results.weights(name)) as temporary:
                    torch.save(model.state_dict(), temporary)
                known["measured"] = None
                results.data["decoding"] = {}
            known["seeds"][str(seed)] = cell
            results.save()
    return failed


def _measure(results: Results, families: dict[str, Family], corpus: PackedCorpus, sizes: Sizes) -> None:
    """Perplexities of what lacks them, and the decoding of all if any is new."""
    if results.data["decoding"].keys() == families.keys():
        return
    forms: dict[str, Form] = {}
    for name, family in families.items():
        known = results.family(family)
        model = _load(results, family, known)
        made, missing = forms_of(model, family.config.conversion)
        if made:
            forms[name] = made[-1]
        if known["measured"] is None:
            known["measured"] = perplexities(model, made, corpus, family.config, sizes) | {"missing": missing}
            results.save()
    # Read round and round where the held-out text is shorter than the longest context.
    text = np.asarray(corpus.rows("val", 1).tokens, dtype=np.int64)
    results.data["decoding"] = decoding(
        forms, torch.from_numpy(np.resize(text, max(sizes.contexts) + 1)), sizes
    )
    results.save()


def _load(results: Results, family: Family, known: dict[str, Any]) -> nn.Module:
    model = family.build(0)
    path = results.weights(family.name)
    try:
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); remove it to train again") from None
    return model.to(device_of(family.config)).eval()


def _row(results: Results, family: Family, seeds: Sequence[int]) -> dict[str, Any]:
    known = results.family(family)
    return {
        "family": family.name,
        "kernel": family.kernel,
        "params": family.params,
        "width": family.config.model.glu_dim,
        "lr": family.config.optim.lr,
        "seeds": {str(seed): known["seeds"][str(seed)] for seed in seeds},
        "perplexity": known["measured"],
        "decoding": results.data["decoding"].get(family.name),
    }


def _plain(data: Any) -> Any:
    """As it reads back from JSON: tuples become lists."""
    return json.loads(json.dumps(data))
