"""The list of label stores and tables: what is there, what is damaged or missing, and what may go."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from taught import COUNT, CPU, CROP, MEAN, STD, epoch_of, tiny_prepare, tiny_split, tiny_store_kind, tiny_teacher

from fastgen import stored_labels
from fastgen.data.resident import ResidentLoader
from fastgen.errors import command
from fastgen.files import write_json
from fastgen.label_parts import epoch_folder, generation_folder, part_paths
from fastgen.label_store import LabelStore, Whereabouts, whereabouts
from fastgen.labelling import build_table
from fastgen.labels import TableKind
from fastgen.lessons import LookAhead, StoreLoader
from fastgen.locks import locked
from fastgen.stop import StopRequest

HERE, GONE = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture(scope="module")
def split():
    return tiny_split()


@pytest.fixture(scope="module")
def loader(split):
    return ResidentLoader(split, CROP.pad_px, CPU)


def store_path(nodes, teacher):
    return nodes / "labels" / tiny_store_kind(teacher).key


@pytest.fixture
def nodes(tmp_path, split, loader):
    """Two stores of three epochs, the third one in part; one of them, and a table, of a teacher that is there."""
    nodes = tmp_path / "nodes"
    for teacher in (HERE, GONE):
        store = LabelStore(nodes / "labels", tiny_store_kind(teacher), writes=True)
        store.describe([Whereabouts(teacher, tmp_path / f"{teacher}.safetensors")])
        ahead = LookAhead(loader, tiny_teacher(), tiny_prepare(), 1, 10)
        for epoch in range(3):
            batches = StoreLoader(loader, store, ahead, tiny_prepare(), CPU).batches(epoch_of(split, epoch), 6)
            for _ in zip(range(2 if epoch == 2 else 4), batches, strict=False):
                pass
            store.flush()
    kind = TableKind(
        teacher=HERE, images="images", count=COUNT, crop=CROP, mean=MEAN, std=STD, classes=10, precision="fp32",
        engine="folded",
    )  # fmt: skip
    folder = nodes / "labels" / kind.key
    build_table(folder, kind, loader, tiny_prepare(), tiny_teacher(), StopRequest(), lambda done: None, print)
    (nodes / HERE).mkdir()
    (nodes / HERE / "node.json").write_text(json.dumps({}))
    return nodes


def listed(nodes, capsys, *words):
    """Exit code, and what was told, in one line."""
    code = command(stored_labels.main, [str(nodes), *words])
    told = capsys.readouterr()
    return code, " ".join((told.out + told.err).split())


def test_all_that_is_there_is_listed(nodes, capsys):
    code, told = listed(nodes, capsys)
    assert code == 0
    for teacher in (HERE, GONE):
        assert tiny_store_kind(teacher).key in told
    assert told.count("3 of 10 classes, fp16") == 2
    assert told.count("2 epochs, 1 in part") == 2
    assert told.count("all 10 classes, fp32") == 1
    assert f"{GONE} (gone)" in told
    assert f"{HERE} (gone)" not in told


def test_a_check_names_what_is_missing(nodes, capsys):
    code, told = listed(nodes, capsys, "--check")
    # Twelve of twenty rows were asked for.
    assert code == 0
    assert "epoch_0002_8x6: lacks 8 of 20 labels (rows 12..19)" in told
    assert "nothing is damaged" in told


def test_a_check_names_what_is_damaged(nodes, split, capsys):
    (path,) = part_paths(epoch_folder(store_path(nodes, HERE), epoch_of(split).name))
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    code, told = listed(nodes, capsys, "--check")
    assert code == 1
    assert f"{path}: is damaged" in told
    assert "epoch_0000_8x6: lacks 20 of 20 labels (rows 0..19)" in told
    # The plain list reads no rows; a header that is cut it tells, too.
    assert listed(nodes, capsys)[0] == 0
    path.write_bytes(bytes(content[:10]))
    assert "1 epochs, 1 in part, 1 damaged" in listed(nodes, capsys)[1]


def test_stale_stores_can_be_removed_and_no_other(nodes, capsys):
    code, told = listed(nodes, capsys, "--remove=stale")
    assert code == 0
    assert f"removed {store_path(nodes, GONE)}" in told
    assert not store_path(nodes, GONE).exists()
    assert len(list((nodes / "labels").iterdir())) == 2
    assert listed(nodes, capsys, "--remove=stale") == (0, "nothing is stale")


def table_folder(nodes):
    (path,) = nodes.glob("labels/*/logits.safetensors")
    return path.parent


def test_a_check_reads_tables_too(nodes, capsys):
    path = table_folder(nodes) / "logits.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    code, told = listed(nodes, capsys, "--check")
    assert code == 1
    assert f"{path}: is damaged (the checksum of view" in told
    path.write_bytes(bytes(content[: len(content) // 2]))
    assert f"{path}: is damaged" in listed(nodes, capsys, "--check")[1]


def test_a_table_is_stale_once_its_teacher_s_weights_are_gone_and_it_says_where_they_were(nodes, tmp_path, capsys):
    folder = table_folder(nodes)
    shutil.rmtree(nodes / HERE)
    (tmp_path / f"{HERE}.safetensors").touch()
    assert folder.name not in listed(nodes, capsys, "--remove=stale")[1]
    write_json(folder / "teacher.json", whereabouts([Whereabouts("", tmp_path / "file.safetensors")]))
    (tmp_path / "file.safetensors").touch()
    assert folder.name not in listed(nodes, capsys, "--remove=stale")[1]
    (tmp_path / "file.safetensors").unlink()
    assert f"removed {folder}" in listed(nodes, capsys, "--remove=stale")[1]
    assert not folder.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_a_description_that_is_damaged_hides_nothing_else(nodes, capsys, content):
    path = store_path(nodes, HERE) / "store.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    code, told = listed(nodes, capsys)
    assert code == 0
    assert "store.json is damaged or missing" in told
    assert told.count("2 epochs, 1 in part") == 1
    code, told = listed(nodes, capsys, "--check")
    assert code == 1
    assert f"{path}: is damaged or missing" in told
    assert listed(nodes, capsys, f"--remove={path.parent.name}")[0] == 0


def test_an_ensemble_is_stale_once_a_member_is_gone(nodes, tmp_path, capsys):
    """Moved nodes are found by their ids, whatever the paths were."""
    store = LabelStore(nodes / "labels", tiny_store_kind("mean:0123"), writes=True)
    store.describe([Whereabouts(HERE, tmp_path / "moved"), Whereabouts("1234", tmp_path / "moved, too")])
    (nodes / "1234").mkdir()
    (nodes / "1234" / "node.json").write_text("{}")
    assert "mean:0123 (gone)" not in listed(nodes, capsys)[1]
    shutil.rmtree(nodes / HERE)
    assert "mean:0123 (gone)" in listed(nodes, capsys)[1]


def test_what_is_in_use_does_not_keep_the_rest(nodes, tmp_path, split, capsys):
    shutil.rmtree(nodes / HERE)
    with locked(generation_folder(store_path(nodes, HERE), 3, 1), "this label store"):
        code, told = listed(nodes, capsys, "--remove=stale")
    assert code == 2
    assert f"removed {store_path(nodes, GONE)}" in told
    assert "in use by process" in told
    assert store_path(nodes, HERE).exists()


def test_labels_of_a_teacher_that_is_a_file_are_not_stale(nodes, tmp_path, capsys):
    """Nor those of a node of another store."""
    (tmp_path / f"{GONE}.safetensors").touch()
    assert f"{GONE} (gone)" not in listed(nodes, capsys)[1]
    assert listed(nodes, capsys, "--remove=stale") == (0, "nothing is stale")
    assert store_path(nodes, GONE).exists()


def test_one_can_be_removed_by_its_key(nodes, capsys):
    path = store_path(nodes, HERE)
    assert listed(nodes, capsys, f"--remove={path.name}")[0] == 0
    assert not path.exists()
    code, told = listed(nodes, capsys, f"--remove={path.name}")
    assert code == 2
    assert "there are no such labels" in told


def test_what_a_training_holds_is_not_removed(nodes, split, capsys):
    path = store_path(nodes, HERE)
    before = sorted(path.rglob("*.part"))
    with locked(generation_folder(path, 3, 1), "this label store"):
        code, told = listed(nodes, capsys, f"--remove={path.name}")
    assert code == 2
    assert f"in use by process {os.getpid()}" in told
    assert sorted(path.rglob("*.part")) == before


def test_no_folder_and_nothing_in_it_are_told(tmp_path, capsys):
    code, told = listed(tmp_path / "none", capsys)
    assert (code, "there is no such folder" in told) == (2, True)
    assert listed(tmp_path, capsys)[0] == 0


def test_half_a_table_is_listed_as_such(nodes, capsys):
    (table,) = (path for path in (nodes / "labels").iterdir() if not (path / "store.json").exists())
    (table / "logits.safetensors").write_bytes(b"short")
    assert "damaged" in listed(nodes, capsys)[1]
    (table / "logits.safetensors").unlink()
    assert "in part" in listed(nodes, capsys)[1]
    shutil.rmtree(table)
