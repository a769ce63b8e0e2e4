"""checkpoint.py, and nodes.py with its locks: old or new but never half, and nothing from elsewhere is run."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastgen import files
from fastgen.checkpoint import (
    CHECKPOINT_FORMAT,
    Damaged,
    load_checkpoint,
    load_newest,
    load_weights,
    read_weights,
    save_checkpoint,
    save_weights,
)
from fastgen.errors import MachineError, UserError, as_one_line
from fastgen.files import write_atomically, write_json
from fastgen.models import build_model, initialise
from fastgen.nodes import Node, checkpoint_path, checkpoints, find_node, open_node, read_json, step_of


def network(name="resnet8", classes=10, channels=3, seed=0):
    return initialise(build_model(name, classes, channels, "strided"), seed)


def same(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def state_at(step):
    """What a training holds after so many steps, with a small network; another one for each step."""
    with torch.random.fork_rng():
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return {
        "node": "0123456789abcdef",
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "meter": {"images": 6, "loss_sum": 0.1 + 0.2, "correct": 1},
        "seconds": {"train": 1.5},
        "history": [{"epoch": 0, "loss": 2.302585092994046}],
    }


def is_state_at(loaded, step):
    return same(loaded, {"format": CHECKPOINT_FORMAT, **state_at(step)})


@pytest.fixture(scope="module")
def state():
    return state_at(3)


@pytest.fixture
def saved(tmp_path, state):
    """The only checkpoint of a folder."""
    return save_checkpoint(tmp_path, state)


@pytest.fixture
def two(tmp_path):
    """The folder of a training that saved after steps 10 and 20."""
    for step in (10, 20):
        save_checkpoint(tmp_path, state_at(step))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps):
    return [f"checkpoint-{step:09d}.pt" for step in sorted(steps)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(path):
    """Cuts its last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def forbid(*said):
    raise AssertionError(said)


def test_a_checkpoint_comes_back_as_it_was(saved, state):
    assert saved.name == "checkpoint-000000003.pt"
    assert same(load_checkpoint(saved), {"format": CHECKPOINT_FORMAT, **state})
    assert is_state_at(load_newest(saved.parent, forbid), 3)
    # The comparison can fail: states of different steps differ in more than the number.
    assert not same(state_at(3)["model"], state_at(4)["model"])


def test_the_last_two_checkpoints_are_kept(tmp_path):
    kept = []
    for step in (3, 20, 100, 1000):
        save_checkpoint(tmp_path, state_at(step))
        kept.append(step)
        assert names(tmp_path) == files_of(*kept[-2:])
        assert is_state_at(load_newest(tmp_path, forbid), step)


def test_a_step_that_is_saved_again_is_one_checkpoint(two):
    save_checkpoint(two, state_at(20))
    assert names(two) == files_of(10, 20)


def test_a_higher_step_that_is_whole_is_not_removed(tmp_path):
    for step in (30, 10, 12, 14):
        save_checkpoint(tmp_path, state_at(step))
    assert names(tmp_path) == files_of(12, 14, 30)


def test_checkpoints_are_listed_newest_first(tmp_path):
    others = ["checkpoint-12.pt", "checkpoint-000000012.pt.damaged", ".checkpoint-000000012.pt.77.partial", "node.json"]
    for name in [*others, "checkpoint.pt", *files_of(0, 7, 999_999_999, 10**9)]:
        (tmp_path / name).touch()
    listed = checkpoints(tmp_path)
    assert [step_of(path) for path in listed] == [10**9, 999_999_999, 7, 0, -1]
    assert listed[-1].name == "checkpoint.pt"
    assert Node(tmp_path).checkpoints == listed == sorted(listed, key=listed.index)
    with pytest.raises(ValueError, match="no name of a checkpoint"):
        step_of(tmp_path / "checkpoint-12.pt")


def test_where_there_is_no_checkpoint_none_is_loaded(tmp_path):
    assert load_newest(tmp_path, forbid) is None
    assert checkpoints(tmp_path / "missing") == []
    assert load_newest(tmp_path / "missing", forbid) is None


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        load_newest(tmp_path / "file", forbid)


