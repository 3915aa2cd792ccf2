"""Long Range Arena tasks from files in their published layout, and error messages for damaged files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.archive_files import DIFFICULTY, WRITERS
from tests.support.listops import evaluate
from tnnlm.config.loader import load_config
from tnnlm.data.sequences.lra import splits
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import SEQUENCE_TASKS, SPLITS, Example
from tnnlm.errors import ConfigError, DataError

LISTOPS = ["task=classify", "data.source=listops", "model.n_classes=10"]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Write all tasks into one folder and return it."""
    for write in WRITERS.values():
        write(tmp_path / "lra")
    return tmp_path / "lra"


def read(task: str, folder: Path, seed: int = 0) -> dict[str, list[Example]]:
    return {name: list(rows) for name, rows in splits(task, folder, 0.2, seed)}


def config_of(task: str, folder: Path, *words: str) -> Any:
    own = SEQUENCE_TASKS[task]
    model = [f"model.max_length={own.length}", "model.vocab_size=257", f"model.n_classes={own.n_classes}"]
    data = ["task=classify", "data.source=lra", f"data.lra.task={task}", f"data.lra.folder={folder}"]
    return load_config(None, [*model, f"model.pair={own.parts == 2}", *data, *words])


@pytest.mark.parametrize("task", SEQUENCE_TASKS)
def test_every_task_has_rows_and_labels_of_its_kind(task: str, release: Path) -> None:
    found = read(task, release)
    assert tuple(found) == SPLITS
    for rows in found.values():
        assert rows
        for row in rows:
            assert len(row.parts) == SEQUENCE_TASKS[task].parts
            assert 0 <= row.label < SEQUENCE_TASKS[task].n_classes
            assert max(max(part) for part in row.parts) < SEQUENCE_TASKS[task].n_symbols
    if task in ("image", "pathfinder", "pathx"):
        assert {len(row.parts[0]) for rows in found.values() for row in rows} == {SEQUENCE_TASKS[task].length}


def test_listops_loses_its_parentheses_alone(release: Path) -> None:
    for rows in read("listops", release).values():
        assert len(rows) == 12
        for row in rows:
            assert evaluate(np.frombuffer(row.parts[0], dtype=np.uint8)) == row.label


def test_retrieval_reads_both_documents_unchanged(release: Path) -> None:
    first = read("retrieval", release)["val"][1]
    assert first.label == 1
    assert first.parts == (b"b'First eval 1'", b"b'\"Second\" caf\xc3\xa9 1'")


def test_text_labels_and_held_out_share(release: Path) -> None:
    found = read("text", release)
    assert [len(found[name]) for name in SPLITS] == [8, 2, 10]
    for name, rows in found.items():
        for row in rows:
            assert (b"pos" in row.parts[0]) == (row.label == 1)
            assert row.parts[0].startswith(b"test" if name == "test" else b"train")
    texts = [row.parts[0] for rows in found.values() for row in rows]
    assert len(set(texts)) == 20


def test_image_is_grey(release: Path) -> None:
    found = read("image", release)
    assert [len(found[name]) for name in SPLITS] == [16, 4, 4]
    batch = pickle.loads((release / "cifar-10-batches-py/test_batch").read_bytes())
    red, green, blue = batch[b"data"][2].reshape(3, 1024).astype(float)
    grey = np.frombuffer(found["test"][2].parts[0], dtype=np.uint8)
    assert np.abs(0.2989 * red + 0.587 * green + 0.114 * blue - grey).max() <= 0.5
    assert found["test"][2].label == batch[b"labels"][2]


def test_pathfinder_is_split_and_labelled_by_its_metadata(release: Path) -> None:
    found = read("pathfinder", release)
    assert [len(found[name]) for name in SPLITS] == [16, 2, 2]
    for rows in found.values():
        for row in rows:
            assert row.parts[0][0] == 255 * row.label
    assert len({row.parts[0][1] for rows in found.values() for row in rows}) == 20
    assert [row.parts for row in read("pathfinder", release, seed=1)["train"]] != [
        row.parts for row in found["train"]
    ]


def test_empty_images_are_skipped(release: Path) -> None:
    (release / f"pathfinder32/{DIFFICULTY}/imgs/0/sample_3.png").write_bytes(b"")
    assert sum(map(len, read("pathfinder", release).values())) == 19


