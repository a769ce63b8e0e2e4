"""Ceilings of the machine, small: are rates those of the right bytes, FLOPs and clocks, and is told what is missing?"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ceilings, common
from benchmarks.ceilings import Sizes
from benchmarks.common import Spread, Timings
from fastgen.errors import command

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TINY = Sizes(copy_bytes=4096, matmul_side=16, operators=5, launches=7, graph_nodes=9, steps_per_round=3)
ON_GPUS = (
    "launch_host_seconds",
    "launch_device_seconds",
    "graph_node_device_seconds",
    "graph_replay_host_seconds",
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that says one second more each time it is asked, for `common` and `ceilings` alike."""
    ticks = itertools.count()
    fake = SimpleNamespace(perf_counter=lambda: float(next(ticks)), monotonic=lambda: 0.0)
    for module in (common, ceilings):
        monkeypatch.setattr(module, "time", fake)


@pytest.mark.usefixtures("clock")
def test_rates_are_of_bytes_and_flops_over_time():
    # A turn takes a second by this clock: a third of it for each of three steps.
    found = ceilings.measure(CPU, sizes=TINY, rounds=4)
    assert found.copy_bytes_per_second == Spread(*[pytest.approx(3 * 2 * 4096)] * 3)
    assert set(found.matmul_flops_per_second) == {"fp32", "bf16", "fp16"}
    for rate in found.matmul_flops_per_second.values():
        assert rate == Spread(*[pytest.approx(3 * 2 * 16**3)] * 3)
    assert found.operator_host_seconds.median == pytest.approx(1 / 3 / 5)
    assert found.rounds == 4
    assert [getattr(found, name) for name in ON_GPUS] == [None] * 4


@pytest.mark.usefixtures("clock")
def test_the_host_s_part_ends_when_the_step_was_handed_over(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "wait_for", lambda device: asked.append("wait"))
    on_host = ceilings.time_on_host({"a": lambda: asked.append("a"), "b": lambda: asked.append("b")}, CPU, rounds=2)
    assert on_host.seconds_per_step == {"a": (1.0, 1.0), "b": (1.0, 1.0)}
    assert asked == ["wait", "a", "wait", "b"] * 2 + ["wait"]


def _timings(**seconds):
    return Timings({name.replace("_", " "): (value, 2 * value, 3 * value) for name, value in seconds.items()})


EVERYWHERE = {"copy": 1.0, "matmul_fp32": 4.0, "matmul_bf16": 2.0, "matmul_fp16": 1.0, "operator": 10.0}


def _on_a_gpu():
    device = _timings(**EVERYWHERE, launch=35.0, graph=18.0)
    return ceilings.ceilings_of(device, _timings(launch=14.0, graph=0.5), TINY)


def test_launches_and_nodes_are_told_apart():
    found = _on_a_gpu()
    assert found.launch_device_seconds == Spread(2 * 5.0, 1.5 * 5.0, 2.5 * 5.0)
    assert found.launch_host_seconds.median == 2 * 2.0
    assert found.graph_node_device_seconds.median == 2 * 2.0
    # Of the whole call, however many nodes it replays.
    assert found.graph_replay_host_seconds.median == 2 * 0.5
    assert found.operator_host_seconds.median == 2 * 2.0
    rates = {name: rate.median for name, rate in found.matmul_flops_per_second.items()}
    assert rates == {"fp32": 2 * 16**3 / 8, "bf16": 2 * 16**3 / 4, "fp16": 2 * 16**3 / 2}


class Seen(TorchDispatchMode):
    """Notes the operators that run, and the tensors that they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_what_runs_is_what_is_counted():
    steps = ceilings.cpu_and_gpu_steps(CPU, TINY)
    seen = {}
    for name, step in steps.items():
        with Seen() as mode:
            step()
        seen[name] = mode.calls
    ((copy, (target, source), _),) = seen["copy"]
    assert copy == "aten.copy_.default"
    assert source.nbytes == target.nbytes == TINY.copy_bytes
    assert source.data_ptr() != target.data_ptr()
    assert torch.equal(source, target)
    assert source.unique().numel() > 1000
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        ((product, factors, into),) = seen[f"matmul {precision}"]
        assert product == "aten.mm.out"
        for matrix in (*factors, into["out"]):
            assert matrix.shape == (16, 16)
            assert matrix.dtype == dtype
            assert matrix.count_nonzero() > 250
        assert not torch.equal(*factors)
        expected = (factors[0].double() @ factors[1].double()).to(dtype)
        torch.testing.assert_close(into["out"], expected)
    assert [call[0] for call in seen["operator"]] == ["aten.neg_.default"] * TINY.operators
    assert all(call[1][0].numel() == 1 for call in seen["operator"])


def test_tensors_are_far_larger_than_caches():
    assert ceilings.SIZES["cuda"].copy_bytes == 2**30
    assert ceilings.SIZES["cuda"].matmul_side == 8192
    assert ceilings.SIZES["cpu"].copy_bytes >= 2**29
    # A GPU queues 1,024 launches; past them the host waits, and its part could not be told.
    assert all(sizes.launches < 1024 for sizes in ceilings.SIZES.values())


COLUMNS = ["ceiling", "unit", "size", "size_unit", "rounds", "steps_per_round", "median", "q25", "q75"]


@without_gpu
def test_the_command_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ceilings.SIZES, "cpu", TINY)
    for _ in range(2):
        assert command(ceilings.main, ["--rounds=2", f"--results={tmp_path}"]) == 0
    out = capsys.readouterr().out
    # Launches and nodes, on host and device, of two runs.
    assert out.count("not measured (no GPU)") == 2 * 4
    rows = common.read_rows(tmp_path / "ceilings.csv")
    assert list(rows[0]) == [*common.machine_facts(CPU), *COLUMNS]
    measured = ["copy", "matmul fp32", "matmul bf16", "matmul fp16", "operator, host"]
    assert [row["ceiling"] for row in rows] == 2 * measured
    assert [row["unit"] for row in rows[:5]] == ["bytes/s", *["FLOP/s"] * 3, "s"]
    assert all(0 < float(row["q25"]) <= float(row["median"]) <= float(row["q75"]) for row in rows)
    assert all(row["rounds"] == "2" and row["steps_per_round"] == "3" for row in rows)


def test_a_gpu_s_rows_and_table(capsys):
    found = _on_a_gpu()
    rows = {row["ceiling"]: row for row in ceilings.result_rows(found, CPU)}
    assert len(rows) == 9
    assert (rows["launch, device"]["median"], rows["launch, device"]["size"]) == (10.0, 7)
    assert rows["copy"]["median"] == 2 * 4096 / 2
    ceilings.report(found)
    out = capsys.readouterr().out
    assert "not measured" not in out
    # Four seconds a node.
    assert "4000000.000 (3000000.000 .. 5000000.000)" in out


@without_gpu
def test_nothing_is_measured_where_a_gpu_is_asked_for_and_there_is_none(tmp_path, capsys):
    assert command(ceilings.main, ["--device=cuda", f"--results={tmp_path}"]) == 0
    assert capsys.readouterr().out == "not measured (no GPU)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["--wrong=1", "--device=tpu", "--rounds=0"])
def test_a_wrong_argument_is_one_line(word, capsys):
    assert command(ceilings.main, [word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_has_all_of_them():
    found = ceilings.measure(torch.device("cuda"), sizes=Sizes(2**26, 1024), rounds=3)
    assert all(line.measured.median > 0 for line in ceilings.lines(found))
    assert found.graph_node_device_seconds.median < found.launch_device_seconds.median
