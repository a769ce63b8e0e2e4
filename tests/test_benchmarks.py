"""The benchmarks on a CPU, small: do they measure, do they notice what is wrong, does the queue add up?"""

from __future__ import annotations

import json
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import tiny_recipe

from benchmarks import baselines, ceilings, checks, checks_training, common, gpu_check, queue, rigs, step, verdicts
from fastgen import losses
from fastgen.checkpoint import read_weights
from fastgen.errors import UserError, command
from fastgen.launch import processes_wanted
from fastgen.recipe import load_text

CPU = torch.device("cpu")
GENERATIONS = 2


def test_interleaved_ratio_is_that_of_the_work():
    steps = {"once": lambda: time.sleep(0.01), "twice": lambda: time.sleep(0.02)}
    timings = common.time_interleaved(steps, CPU, rounds=5, steps_per_round=2)
    ratio = timings.speed_ratio("once", "twice")
    assert timings.rounds == 5
    assert 1.5 < ratio.median < 2.5
    assert ratio.low <= ratio.median <= ratio.high
    assert timings.ms_per_step("once").median >= 10


def test_warm_up_rounds_are_dropped_and_the_order_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = common.time_interleaved(steps, CPU, rounds=2, steps_per_round=1, warm_up_rounds=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert timings.rounds == 2


def test_no_round_is_begun_after_the_time():
    timings = common.time_interleaved({"a": lambda: None}, CPU, rounds=9, steps_per_round=1, until=time.monotonic())
    assert timings.rounds == 1


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    common.append_rows(path, [{"a_ms": 1, "b": "x"}])
    common.append_rows(path, [{"a_ms": 2, "b": None}])
    assert path.read_text() == "a_ms,b\n1,x\n2,\n"
    with pytest.raises(UserError, match=r"other columns \(b, c\)"):
        common.append_rows(path, [{"a_ms": 3, "c": 1}])
    with pytest.raises(UserError, match="their order"):
        common.append_rows(path, [{"b": 3, "a_ms": 1}])
    assert path.read_text() == "a_ms,b\n1,x\n2,\n"


def test_floors_are_told_as_missed_or_met():
    seconds = {"bare": 1.0, "eager patriarch": 1.1, "compile patriarch": 0.8, "eager student": 1.3}
    timings = common.Timings({name: (value,) * 3 for name, value in {**seconds, "compile student": 1.1}.items()})
    verdicts = [line.split()[-1] for line in step.floor_lines(step.Measured(None, timings, {}))]
    assert verdicts == ["MISSED", "met", "met", "MISSED"]


def test_a_candidate_stands_beside_those_of_its_role():
    seconds = {"bare": 1.0, "bare student": 2.0, "timm": 0.5, "timm student": 1.0, "eager patriarch": 0.25}
    timings = common.Timings({name: (value,) * 3 for name, value in {**seconds, "eager student": 0.5}.items()})
    case = rigs.Case("resnet8", 10, "fp32", None, None, CPU)
    roofs = {"patriarch": step.Roof(0.1, 100, 1000), "student": step.Roof(0.2, 150, 1000)}
    measured = step.Measured(case, timings, roofs)
    assert [measured.over_bare(name).median for name in measured.names] == [1, 0.5, 2, 1, 4, 2]
    assert [measured.over_bare_of_role(name).median for name in measured.names] == [1, 1, 2, 2, 4, 4]
    over_patriarch = [measured.over_patriarch(name) for name in measured.names]
    assert [ratio and ratio.median for ratio in over_patriarch] == [None, 0.5, None, 0.5, None, 0.5]
    assert measured.images_per_second("eager student") == 20
    assert measured.roof("timm student").mfu(measured.seconds("timm student")) == pytest.approx(0.15)
    assert measured.roof("eager patriarch").share_of_roofline(0.25) == pytest.approx(0.4)


def test_the_roof_of_a_student_holds_its_teacher():
    case, _ = rigs.case_of("resnet20", 8, "bf16", CPU, None, groups=1)
    rates = common.Spread(1e9, 1e9, 1e9), {"bf16": common.Spread(1e11, 1e11, 1e11)}
    ceilings_ = ceilings.Ceilings(*rates, common.Spread(0, 0, 0), None, None, None, None, ceilings.SIZES["cpu"], 1)
    patriarch, student = (step.roof_of(case, ceilings_, teacher=teacher) for teacher in (False, True))
    # Forward and backward, and another forward pass; the stem passes no gradient on.
    assert student.flops / patriarch.flops == pytest.approx(4 / 3, rel=0.01)
    assert patriarch.flops == pytest.approx(8 * 3 * 2 * 41e6, rel=0.03)
    assert student.floor_seconds > patriarch.floor_seconds > patriarch.flops / 1e11


@pytest.mark.parametrize("module", [step, gpu_check, queue])
@pytest.mark.parametrize("word", ["--wrong=1", "--minutes=soon", "--rounds=0"])
def test_a_wrong_argument_is_one_line(module, word, capsys):
    assert command(module.main, [word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def _gpu_check(tmp_path, *parts):
    words = ["--device=cpu", "--seed=3", f"--results={tmp_path}", *(f"--only={part}" for part in parts)]
    return command(gpu_check.main, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_measures_nothing_without_a_gpu(capsys):
    assert command(gpu_check.main, []) == 0
    assert capsys.readouterr().out == "not measured (no GPU)\n"


def test_gpu_check_passes_on_the_cpu(tmp_path, small_layouts, capsys):
    code = _gpu_check(tmp_path)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "FAIL" not in out
    for part in gpu_check.PARTS:
        assert f"      {part}: " in out
    rows = common.read_rows(tmp_path / "step.csv")
    of_trainer = ["eager patriarch", "compile patriarch", "eager student", "compile student"]
    of_baselines = [
        name
        for name in baselines.BASELINES
        if name not in baselines.missing(rigs.Case("resnet8", 16, "fp32", None, None, CPU))
    ]
    assert [row["candidate"] for row in rows] == [*of_baselines, *of_trainer]
    assert {"bare", "bare student", "bare compile"} <= {*of_baselines}
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert all(0 < float(row["mfu"]) < 1.5 for row in rows)
    checks_ = {row["tag"]: row["passed"] for row in common.read_rows(tmp_path / "checks.csv")}
    assert set(checks_.values()) == {"True"}
    assert verdicts.needed(rigs.Way("eager"), "fp32") | verdicts.needed(rigs.Way("graph"), "fp32") <= {*checks_}
    # Small checks allow nothing.
    assert "benchmarks.queue runs steps in fp32 by what their recipe says" in out


@pytest.mark.parametrize("name", ["tolerant", "distill"])
def test_gpu_check_notices_a_wrong_loss(name, tmp_path, monkeypatch, capsys):
    right = getattr(losses, name)
    monkeypatch.setattr(losses, name, lambda *words: 1.001 * right(*words))
    assert _gpu_check(tmp_path, "losses") == 1
    out = capsys.readouterr().out
    assert f"FAIL  loss {name}, fp32, random" in out
    assert f"FAIL  gradient {name}, fp32, random" in out


def test_gpu_check_notices_a_wrong_view_and_a_broken_part(tmp_path, monkeypatch, capsys):
    from fastgen.data import resident

    right = resident.crop_and_flip
    monkeypatch.setattr(resident, "crop_and_flip", lambda *words: right(*words).flip(3))
    monkeypatch.setattr(checks, "make_teacher", lambda *words, **options: 1 / 0)
    assert _gpu_check(tmp_path, "views", "teacher", "init") == 1
    captured = capsys.readouterr()
    assert "FAIL  views: differing pixels" in captured.out
    assert "FAIL  teacher: broke off" in captured.out
    assert "ZeroDivisionError" in captured.out
    assert "PASS  initial weights" in captured.out
    assert captured.err.count("\n") == 1


def test_resuming_is_checked_in_this_process_however_many_gpus_there_are(monkeypatch):
    # It counts the steps in here; processes of a launcher would never be stopped.
    recipe = load_text(checks_training._resume_recipe("resnet8"), "resume.yaml")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert processes_wanted(recipe) == 1


def test_not_a_number_does_not_pass():
    outcomes = [checks.Outcome("a", 1.0, 2.0), checks.Outcome("b", float("nan"), 2.0), checks.Outcome("c", 3.0, 2.0)]
    assert checks.worst(outcomes).name == "b"
    assert [outcome.passed for outcome in outcomes] == [True, False, False]


def _queue(tmp_path, out, minutes):
    words = [f"--queue={tmp_path / 'queue.yaml'}", f"--out={tmp_path / out}", f"--results={tmp_path / out / 'rows'}"]
    return command(queue.main, [*words, f"--data.root={tmp_path}", f"--minutes={minutes}"])


def _states(tmp_path, out, capfd):
    capfd.readouterr()
    words = [f"--queue={tmp_path / 'queue.yaml'}", f"--out={tmp_path / out}", f"--data.root={tmp_path}", "--list"]
    assert command(queue.main, words) == 0
    return [line.split(maxsplit=1)[1] for line in capfd.readouterr().out.splitlines()]


def _clock_that_runs_out(events, generation):
    """Stands in for `time`: no time is left as soon as a run has told of a step of that generation."""

    def monotonic():
        told = events.read_text() if events.exists() else ""
        rows = [json.loads(line) for line in told[: told.rfind("\n") + 1].splitlines()]
        begun = any(row["event"] == "step" and row["generation"] == generation for row in rows)
        return math.inf if begun else 0.0

    return SimpleNamespace(monotonic=monotonic, sleep=time.sleep)


def test_pieces_of_the_queue_add_up(tmp_path, capfd, monkeypatch):
    pytest.importorskip("sklearn")
    # Some seconds a generation: long after its first step is told, a signal still finds it at work.
    tree = tiny_recipe(train__epochs=20, train__batch_size=32, gen__generations=GENERATIONS)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    entries = [
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0},
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 1, "overrides": {"train.epochs": 1, "gen.generations": 0}},
    ]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(entries))
    assert _states(tmp_path, "pieces", capfd) == ["not begun", "not begun"]

    for generation in range(GENERATIONS + 1):
        events = tmp_path / "pieces" / "tiny-seed0" / "events.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(queue, "time", _clock_that_runs_out(events, generation))
            assert _queue(tmp_path, "pieces", 5) == 0
        first, second = _states(tmp_path, "pieces", capfd)
        assert re.fullmatch(rf"generation {generation} step [1-9]\d*", first)
        assert second == "not begun"
    assert _queue(tmp_path, "pieces", 5) == 0
    assert _states(tmp_path, "pieces", capfd) == ["done", "done"]

    rows = common.read_rows(tmp_path / "pieces" / "rows" / "queue.csv")
    assert [(row["seed"], row["generation"]) for row in rows] == [
        ("0", "0"), ("0", "1"), ("0", "2"), ("1", "0"),
    ]  # fmt: skip
    assert all(row["engine"] == "eager" and row["torch"] and float(row["top1_error_percent"]) < 100 for row in rows)
    # Called again, it adds no row; where a kill came before the rows were written, it adds them.
    assert _queue(tmp_path, "pieces", 1) == 0
    assert common.read_rows(tmp_path / "pieces" / "rows" / "queue.csv") == rows
    (tmp_path / "pieces" / "rows" / "queue.csv").unlink()
    assert _queue(tmp_path, "pieces", 1) == 0
    assert common.read_rows(tmp_path / "pieces" / "rows" / "queue.csv") == rows

    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(entries[:1]))
    assert _queue(tmp_path, "whole", 5) == 0
    for generation in range(GENERATIONS + 1):
        weights = f"tiny-seed0/generation_{generation}/model.safetensors"
        ours, theirs = (read_weights(tmp_path / out / weights)[0] for out in ("pieces", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_failing_entry_does_not_hold_the_others_up(tmp_path, capfd):
    pytest.importorskip("sklearn")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(gen__generations=0, train__batch_size=256)))
    entries = [
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0, "overrides": {"train.lr": 1e30}},
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0},
    ]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(entries))
    assert _queue(tmp_path, "out", 5) == 1
    captured = capfd.readouterr()
    assert "FAILED with exit code 1" in captured.out
    assert "1 of 2 entries are done" in captured.out
    assert [row["seed"] for row in common.read_rows(tmp_path / "out" / "rows" / "queue.csv")] == ["0"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{a: 1}", "must be a list"),
        ("- {recipe: a.yaml}", "must have recipe and seed"),
        ("- {recipe: a.yaml, seed: 0, sed: 1}", "must have recipe and seed"),
        ("- {recipe: a.yaml, seed: x}", "seed an integer"),
        ("- {recipe: a.yaml, seed: 0}\n- {recipe: a.yaml, seed: 0}", "stands twice"),
        ("- [", "not valid YAML"),
    ],
)
def test_a_wrong_list_is_told(text, told, tmp_path):
    (tmp_path / "queue.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        queue.read_queue(tmp_path / "queue.yaml")


def test_the_committed_list_is_readable():
    entries = queue.read_queue(queue.QUEUE)
    assert [entry.name.rpartition("-")[0] for entry in entries[:3]] == [
        "c100_r20_gen-seed0", "c100_r20_ban-seed0", "c100_r20_baseline-seed0",
    ]  # fmt: skip
    assert all((common.ROOT / entry.recipe).exists() for entry in entries)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_check_passes_on_a_gpu(tmp_path):
    assert command(gpu_check.main, [f"--results={tmp_path}"]) == 0