class BrokenDisk:
    """A file whose disk fails at a given place; everything else works."""

    def __init__(self, file, fails_at):
        self._file, self._fails_at = file, fails_at

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        if self._fails_at == "write":
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def break_disk(monkeypatch, fails_at):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails_at == "write":
        monkeypatch.setattr(
            files, "open", lambda path, mode: BrokenDisk(io.FileIO(path, mode), fails_at), raising=False
        )
    else:
        monkeypatch.setattr(files.os, fails_at, fail)


@pytest.mark.parametrize("fails_at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_files(monkeypatch, two, fails_at):
    before = contents(two)
    with monkeypatch.context() as patch:
        break_disk(patch, fails_at)
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(two, state_at(30))
    assert contents(two) == before
    assert is_state_at(load_newest(two, forbid), 20)
    # What is told to the person: the machine's fault.
    told = as_one_line(caught.value)
    assert isinstance(told, MachineError)
    assert told.exit_code == 1
    # With space again it goes on, whatever was left behind.
    save_checkpoint(two, state_at(30))
    assert names(two) == files_of(20, 30)
    assert is_state_at(load_newest(two, forbid), 30)


@pytest.mark.parametrize("fails_at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_no_new_file(monkeypatch, tmp_path, fails_at):
    break_disk(monkeypatch, fails_at)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "new", b"content" * 1000)
    assert not (tmp_path / "new").exists()


CALLS = ("fsync", "replace", "rename", "unlink")


class Watched:
    """A file that is written in halves, and tells so."""

    def __init__(self, file, here):
        self._file, self._here = file, here

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        self._here()
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            self._file.write(half)
            self._file.flush()
            self._here()

    def __getattr__(self, name):
        return getattr(self._file, name)


def save_and_die(folder, elsewhere, instant):
    """Saves, in a process of its own, and is killed at the given instant: before or after a call, or within a write.

    What it saves it takes from a file: a step of an optimizer imports half of torch, which takes a second.
    """
    state, passed = load_checkpoint(elsewhere), itertools.count()

    def here():
        if next(passed) == instant:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(call):
        def watched(*arguments):
            here()
            call(*arguments)
            here()

        return watched

    for name in CALLS:
        setattr(os, name, watch(getattr(os, name)))
    files.open = lambda path, mode: Watched(io.FileIO(path, mode), here)
    save_checkpoint(folder, state)


def messy(folder):
    """A training after step 30: an earlier kill left one checkpoint too many and half a one, and one was damaged."""
    folder.mkdir()
    for step in (30, 20, 10):
        # Backwards, so that none of them is pruned.
        save_checkpoint(folder, state_at(step))
    (folder / "checkpoint-000000025.pt.damaged").write_bytes(b"damaged")
    (folder / ".checkpoint-000000035.pt.77.partial").write_bytes(b"half")


def test_a_kill_at_any_instant_of_a_save_leaves_the_old_ones_or_the_new_one(tmp_path):
    server = multiprocessing.get_context("forkserver")
    elsewhere, outcomes = save_checkpoint(tmp_path, state_at(40)), set()
    for instant in itertools.count():
        folder = tmp_path / str(instant)
        messy(folder)
        saving = server.Process(target=save_and_die, args=(folder, elsewhere, instant))
        saving.start()
        saving.join(60)
        # What stands under the name of a checkpoint is whole, the newest or not.
        steps = [step_of(path) for path in checkpoints(folder) if is_state_at(load_checkpoint(path), step_of(path))]
        assert len(steps) == len(checkpoints(folder)), instant
        assert steps == [30, 20, 10] or steps[:2] == [40, 30], instant
        assert is_state_at(load_newest(folder, forbid), steps[0])
        outcomes.add(tuple(steps))
        if saving.exitcode == 0:
            break
        assert saving.exitcode == -signal.SIGKILL
        # Whoever goes on from there clears all of it away.
        save_checkpoint(folder, state_at(40))
        assert names(folder) == files_of(30, 40), instant
    # Write 3, sync file and folder 4, rename 2, remove four files 8: the next instant is that of nobody.
    assert instant == 17
    assert outcomes == {(30, 20, 10), (40, 30, 20, 10), (40, 30, 20), (40, 30)}


def test_nothing_is_removed_before_the_new_checkpoint_is_on_the_disk(monkeypatch, tmp_path):
    messy(tmp_path / "node")
    calls = []
    # For the save alone: pytest removes the test's own files with these functions, too.
    with monkeypatch.context() as patched:
        for name in CALLS:
            original = getattr(os, name)

            def watched(first, *others, name=name, original=original):
                calls.append((name, first.name if isinstance(first, Path) else None))
                original(first, *others)

            patched.setattr(os, name, watched)
        save_checkpoint(tmp_path / "node", state_at(40))
    partial = f".checkpoint-000000040.pt.{os.getpid()}.partial"
    assert calls == [
        # A half is nobody's.
        ("unlink", ".checkpoint-000000035.pt.77.partial"),
        ("fsync", None),
        ("replace", partial),
        ("fsync", None),
        ("unlink", "checkpoint-000000010.pt"),
        ("unlink", "checkpoint-000000020.pt"),
        ("unlink", "checkpoint-000000025.pt.damaged"),
    ]


def test_writing_is_durable_before_it_is_seen(monkeypatch, tmp_path):
    """The content reaches the disk before the name does, and then the name."""
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("rename"), rename(*paths)))
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["sync", "rename", "sync"]
    assert (tmp_path / "file").read_bytes() == b"content"


