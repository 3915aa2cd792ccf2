"""``tnnlm push`` uploads the files of a model and nothing else, to a local server in place of the Hub."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from tests.support.fake_hub import TOKEN, FakeHub, fake_hub
from tests.support.scripts import assert_refused
from tnnlm.checkpoints.manifest import CODE

MODEL = {
    "config.json", "generation_config.json", "conversion.json", "checksums.json", "model.safetensors",
    "kernels.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", *CODE,
}  # fmt: skip
FOLDER = Path("runs/tiny/converted")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Run a server in place of the Hub, whose token is in the environment."""
    with fake_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def converted(run_here: Path, script: Any) -> Path:
    """Convert the tiny run and return its folder."""
    done = script("convert", "tiny", "--no-perplexity", "--license", "mit", "--language", "en")
    assert done.code == 0, done.err
    return FOLDER


def test_upload_is_private_and_has_the_files_of_the_model(converted: Path, script: Any, hub: FakeHub) -> None:
    for name in ("step-float32.pt2", "notes.txt", "state.safetensors", ".env"):
        (converted / name).write_text("not for others")
    (converted / "export").mkdir()
    listed = script("push", "tiny", "me/model", "--dry-run")
    assert listed.code == 0, listed.err
    assert not hub.requests
    assert "me/model (private)" in listed.out
    for name in MODEL:
        assert f"  {name:24} {(converted / name).stat().st_size:>15,}\n" in listed.out
    for name in ("step-float32.pt2", "notes.txt", "state.safetensors", ".env", "export"):
        assert f"left out: {name} (" in listed.out
    assert "note:" not in listed.out
    done = script("push", str(converted), "me/model")
    assert done.code == 0, done.err
    assert done.out == listed.out.replace(str(FOLDER.resolve()), str(converted.resolve())) + (
        f"uploaded: {hub.address}/me/model\n"
    )
    assert hub.private == {"me/model": True}
    sent = hub.repos["me/model"]
    assert sent == {name: (converted / name).read_bytes() for name in MODEL}
    assert ModelCard(sent["README.md"].decode()).data.license == "mit"
    # A second upload replaces the files; it is refused to whoever would publish the repository by it.
    assert script("push", "tiny", "me/model").code == 0
    assert_refused(script("push", "tiny", "me/model", "--public"), "me/model: exists, and is private")
    hub.private["me/model"] = False
    assert_refused(script("push", "tiny", "me/model"), "me/model: exists, and is public; add --public")
    assert script("push", "tiny", "other/public", "--public").code == 0
    assert hub.private["other/public"] is False


def test_hub_that_refuses_is_one_line(
    converted: Path, script: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ("push", "tiny", "me/model")
    for status, said in (
        (401, "the token is not valid"),
        (403, "the token may not write there"),
        (404, "no such owner, or"),
    ):
        hub.refused = {"/repos/create": status}
        assert_refused(script(*push), f"me/model: {said}", f"(HTTP {status})")
    hub.refused = {"/commit/main": 409}
    assert_refused(script(*push), "another upload was made meanwhile", "(HTTP 409)")
    hub.refused = {}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert_refused(script(*push), "the token is not valid (HTTP 401)")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "absent")
    assert_refused(script(*push), "HF_TOKEN: is not set, and there is no login; set it, or run: hf")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    assert_refused(script(*push), "me/model: the upload failed", "check the network")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(script(*push), "me/model: the upload failed", "offline mode")
    assert not hub.repos["me/model"]


def test_folder_that_must_not_be_published_is_refused(converted: Path, script: Any, hub: FakeHub) -> None:
    def push(*words: str) -> Any:
        return script("push", "tiny", *(words or ("me/model",)))

    assert_refused(push("no name"), "no name: is no name on the Hub", "give OWNER/NAME")
    assert_refused(script("push", "absent", "me/model"), "absent: no such run")
    for name, said in (
        ("model.safetensors", "is damaged"),
        ("kernels.safetensors", "is damaged"),
        ("standalone_tnnlm.py", "is damaged"),
        ("tokenizer.json", "not a tokenizer.json"),
    ):
        path = converted / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + b"~~~")
        assert_refused(push(), name, said)
        path.write_bytes(whole)
    card = converted / "README.md"
    text = card.read_text()
    card.write_text("---\nlicense: [mit\n---\n")
    assert_refused(push(), "README.md: its metadata can't be read")
    card.unlink()
    card.symlink_to("/etc/hostname")
    assert_refused(push(), "README.md: ", "link")
    card.unlink()
    assert "note: README.md: is missing" in push("me/model", "--dry-run").out
    card.write_text(text.replace("license: mit\n", ""))
    assert "--license of convert.py" in push("me/model", "--dry-run").out
    # Code without a checksum must be that of this version.
    (converted / "standalone_tnnlm.py").write_text("import os\n")
    sums = json.loads((converted / "checksums.json").read_text())
    del sums["files"]["standalone_tnnlm.py"]
    (converted / "checksums.json").write_text(json.dumps(sums))
    assert_refused(push(), "standalone_tnnlm.py: is not code of this version")
    assert not hub.requests