def test_release_in_nested_folders(release: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer/lra_release"
    outer.mkdir(parents=True)
    release.rename(outer / "lra_release")
    assert len(read("listops", tmp_path / "outer")["train"]) == 12


@pytest.mark.parametrize("task", SEQUENCE_TASKS)
def test_a_missing_file_is_reported(task: str, release: Path) -> None:
    from tnnlm.data.sequences.lra import needed

    last = needed(task, release)[-1]
    last.rename(last.with_name("elsewhere"))
    with pytest.raises(
        DataError, match=rf"^{last}: not found; provide all files of data.lra.task={task} in "
    ):
        next(splits(task, release, 0.1, 0))
    with pytest.raises(DataError, match="no such folder; set it to the folder that contains"):
        next(splits(task, release / "nowhere", 0.1, 0))


def damage_listops(root: Path) -> Path:
    path = root / "listops-1000/basic_train.tsv"
    path.write_text("Source\tTarget\n[AVG 1 2 ]\t1\n")
    return path


def damage_header(root: Path) -> Path:
    path = root / "listops-1000/basic_train.tsv"
    path.write_text("[MAX 1 2 ]\t2\n")
    return path


def damage_target(root: Path) -> Path:
    path = root / "listops-1000/basic_train.tsv"
    path.write_text("Source\tTarget\n[MAX 1 2 ]\ttwo\n")
    return path


def damage_pairs(root: Path) -> Path:
    path = root / "tsv_data/new_aan_pairs.train.tsv"
    path.write_text("1.0\ta\tb\tno second text\n")
    return path


def damage_texts(root: Path) -> Path:
    path = root / "aclImdb/train/pos"
    for file in path.iterdir():
        file.unlink()
    return path


def damage_batch(root: Path) -> Path:
    path = root / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(path.read_bytes()[:100])
    return path


def damage_labels(root: Path) -> Path:
    path = root / "cifar-10-batches-py/data_batch_1"
    path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [1]}))
    return path


def damage_code(root: Path) -> Path:
    path = root / "cifar-10-batches-py/data_batch_1"
    path.write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    return path


def damage_metadata(root: Path) -> Path:
    path = root / f"pathfinder32/{DIFFICULTY}/metadata/1.npy"
    path.write_text("imgs/1 sample_1.png 1 yes\n")
    return path


def damage_few(root: Path) -> Path:
    folder = root / f"pathfinder32/{DIFFICULTY}/metadata"
    for file in folder.iterdir():
        file.unlink()
    return folder


def damage_picture(root: Path) -> Path:
    path = root / f"pathfinder32/{DIFFICULTY}/imgs/0/sample_3.png"
    path.write_bytes(b"no picture")
    return path


def damage_size(root: Path) -> Path:
    path = root / f"pathfinder32/{DIFFICULTY}/imgs/0/sample_3.png"
    path.write_bytes((root / f"pathfinder128/{DIFFICULTY}/imgs/0/sample_3.png").read_bytes())
    return path


def damage_absent(root: Path) -> Path:
    path = root / f"pathfinder32/{DIFFICULTY}/imgs/0/sample_3.png"
    path.unlink()
    return path


@pytest.mark.parametrize(
    ("task", "damage", "told"),
    [
        ("listops", damage_listops, "line 2: '[AVG' is not a ListOps symbol"),
        ("listops", damage_header, "line 1: expected the header"),
        ("listops", damage_target, "is not a label"),
        ("retrieval", damage_pairs, "line 1: has 4 tab-separated fields, expected 5"),
        ("text", damage_texts, "contains no .txt file"),
        ("image", damage_batch, "is not a batch of the Python version of CIFAR-10"),
        ("image", damage_labels, "has 2 images but 1 labels"),
        ("image", damage_code, "system is not allowed"),
        ("pathfinder", damage_metadata, "line 1: expected FOLDER FILE NUMBER LABEL"),
        ("pathfinder", damage_few, "lists only 0 images in 0 .npy files"),
        ("pathfinder", damage_picture, "is not a readable image"),
        ("pathfinder", damage_size, "is 128 x 128, expected 32 x 32"),
        ("pathfinder", damage_absent, "not found, but listed in"),
    ],
)
def test_damage_is_one_line_and_leaves_no_cache(
    task: str, damage: Any, told: str, release: Path, tmp_path: Path
) -> None:
    path = damage(release)
    with pytest.raises(DataError) as raised:
        prepare_sequences(config_of(task, release))
    assert str(raised.value).startswith(str(path))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "harmed").exists()
    assert not list((tmp_path / "cache").glob("*"))


def test_labels_out_of_range_are_refused(release: Path) -> None:
    (release / "listops-1000/basic_val.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\t12\n")
    with pytest.raises(DataError, match="row 1 of val: label 12, expected 0 to 9"):
        prepare_sequences(config_of("listops", release))


@pytest.mark.parametrize("task", SEQUENCE_TASKS)
def test_prepared_rows_are_those_of_the_files(task: str, release: Path) -> None:
    config = config_of(task, release, "data.val_fraction=0.2")
    corpus = prepare_sequences(config)
    expected = read(task, release)
    assert corpus.rows == {name: len(rows) for name, rows in expected.items()}
    for name, examples in expected.items():
        rows = corpus.split(name, 40)
        assert len(rows) == len(examples)
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            assert int(row.labels) == example.label
            for part, symbols in enumerate(example.parts):
                tokens = row.tokens if len(example.parts) == 1 else row.tokens[part]
                length = int(row.lengths.reshape(-1)[part])
                assert bytes(rows.symbols(index, part)) == symbols
                assert (tokens[:length] - 1).tolist() == list(symbols[:40])
                assert tokens[length:].tolist() == [0] * (40 - length)
    again = prepare_sequences(config)
    assert again.folder == corpus.folder