class RunsCode:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (self.proof, "w")


def as_zip(content):
    """The file that torch.save writes, with a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [as_zip, bytes], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_malicious_checkpoint_runs_nothing(tmp_path, wrap, protocol):
    path, proof = tmp_path / "checkpoint.pt", tmp_path / "ran"
    content = pickle.dumps({"format": CHECKPOINT_FORMAT, "step": RunsCode(str(proof))}, protocol=protocol)
    path.write_bytes(wrap(content))
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not proof.exists()
    # The trap works: unpickled without care it does run.
    pickle.loads(content)["step"].close()
    assert proof.exists()


def test_a_malicious_torch_file_runs_nothing(tmp_path):
    path, proof = tmp_path / "checkpoint.pt", tmp_path / "ran"
    torch.save({"format": CHECKPOINT_FORMAT, "step": RunsCode(str(proof))}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not proof.exists()


# Shares of the length, and how many bytes are missing at the end, where the zip's directory lies.
@pytest.mark.parametrize("cut", [0.0, 0.01, 0.1, 0.3, 0.5, 0.75, 0.8, 0.9, 0.99, 1, 2, 20, 100])
def test_a_truncated_checkpoint_is_the_users_line(saved, cut):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(cut * len(whole))] if isinstance(cut, float) else whole[:-cut])
    with pytest.raises(UserError, match=r"checkpoint-000000003\.pt: is damaged \(.+\): delete it") as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


def loads_or_refuses(path, state):
    try:
        loaded = load_checkpoint(path)
    except UserError as refusal:
        return "\n" not in str(refusal)
    return same(loaded, {"format": CHECKPOINT_FORMAT, **state})


@pytest.mark.parametrize("part", ["pickle", "tensors", "directory"])
def test_a_flipped_bit_is_never_taken_for_good(saved, state, part):
    """Either it is refused, or it was in a place that says nothing; another state is never loaded."""
    whole = saved.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        starts = {name: file.getinfo(f"archive/{name}").header_offset for name in ("data.pkl", "byteorder", "data/0")}
    regions = {
        "pickle": (0, starts["byteorder"]),
        "tensors": (starts["data/0"], whole.index(b"PK\x01\x02")),
        "directory": (whole.index(b"PK\x01\x02"), len(whole)),
    }
    chosen = random.Random(0)
    wrong = []
    for _ in range(400):
        place, bit = chosen.randrange(*regions[part]), chosen.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        saved.write_bytes(damaged)
        try:
            good = loads_or_refuses(saved, state)
        except Exception as error:  # noqa: BLE001 (whatever it is, a traceback is the failure)
            good = type(error).__name__
        if good is not True:
            wrong.append((place, bit, good))
    assert not wrong, f"{len(wrong)} of 400, the first: {wrong[:5]}"


def falls_back(folder, newest, line=""):
    """Whether the one before step `newest`, 10, is loaded instead of it, and that was said once and is seen."""
    said = []
    loaded = load_newest(folder, said.append)
    aside = f"checkpoint-{newest:09d}.pt.damaged"
    told = (
        len(said) == 1
        and "\n" not in said[0]
        and f"checkpoint-{newest:09d}.pt: is damaged (" in said[0]
        and "): going on from the one before it, step 10" in said[0]
        and aside in said[0]
        and line in said[0]
    )
    return is_state_at(loaded, 10) and told and names(folder) == sorted([*files_of(10), aside])


def put_back(folder, content):
    (folder / "checkpoint-000000020.pt.damaged").unlink(missing_ok=True)
    checkpoint_path(folder, 20).write_bytes(content)


def test_a_cut_newest_checkpoint_falls_back_to_the_one_before_whatever_its_length(two):
    whole = checkpoint_path(two, 20).read_bytes()
    lengths = {0, 1, 4, 22, 100, *range(0, len(whole), len(whole) // 25), *(len(whole) - n for n in (1, 2, 20, 100))}
    for length in sorted(lengths):
        put_back(two, whole[:length])
        assert falls_back(two, 20), length
    put_back(two, whole)
    assert is_state_at(load_newest(two, forbid), 20)


def test_a_flipped_bit_in_the_newest_falls_back_or_says_nothing(two):
    whole, chosen = checkpoint_path(two, 20).read_bytes(), random.Random(0)
    wrong, fallen = [], 0
    for _ in range(300):
        place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        put_back(two, damaged)
        try:
            harmless = is_state_at(load_checkpoint(checkpoint_path(two, 20)), 20)
        except Damaged:
            harmless = False
        if harmless:
            good = is_state_at(load_newest(two, forbid), 20)
        else:
            good = falls_back(two, 20)
            fallen += 1
        if not good:
            wrong.append((place, bit))
    assert not wrong, f"{len(wrong)} of 300, the first: {wrong[:5]}"
    assert fallen > 150


def test_the_line_of_a_fallback_says_what_is_wrong(two):
    content = bytearray(checkpoint_path(two, 20).read_bytes())
    with zipfile.ZipFile(checkpoint_path(two, 20)) as file:
        content[content.index(file.read("archive/data/0"))] ^= 1
    put_back(two, content)
    assert falls_back(two, 20, "is damaged (the checksum of archive/data/0 differs): going on")


def test_two_damaged_checkpoints_fall_back_to_a_third(two):
    third = contents(two)
    for step in (30, 40):
        save_checkpoint(two, state_at(step))
        damage(checkpoint_path(two, step))
    (two / files_of(10)[0]).write_bytes(third[files_of(10)[0]])
    said = []
    assert is_state_at(load_newest(two, said.append), 10)
    assert [line.partition(": is damaged")[0] for line in said] == [str(checkpoint_path(two, n)) for n in (40, 30)]


@pytest.mark.parametrize("keep", [1, 2])
def test_when_all_are_damaged_one_line_says_so_every_time(two, keep):
    for path in checkpoints(two)[keep:]:
        path.unlink()
    for path in checkpoints(two):
        damage(path)
    before = contents(two)
    for _ in range(2):
        with pytest.raises(UserError, match=r"checkpoint-000000020\.pt: is damaged \(.*\).* delete it") as caught:
            load_newest(two, forbid)
        assert "\n" not in str(caught.value)
        others = "and so is what there is before it (checkpoint-000000010.pt): delete it and them"
        assert (others in str(caught.value)) == ("before it" in str(caught.value)) == (keep == 2)
        # Whether all begins anew is for a person to decide; nothing is set aside.
        assert contents(two) == before


# The training that went on from step 10 saves before the step of the damaged one, at it, or behind it.
@pytest.mark.parametrize("steps", [(12, 14), (15, 20), (20, 25), (30, 40)])
def test_after_a_fallback_two_saves_make_two_good_checkpoints(two, steps):
    damage(checkpoint_path(two, 20))
    assert falls_back(two, 20)
    for before, step in itertools.pairwise((10, *steps)):
        save_checkpoint(two, state_at(step))
        # The damaged one was kept for whoever wants to look at it until there were two good ones again.
        assert names(two) == files_of(before, step)
        assert is_state_at(load_newest(two, forbid), step)
        damage(checkpoint_path(two, step))
        said = []
        assert is_state_at(load_newest(two, said.append), before)
        assert len(said) == 1
        save_checkpoint(two, state_at(step))


def test_a_damaged_checkpoint_stays_until_there_are_two_good_ones(two):
    damage(checkpoint_path(two, 20))
    assert falls_back(two, 20)
    checkpoint_path(two, 10).unlink()
    aside = "checkpoint-000000020.pt.damaged"
    save_checkpoint(two, state_at(5))
    assert names(two) == sorted([*files_of(5), aside])
    save_checkpoint(two, state_at(10))
    assert names(two) == files_of(5, 10)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_in_a_folder_that_may_not_be_written_to_the_fallback_works_without_setting_aside(monkeypatch, two, number):
    damage(checkpoint_path(two, 20))

    def refuse(*paths):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        said = []
        assert is_state_at(load_newest(two, said.append), 10)
        assert len(said) == 1
        assert said[0].endswith("going on from the one before it, step 10")
        assert names(two) == files_of(10, 20)


def test_a_disk_that_fails_while_setting_aside_is_no_fallback(monkeypatch, two):
    damage(checkpoint_path(two, 20))

    def fail(*paths):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_newest(two, forbid)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(monkeypatch, two, number):
    original = Path.read_bytes

    def refuse(path):
        if step_of(path) == 20:
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        load_newest(two, forbid)
    assert names(two) == files_of(10, 20)


def test_too_little_memory_is_not_taken_for_damage(monkeypatch, two):
    def fail(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        load_newest(two, forbid)
    assert names(two) == files_of(10, 20)


@pytest.mark.parametrize(
    "content", [[1, 2], {"step": 3}, {"format": 0, "step": 3}, {"format": 1, "step": 3}, {"format": 99}]
)
def test_a_checkpoint_of_another_format_is_refused(tmp_path, content):
    torch.save(content, checkpoint_path(tmp_path, 30))
    with pytest.raises(UserError, match="no checkpoint of this version") as caught:
        load_checkpoint(checkpoint_path(tmp_path, 30))
    assert not isinstance(caught.value, Damaged)
    # Also where one of ours is before it.
    save_checkpoint(tmp_path, state_at(20))
    with pytest.raises(UserError, match=r"checkpoint-000000030\.pt: is no checkpoint of this version"):
        load_newest(tmp_path, forbid)
    assert names(tmp_path) == files_of(20, 30)


def test_the_checkpoint_of_an_older_version_is_refused_aloud(tmp_path):
    torch.save({"format": 1, **state_at(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: is no checkpoint of this version of fastgen: delete it"):
        load_newest(tmp_path, forbid)
    assert names(tmp_path) == ["checkpoint.pt"]
    # It is older than any with a step, and goes with the third as all others do.
    save_checkpoint(tmp_path, state_at(0))
    assert is_state_at(load_newest(tmp_path, forbid), 0)
    save_checkpoint(tmp_path, state_at(1))
    assert names(tmp_path) == files_of(0, 1)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, network(), {"model": {"name": "resnet8"}, "classes": 10, "mean": (0.5, 0.25)})
    return path


def test_weights_come_back_bit_for_bit(weights):
    model = network(seed=1)
    load_weights(weights, model)
    assert same(dict(model.state_dict()), dict(network().state_dict()))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)


def test_weights_carry_their_description(weights):
    tensors, description = read_weights(weights)
    assert description == {"model": {"name": "resnet8"}, "classes": 10, "mean": [0.5, 0.25]}
    assert list(tensors) == sorted(network().state_dict())
    # Any other reader of safetensors finds it as well.
    with safe_open(weights, framework="np") as file:
        assert json.loads(file.metadata()["fastgen"]) == description


def test_equal_weights_are_equal_files(weights, tmp_path):
    _, description = read_weights(weights)
    for name in ("one", "two"):
        save_weights(tmp_path / name, network(), description)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size == weights.stat().st_size


def test_weights_without_a_description_are_weights(tmp_path):
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in network().state_dict().items()}, tmp_path / "w")
    tensors, description = read_weights(tmp_path / "w")
    assert description == {}
    load_weights(tmp_path / "w", network(seed=1))
    assert torch.equal(tensors["fc.weight"], network().state_dict()["fc.weight"])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"classes": 100}, r"fc\.weight is \(10, 64\), the recipe's model has \(100, 64\)"),
        ({"channels": 1}, r"conv1\.weight is \(16, 3, 3, 3\), the recipe's model has \(16, 1, 3, 3\)"),
        ({"name": "resnet20"}, r"layer1\.1\.conv1\.weight is missing, the recipe's model has \(16, 16, 3, 3\)"),
    ],
)
def test_weights_of_another_network_are_refused(weights, other, told):
    model = network(**other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"model\.safetensors: is of another network: {told}"):
        load_weights(weights, model)
    assert same(dict(model.state_dict()), before)


def test_weights_of_a_deeper_network_are_refused(tmp_path):
    save_weights(tmp_path / "deep", network("resnet20"), {})
    with pytest.raises(UserError, match=r"layer1\.1\.\S+ is \(.*\), the recipe's model has missing"):
        load_weights(tmp_path / "deep", network())


@pytest.mark.parametrize("length", [0, 5, 8, 100, 5000, -1])
def test_truncated_weights_are_the_users_line(weights, length):
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model\.safetensors: is no safetensors file, or damaged") as caught:
        read_weights(weights)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_the_users_line(tmp_path):
    with pytest.raises(UserError, match="there is no such weights file"):
        read_weights(tmp_path / "model.safetensors")


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "good.json", {"loss": 0.1})
    assert read_json(tmp_path / "good.json") == {"loss": 0.1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "good.json", {"loss": float("nan")})
    assert read_json(tmp_path / "good.json") == {"loss": 0.1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1} b'])
def test_a_damaged_json_file_is_the_users_line(tmp_path, content):
    (tmp_path / "node.json").write_bytes(content)
    with pytest.raises(UserError, match=r"node\.json: is damaged"):
        read_json(tmp_path / "node.json")


def test_a_node_is_finished_by_its_last_file(tmp_path):
    node = open_node(tmp_path / "store", "0123")
    assert find_node(tmp_path / "store", "0123") is None
    save_weights(node.weights, network(), {})
    save_checkpoint(node.folder, {"step": 1})
    assert not node.finished
    node.finish({"generation": 0}, {"images": 10})
    assert find_node(tmp_path / "store", "0123") == node == Node(tmp_path / "store" / "0123")
    assert node.facts() == {"node": "0123", "identity": {"generation": 0}, "training": {"images": 10}}
    assert node.checkpoints == []


def test_a_finished_node_keeps_no_checkpoint_and_nothing_of_one(monkeypatch, tmp_path):
    folder = tmp_path / "0123"
    messy(folder)
    others = ["checkpoint.pt", "checkpoint.pt.damaged", ".checkpoint.pt.78.partial"]
    # What is not ours: of another process that measures this node, and of a person.
    strange = [".evaluation.json.78.partial", "checkpoint-of-mine.pt", "events.jsonl"]
    for name in [*others, *strange]:
        (folder / name).touch()
    before = names(folder)
    # The mark comes first: until it is there, a checkpoint is of use.
    with monkeypatch.context() as patch:
        break_disk(patch, "replace")
        with pytest.raises(OSError, match="No space left"):
            Node(folder).finish({}, {})
    assert names(folder) == before
    Node(folder).finish({}, {})
    assert names(folder) == sorted([*strange, "node.json"])
