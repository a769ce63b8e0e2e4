"""checkpoint.py and the locks of nodes.py: old or new but never half, and nothing from elsewhere is run."""

import errno
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open

from fastgen import files
from fastgen.checkpoint import (
    CHECKPOINT_FORMAT,
    load_checkpoint,
    load_weights,
    read_weights,
    save_checkpoint,
    save_weights,
)
from fastgen.errors import MachineError, UserError, as_one_line
from fastgen.files import write_atomically, write_json
from fastgen.models import build_model, initialise
from fastgen.nodes import Node, find_node, locked, open_node, read_json


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


@pytest.fixture(scope="module")
def state():
    """What a training holds after one step, with a small network."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return {
        "node": "0123456789abcdef",
        "step": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "meter": {"images": 6, "loss_sum": 0.1 + 0.2, "correct": 1},
        "seconds": {"train": 1.5},
        "history": [{"epoch": 0, "loss": 2.302585092994046}],
    }


@pytest.fixture
def saved(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state)
    return path


def test_a_checkpoint_comes_back_as_it_was(saved, state):
    assert same(load_checkpoint(saved), {"format": CHECKPOINT_FORMAT, **state})


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
def test_a_full_disk_leaves_the_old_file(monkeypatch, saved, state, fails_at):
    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        break_disk(patch, fails_at)
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(saved, {**state, "step": 4})
    assert saved.read_bytes() == before
    assert load_checkpoint(saved)["step"] == 3
    # What is told to the person: the machine's fault.
    told = as_one_line(caught.value)
    assert isinstance(told, MachineError)
    assert told.exit_code == 1
    # With space again it goes on, whatever was left behind.
    save_checkpoint(saved, {**state, "step": 4})
    assert load_checkpoint(saved)["step"] == 4
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("fails_at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_no_new_file(monkeypatch, tmp_path, fails_at):
    break_disk(monkeypatch, fails_at)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "new", b"content" * 1000)
    assert not (tmp_path / "new").exists()


def test_a_writer_killed_in_the_middle_leaves_the_old_file(saved, state):
    """The process ends by SIGKILL when half of the new content is written."""
    program = f"""
import builtins, os, signal
from fastgen import checkpoint, files
class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def write(self, content):
        self.file.write(content[: len(content) // 2]); self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
files.open = lambda path, mode: Half(builtins.open(path, mode))
checkpoint.save_checkpoint(checkpoint.Path({str(saved)!r}), {{"step": 4}})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert load_checkpoint(saved)["step"] == 3


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
    content = pickle.dumps({"format": 1, "step": RunsCode(str(proof))}, protocol=protocol)
    path.write_bytes(wrap(content))
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not proof.exists()
    # The trap works: unpickled without care it does run.
    pickle.loads(content)["step"].close()
    assert proof.exists()


def test_a_malicious_torch_file_runs_nothing(tmp_path):
    path, proof = tmp_path / "checkpoint.pt", tmp_path / "ran"
    torch.save({"format": 1, "step": RunsCode(str(proof))}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not proof.exists()


# Shares of the length, and how many bytes are missing at the end, where the zip's directory lies.
@pytest.mark.parametrize("cut", [0.0, 0.01, 0.1, 0.3, 0.5, 0.75, 0.8, 0.9, 0.99, 1, 2, 20, 100])
def test_a_truncated_checkpoint_is_the_users_line(saved, cut):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(cut * len(whole))] if isinstance(cut, float) else whole[:-cut])
    with pytest.raises(UserError, match=r"checkpoint\.pt: .*delete it") as caught:
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


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"format": 0, "step": 3}, {"format": 99}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="no checkpoint of this version"):
        load_checkpoint(tmp_path / "checkpoint.pt")


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
    save_checkpoint(node.checkpoint, {"step": 1})
    assert not node.finished
    node.finish({"generation": 0}, {"images": 10})
    assert find_node(tmp_path / "store", "0123") == node == Node(tmp_path / "store" / "0123")
    assert node.facts() == {"node": "0123", "identity": {"generation": 0}, "training": {"images": 10}}
    assert not node.checkpoint.exists()


HOLDER = """
import sys, time
from pathlib import Path
from fastgen.nodes import locked
with locked(Path(sys.argv[1]), "this folder"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def hold(folder):
    with locked(folder, "this folder"):
        return True


def test_a_folder_is_held_by_one_process_and_free_after_its_kill(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(UserError, match=f"this folder is in use by process {holder.pid} on ") as caught:
            hold(tmp_path)
        assert str(tmp_path) in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert hold(tmp_path)
    assert hold(tmp_path)


def test_other_folders_stay_free(tmp_path, holder):
    (tmp_path / "other").mkdir()
    assert hold(tmp_path / "other")


def test_a_folder_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, "this folder"):
        raise KeyError
    assert hold(tmp_path)