def repickled(data: bytes) -> bytes:
    content = pickle.loads(data)
    content[b"data"] = content[b"data"][::-1].copy()
    return pickle.dumps(content, protocol=2)


def change_and_keep_time(path: Path, change: Any) -> None:
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(change(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("task", "name", "change"),
    [
        ("listops", "listops-1000/basic_train.tsv", lambda data: data.replace(b"[MIN", b"[MAX")),
        ("retrieval", "tsv_data/new_aan_pairs.eval.tsv", lambda data: data.replace(b"First", b"Third")),
        ("text", "aclImdb/test/neg/0_2.txt", bytes.upper),
        ("image", "cifar-10-batches-py/test_batch", repickled),
    ],
)
def test_files_that_changed_with_the_same_time_are_read_again(
    task: str, name: str, change: Any, release: Path
) -> None:
    config = config_of(task, release)
    before = prepare_sequences(config)
    path = release / name
    path = path if path.exists() else sorted(path.parent.iterdir())[0]
    change_and_keep_time(path, change)
    after = prepare_sequences(config)
    assert before.report.change(after.report) is not None
    release.rename(release.with_name("moved"))
    moved = prepare_sequences(config_of(task, release.with_name("moved")))
    assert moved.folder == after.folder


def test_report_counts_repeated_rows_and_left_out_images(release: Path) -> None:
    (release / f"pathfinder32/{DIFFICULTY}/imgs/0/sample_3.png").write_bytes(b"")
    report = prepare_sequences(config_of("pathfinder", release)).report
    assert report.dropped == {"empty image": 1}
    assert next(report.lines()).endswith("19 sequences; dropped 1 empty image")
    first = (release / "listops-1000/basic_train.tsv").read_text()
    (release / "listops-1000/basic_val.tsv").write_text(first)
    report = prepare_sequences(config_of("listops", release)).report
    assert report.shared == 12
    assert report.duplicates >= 12
    assert list(report.lines())[-1] == "warning: 12 sequences of other splits equal training sequences"


@pytest.mark.parametrize("label", ["inf", "nan", "1.5"])
def test_label_that_is_no_whole_number_is_refused(label: str, release: Path) -> None:
    (release / "listops-1000/basic_val.tsv").write_text(f"Source\tTarget\n[MAX 1 2 ]\t{label}\n")
    with pytest.raises(DataError, match=r"line 2: .* is not a label"):
        prepare_sequences(config_of("listops", release))


def test_changed_files_are_read_again(release: Path) -> None:
    config = config_of("listops", release)
    before = prepare_sequences(config)
    (release / "listops-1000/basic_val.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\t2\n")
    after = prepare_sequences(config)
    assert (before.rows["val"], after.rows["val"]) == (12, 1)


def test_settings_that_do_not_fit_are_refused(release: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source=lra: needs a folder; set data\.lra\.folder"):
        prepare_sequences(load_config(None, [*LISTOPS, "data.source=lra"]))
    with pytest.raises(ConfigError, match="images of image need 1024"):
        prepare_sequences(config_of("image", release, "model.max_length=1000"))
    with pytest.raises(ConfigError, match=r"above model\.max_length=512"):
        prepare_sequences(load_config(None, LISTOPS))
    with pytest.raises(ConfigError, match=r"above data\.listops\.max_length=300"):
        prepare_sequences(load_config(None, [*LISTOPS, "data.listops.max_length=300"]))
    with pytest.raises(ConfigError, match=r"model\.n_classes=2: listops needs n_classes=10"):
        prepare_sequences(load_config(None, [*LISTOPS, "model.n_classes=2"]))
    with pytest.raises(ConfigError, match=r"model\.pair=true: listops needs pair=false"):
        prepare_sequences(load_config(None, [*LISTOPS, "model.pair=true"]))
    with pytest.raises(
        ConfigError, match="listops needs 15 symbols and a padding token; set it to 16 or more"
    ):
        prepare_sequences(load_config(None, [*LISTOPS, "model.vocab_size=15"]))
    with pytest.raises(ConfigError, match=r"data\.source=stdlib: can't be used with task=classify"):
        load_config(None, ["task=classify"])
    with pytest.raises(ConfigError, match=r"lra: can't be used with task=causal .*; set task=classify"):
        load_config(None, ["data.source=lra"])
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256: must be at least 257"):
        load_config(None, ["model.vocab_size=256"])


def test_batches_pickled_by_python_2_are_read(tmp_path: Path) -> None:
    # This is the format that cs.toronto.edu publishes: byte strings, and arrays under the old module name of
    # NumPy.
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    content = bytes(range(256)) * 12
    data = empty + b"(K\x01(K\x01M\x00\x0ct" + kind + b"\x89T\x00\x0c\x00\x00" + content + b"tb"
    path = tmp_path / "test_batch"
    path.write_bytes(b"\x80\x02}(U\x06labels](K\x07eU\x04data" + data + b"u.")
    from tnnlm.data.sequences.lra import _batch

    pictures, labels = _batch(path)
    assert labels == [7]
    assert pictures.shape == (1, 3, 1024)
    assert pictures.tobytes() == content
