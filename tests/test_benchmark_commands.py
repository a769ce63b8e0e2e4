"""Operator counts, losses, teachers and all benchmarks in a row, small: do they count, compare and refuse rightly?"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    # Before triton is imported, here and in the processes that a test starts.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import __main__ as everything
from benchmarks import common, losses, losses_cases, opcount, opcount_steps, rigs, teacher
from benchmarks.common import Floor
from benchmarks.operators import Count, OperatorCounter
from fastgen.data.batch import Batch
from fastgen.data.facts import Facts
from fastgen.data.resident import ResidentLoader
from fastgen.errors import command
from fastgen.teacher import FrozenTeacher

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL_FACTS = Facts(10, 3, 12, 9, 0, 0, 2, True, (0.5, 0.4, 0.3), (0.25, 0.3, 0.2))


def _operators(function, *tensors):
    with OperatorCounter() as counter:
        function(*tensors)
    return counter.by_phase.get("forward", 0)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x.view(-1)[1:].detach() + 1).relu_(), 2),
        (lambda x: x.t().permute(1, 0).unsqueeze(0).expand(5, -1, -1).chunk(2), 0),
        # A copy, and a view of it that torch does not call one.
        (lambda x: x.t().reshape(-1), 1),
        (lambda x: (torch.empty_like(x), x.new_empty(3), torch.empty(2)), 0),
        (lambda x: torch.zeros(3), 1),
        (lambda x: x.copy_(x.clone()), 2),
        (lambda x: nn.functional.linear(x, x), 1),
    ],
)
def test_what_counts_as_an_operator(function, expected):
    assert _operators(function, torch.ones(4, 3)) == expected


def test_an_operator_of_our_own_counts_once_and_phases_are_kept_apart():
    @torch.library.custom_op("fastgen_test::thrice", mutates_args=())
    def thrice(x: torch.Tensor) -> torch.Tensor:
        return x + x + x

    x = torch.ones(3, requires_grad=True)
    with OperatorCounter() as counter:
        thrice(x.detach())
        y = x.sin().cos()
        counter.phase = "backward"
        torch.autograd.grad(y, x, torch.ones(3))
    assert counter.names["forward", "fastgen_test.thrice.default"] == 1
    # Two of each, and the ones; derivatives: -sin and a product, cos and a product.
    assert counter.by_phase == {"forward": 3, "backward": 6}


def test_floors_of_the_counts_hold(monkeypatch):
    monkeypatch.setattr(opcount, "TEACHERS_PX", {"resnet20": 32})
    step = opcount_steps.STEPS[6]
    assert step.name == opcount.MOST_OF_STEP[1]
    counts = [*opcount.count_losses(), *opcount.count_teachers(), *opcount.count_steps("resnet20", [step])]
    floors = opcount.floors(counts)
    assert len(floors) == 5
    assert all(floor.passed for floor in floors), [floor.line() for floor in floors]
    eager = {count.case: count.operators for count in counts if count.case.endswith("eager")}
    assert min(eager.values()) > 20
    folded = next(count for count in counts if count.case == "folded")
    assert folded.operators == eager["eager"] - 19  # batch-norms of ResNet-20


def test_doctored_counts_are_told_as_missed(capsys, monkeypatch, tmp_path):
    good = [Count("loss", "", f"{name} fused", "bf16", {"forward": 2}) for name in opcount.OBJECTIVES]
    teachers = [Count("teacher", "resnet20", name, "fp32", {"forward": n}) for name, n in (("eager", 8), ("fused", 4))]
    step = Count("step", *opcount.MOST_OF_STEP[:2], "bf16", {"forward": 100, "backward": 60})
    assert all(floor.passed for floor in opcount.floors([*good, *teachers, step]))
    worse = [replace(good[0], by_phase={"forward": 2, "backward": 1}), *good[1:], *teachers, step]
    assert [floor.passed for floor in opcount.floors(worse)] == [False, True, True, True, True]
    assert [floor.passed for floor in opcount.floors(good[:2])] == [True, True, False, False, False]
    slower = [*good, *teachers, replace(step, by_phase={"forward": 100, "backward": 60, "optimizer": 1})]
    assert [floor.passed for floor in opcount.floors(slower)] == [True, True, True, True, False]

    for name, counts in (("count_losses", worse), ("count_teachers", []), ("count_bare", []), ("count_steps", [])):
        monkeypatch.setattr(opcount, name, lambda *_, found=counts: found)
    assert command(opcount.main, [f"--results={tmp_path}"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("PASS") == 4
    assert "FAIL  operators of the fused loss tolerant: 3, asked at most 2" in captured.out
    assert captured.err.startswith("fastgen: 1 of 5 floors missed")


def test_a_step_is_counted_by_phase_and_compiles_whole():
    kinds = [opcount_steps.STEPS[number] for number in (1, 5, 6, 7, 9)]
    counts = list(opcount.count_steps("resnet8", kinds))
    assert all(count.graph_breaks == "0" for count in counts)
    assert [count.by_phase["optimizer"] for count in counts[:4]] == [1] * 4
    plain, kernels, fused, table, graph = (count.operators for count in counts)
    assert plain > kernels > fused > table > 10
    # Of eight steps together the teacher is asked once.
    assert fused > graph
    # The teacher is all that differs, and it has no backward pass.
    assert len({count.by_phase["backward"] for count in counts[1:]}) == 1


def test_a_bare_loop_is_counted_with_its_optimizer():
    default, fused = opcount.count_bare("resnet8")
    assert default.by_phase["forward"] == fused.by_phase["forward"]
    # PyTorch's default SGD issues several operators a tensor on a CPU, the fused one a single one.
    tensors = len(list(opcount.network_of("resnet8").parameters()))
    assert default.operators - fused.operators >= 3 * tensors


def test_a_graph_break_is_told():
    def forward(images, labels, jitter, logits):
        if images.sum() > 0:
            return labels
        return images

    numbers = torch.zeros(2, dtype=torch.int64)
    told = opcount_steps.graph_breaks(forward, Batch(torch.zeros(2), numbers, numbers))
    assert told != "0"
    assert "data-dependent" in told.lower()


def _case(objective, rows, classes, precision="bf16"):
    return losses_cases.Case(objective, rows, classes, precision)


@pytest.mark.parametrize(
    ("objective", "rows", "classes", "megabytes"),
    [
        ("tolerant", 1024, 1000, 4.108),
        ("distill t=1", 1024, 1000, 6.156),
        ("distill t=4", 1024, 1000, 6.156),
        ("distill_topm M=16", 1024, 1000, 4.174),
        ("tolerant", 128, 100, 0.0527),
        ("distill t=1", 128, 100, 0.0783),
    ],
)
def test_bytes_that_must_move(objective, rows, classes, megabytes):
    assert _case(objective, rows, classes).bytes_moved / 1e6 == pytest.approx(megabytes, abs=5e-4)


def test_inputs_are_larger_than_the_cache_or_the_table_says_so():
    large, small = _case("tolerant", 1024, 1000), _case("tolerant", 128, 100)
    assert large.copies == 63
    assert "CACHE" not in large.rotation
    assert small.copies == losses_cases.MOST_COPIES
    assert "WITHIN THE CACHE" in small.rotation
    assert not torch.equal(losses_cases.draw(small, CPU, 0).z_BC, losses_cases.draw(small, CPU, 1).z_BC)


def _result(case, eager, compiled, fused, error=1e-9):
    seconds = {"eager": (eager,) * 3, "compile": (compiled,) * 3, "fused": (fused,) * 3}
    errors = dict.fromkeys(losses_cases.CANDIDATES, losses_cases.Errors(1e-9, error))
    return losses.Result(case, errors, common.Timings(seconds))


@pytest.mark.parametrize(
    ("result", "passed"),
    [
        (_result(_case("tolerant", 128, 100), 5.1, 1.1, 1.0), [True, True, True, True]),
        (_result(_case("tolerant", 128, 100), 4.9, 1.1, 1.0), [True, True, False, True]),
        (_result(_case("tolerant", 1024, 1000), 5.1, 0.9, 1.0), [True, True, True, False]),
        (_result(_case("tolerant", 128, 100), 5.1, 1.1, 1.0, error=0.1), [True, False, True, True]),
        (_result(_case("tolerant", 128, 100), 5.1, 1.1, 1.0, error=torch.nan), [True, False, True, True]),
        # No floor of speed at this shape.
        (_result(_case("tolerant", 8192, 1000), 1.0, 1.0, 1.0), [True, True]),
    ],
)
def test_doctored_times_and_errors_are_told_as_missed(result, passed):
    assert [floor.passed for floor in losses.floors(result)] == passed


def test_times_are_of_one_call_and_bandwidth_of_the_bytes_that_must_move(capsys):
    case = _case("tolerant", 1024, 1000)
    result = _result(case, 63e-4, 63e-5, 63e-6)
    assert result.microseconds("fused").median == pytest.approx(1.0)
    assert result.gigabytes_per_second("fused") == pytest.approx(4108.3, abs=0.1)
    losses.report(result)
    rows = losses.result_rows(result, CPU, replays=20)
    assert [row["speed_over_eager_median"] for row in rows] == [1.0, 10.0, 100.0]
    out = capsys.readouterr().out
    assert "63 inputs of 129.0 MB together in turn" in out
    assert out.count("PASS") == 4


def test_a_case_that_breaks_or_finds_no_time_does_not_pass(capsys):
    cases = [_case("tolerant", 128, 100)] * 2
    broken = list(losses.run(cases, lambda case: 1 / 0, deadline=torch.inf))
    late = list(losses.run(cases, lambda case: 1 / 0, deadline=0.0))
    assert all(isinstance(floor, Floor) and not floor.passed for floor in (*broken, *late))
    assert "ZeroDivisionError" in capsys.readouterr().out


@without_gpu
def test_losses_are_not_measured_without_a_gpu(capsys):
    assert command(losses.main, []) == 0
    assert capsys.readouterr().out == "not measured (no GPU)\n"


SMALLEST = [
    _case(name, 3, 40, precision) for name, precision in zip(losses_cases.OBJECTIVES, ["bf16", "fp16"] * 2, strict=True)
]


@without_gpu
def test_all_candidates_compute_the_same(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(losses, "SMALL_CASES", SMALLEST)
    assert command(losses.main, ["--device=cpu", f"--results={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 2 * len(SMALLEST)
    assert "GB/s" not in out
    assert not list(tmp_path.iterdir())


@without_gpu
def test_a_candidate_that_computes_something_else_is_told(capsys, monkeypatch, tmp_path):
    right = losses_cases.fused_call

    def wrong(objective):
        call = right(objective)
        return lambda inputs: (call(inputs)[0] * 1.001, call(inputs)[1])

    monkeypatch.setattr(losses_cases, "fused_call", wrong)
    monkeypatch.setattr(losses, "SMALL_CASES", SMALLEST[:1])
    assert command(losses.main, ["--device=cpu", f"--results={tmp_path}"]) == 1
    assert "FAIL  tolerant, (3, 40) bf16: error of the loss" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("objective", losses_cases.OBJECTIVES)
def test_captured_candidates_compute_the_same_and_are_timed(objective):
    case = _case(objective, 128, 100)
    result = losses.time_case(case, torch.device("cuda"), rounds=2, replays=2, until=torch.inf)
    assert all(floor.passed for floor in losses.floors(result)[:2]), result.errors
    assert all(result.microseconds(name).median > 0 for name in losses_cases.CANDIDATES)


def _small_case(batch_size=8):
    split = rigs.random_split(SMALL_FACTS, 2 * teacher.AHEAD * batch_size)
    return rigs.Case("resnet8", batch_size, "fp32", SMALL_FACTS, split, CPU)


def test_teachers_are_timed_alone_and_in_steps(capsys, tmp_path):
    names = [name for name in teacher.VARIANTS if name != "compile"]
    measured = teacher.measure(_small_case(), names, rounds=1)
    teacher.report(measured)
    rows = teacher.result_rows(measured, "random")
    common.append_rows(tmp_path / "teacher.csv", rows)
    assert [row["teacher"] for row in rows] == names
    assert all(row["teacher_images_per_second"] > 0 and row["overhead_median"] > -1 for row in rows)
    kl = {row["teacher"]: row["max_kl_nats"] for row in rows}
    assert kl["table"] is None
    assert kl["eager"] < 1e-12
    assert all(0 <= kl[name] < 1e-9 for name in names if name not in ("table", "eager"))
    assert not teacher.floors(measured)
    assert "a GPU's, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(("batches", "passes"), [(1, teacher.AHEAD), (teacher.AHEAD, 1)])
def test_a_round_pays_for_every_batch_once(batches, passes):
    case, seen = _small_case(), []
    loader = ResidentLoader(case.split, case.facts.pad_px, CPU)

    def logits(images_NCHW):
        seen.append(len(images_NCHW))
        return torch.zeros(len(images_NCHW), case.facts.classes)

    asked = teacher.Asked("fused", FrozenTeacher(logits, "fused"), batches, "", None)
    rig = teacher.make_student(case, asked, loader, None)
    for _ in range(3):
        seen.clear()
        for _ in range(teacher.AHEAD):
            rig.step()
        assert seen == [batches * case.batch_size] * passes


@pytest.mark.parametrize(("student", "passed"), [(1.21, True), (1.23, False)])
def test_a_doctored_overhead_is_told_as_missed(student, passed):
    case = replace(_small_case(), model="resnet18", device=torch.device("cuda"))
    steps = common.Timings({teacher.PATRIARCH_STEP: (1.0, 2.0, 3.0), "fused": (student, 2 * student, 3 * student)})
    asked = [teacher.Asked("fused", lambda images: images, 1, "", None)]
    measured = teacher.Measured(case, asked, steps, steps)
    assert [floor.passed for floor in teacher.floors(measured)] == [passed]


@pytest.mark.parametrize("module", [opcount, losses, teacher, everything])
@pytest.mark.parametrize("word", ["--wrong=1", "--only=nothing", "--model=resnet21"])
def test_a_wrong_argument_is_one_line(module, word, capsys):
    assert command(module.main, [word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_cifar_is_refused_for_networks_of_photographs(tmp_path, capsys):
    assert command(teacher.main, ["--model=resnet18", "--device=cpu", f"--images_from={tmp_path}"]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_all_benchmarks_are_called_from_any_folder(run_command, tmp_path):
    ended = run_command(
        ["--only=opcount", f"--results={tmp_path}"], module="benchmarks", env={"PYTHONPATH": common.ROOT}
    )
    assert ended.code == 0, ended.err
    assert ended.out.count("PASS") == 5
    assert ended.out.rstrip().splitlines()[-1].split()[:2] == ["opcount", "0"]
    rows = common.read_rows(tmp_path / "opcount.csv")
    assert {row["part"] for row in rows} == {"loss", "teacher", "step"}
    assert all(float(row["operators"]) > 0 for row in rows)


@without_gpu
def test_one_that_fails_does_not_hold_the_others_up(monkeypatch, tmp_path, capfd):
    codes = dict.fromkeys(everything.BENCHMARKS, 0) | {"opcount": 3, "step": 1}
    del codes["losses"]
    monkeypatch.setattr(
        everything, "words_of", lambda name, *_: [sys.executable, "-c", f"raise SystemExit({codes[name]})"]
    )
    assert command(everything.main, [f"--results={tmp_path}"]) == 1
    captured = capfd.readouterr()
    summary = [line.split() for line in captured.out.splitlines() if line.split()[:1] and line.split()[0] in codes]
    assert [(words[0], int(words[1])) for words in summary] == list(codes.items())
    assert captured.out.count("not measured (no GPU)") == 2
    assert captured.err == "fastgen: 2 of 10 failed: opcount, step\n"


def test_images_and_results_are_passed_on(tmp_path):
    assert everything.words_of("teacher", tmp_path, tmp_path)[1:] == [
        "-m", "benchmarks.teacher", f"--results={tmp_path}", f"--images_from={tmp_path}",
    ]  # fmt: skip
    assert everything.words_of("kernels_static", tmp_path, tmp_path)[3:] == [f"--results={tmp_path}/kernels_static.csv"]
