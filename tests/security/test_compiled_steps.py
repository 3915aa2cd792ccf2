"""A compiled step is native code: one that this machine did not make is not loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.converted import write_converted
from tests.support.scripts import assert_refused
from tests.support.steps import converted, whole
from tnnlm import trust
from tnnlm.checkpoints.converted import ConvertedModel, load_converted
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.errors import UserError
from tnnlm.inference import aot
from tnnlm.inference.engine import open_engine

CODE = b"native code of a stranger"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replace the loader of packages, and return the list of the packages that it was given."""
    packages: list[bytes] = []

    def runner(path: Path) -> Any:
        # Whoever can write to the folder replaces the package at the last moment.
        Path("out/step-float32.pt2").write_bytes(b"exchanged")
        packages.append(path.read_bytes())
        return lambda *inputs: ()

    monkeypatch.setattr(aot, "_runner", runner)
    return packages


@pytest.fixture
def model(_quiet: None) -> ConvertedModel:
    """Return a converted model whose folder ``out`` has a package that claims to fit it and this machine."""
    found = whole(converted())
    write_package(CODE, found.fingerprint)
    return found


def write_package(code: bytes, fingerprint: str) -> None:
    Path("out").mkdir(exist_ok=True)
    Path("out/step-float32.pt2").write_bytes(code)
    made_for = aot._made_for(fingerprint)
    Path("out/step-float32.json").write_text(json.dumps(made_for), encoding="utf-8")


def record(code: bytes, fingerprint: str) -> None:
    """Record a package as compiled here."""
    made_for = aot._made_for(fingerprint)
    assert trust.remember(aot._SIZE, size=str(len(code)), **made_for)
    assert trust.remember(aot._PACKAGE, sha256=hashlib.sha256(code).hexdigest(), **made_for)


def test_step_of_a_stranger_is_left_alone(model: ConvertedModel, loaded: list[bytes]) -> None:
    _, info = open_engine(model, Path("out"))
    assert not loaded
    assert info.name == "packed"
    assert "native code that was not compiled here" in str(info)
    assert "\n" not in str(info)


def test_engine_compiled_is_refused_with_the_remedy(model: ConvertedModel, loaded: list[bytes]) -> None:
    with pytest.raises(UserError, match=r"--engine compiled: .* recompile .* --trust-compiled"):
        open_engine(model, Path("out"), engine="compiled")
    assert not loaded


def test_step_that_is_trusted_is_loaded_from_a_private_copy(
    model: ConvertedModel, loaded: list[bytes]
) -> None:
    _, info = open_engine(model, Path("out"), trust=trust.Trust(compiled=True))
    assert (info.name, loaded) == ("compiled", [CODE])


def test_step_that_was_made_here_is_loaded_until_a_byte_changes(
    model: ConvertedModel, loaded: list[bytes]
) -> None:
    record(CODE, model.fingerprint)
    _, info = open_engine(model, Path("out"))
    assert (info.name, loaded) == ("compiled", [CODE])
    write_package(CODE.replace(b"native", b"Native"), model.fingerprint)
    _, info = open_engine(whole(converted()), Path("out"))
    assert (info.name, loaded) == ("packed", [CODE])


def test_record_is_for_one_model(model: ConvertedModel, loaded: list[bytes]) -> None:
    record(CODE, "another")
    assert open_engine(model, Path("out")).info.name == "packed"
    assert not loaded


def test_folder_that_states_the_hash_of_a_model_compiled_here_gets_no_step_of_it(
    model: ConvertedModel, loaded: list[bytes]
) -> None:
    """A stranger's weights must not run in part, and those of a step that this user compiled in part."""
    record(CODE, model.fingerprint)
    folder = Path("theirs")
    write_converted(folder, model.tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_sha256": model.fingerprint}))
    write_checksums(folder)  # whoever changes a file can change its checksum
    for name in ("step-float32.pt2", "step-float32.json"):
        (folder / name).write_bytes((Path("out") / name).read_bytes())
    theirs = load_converted(folder)
    assert theirs.fingerprint == model.fingerprint
    _, info = open_engine(theirs, folder)
    assert (info.name, loaded) == ("packed", [])
    assert "belongs to another model" in info.reason


def test_step_is_not_recorded_for_a_hash_that_only_the_folder_states(
    model: ConvertedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "check_compiler", lambda: None)
    with pytest.raises(UserError, match="states the hash of another model"):
        aot.compile_step(model.model, Path("out"), "float32", "0" * 64)


def test_package_without_a_description_is_not_loaded(model: ConvertedModel, loaded: list[bytes]) -> None:
    record(CODE, model.fingerprint)
    Path("out/step-float32.json").unlink()
    assert open_engine(model, Path("out")).info.name == "packed"
    assert not loaded


def test_large_package_of_a_stranger_is_not_read(
    model: ConvertedModel, loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> str:
        raise AssertionError("the package was read")

    monkeypatch.setattr(aot, "_private_copy", read)
    assert open_engine(model, Path("out")).info.name == "packed"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
def test_cache_of_the_compiler_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    folder = tmp_path / "inductor"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    with pytest.raises(UserError, match="TORCHINDUCTOR_CACHE_DIR"):
        aot.check_compiler_cache()
    done = script("train", "trainer.compile=true", "data.source=files", "data.files=none.txt")
    assert_refused(done, "the compiler's cache can be written by other users")
    folder.chmod(0o700)
    aot.check_compiler_cache()
    folder.chmod(0o770)
    monkeypatch.setattr(trust, "_is_private_group", lambda number: False)
    with pytest.raises(UserError, match="can be written by other users"):
        aot.check_compiler_cache()
    monkeypatch.setattr(trust, "_is_private_group", lambda number: number == folder.stat().st_gid)
    aot.check_compiler_cache()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
@pytest.mark.parametrize(
    ("primary", "name", "members", "private"),
    [
        (7, "ann", [], True),
        (7, "ann", ["ann"], True),
        (7, "ann", ["ann", "bob"], False),
        (7, "staff", [], False),
        (8, "ann", [], False),
    ],
)
def test_group_that_has_other_members_is_not_private(
    primary: int, name: str, members: list[str], private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grp
    import pwd

    ann = pwd.struct_passwd(("ann", "x", os.getuid(), primary, "", "/", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda number: ann)
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group((name, "x", number, members)))
    assert trust._is_private_group(7) == private
