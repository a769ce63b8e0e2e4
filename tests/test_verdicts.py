"""Which way to run a step may be used: one that has passed all that concerns it, the fastest of them."""

from dataclasses import replace

import pytest
import torch
import yaml

from benchmarks import queue, verdicts
from benchmarks.checks import Outcome
from benchmarks.common import append_rows, machine_facts
from benchmarks.rigs import Way
from fastgen.errors import command
from fastgen.recipe import dump

CPU = torch.device("cpu")
EAGER, COMPILE, GRAPH = Way("eager"), Way("compile"), Way("graph")
FUSED = Way("graph", "triton", "triton")


def all_checks(way, precision="bf16"):
    return [Outcome(tag, 0, 1, of=tag) for tag in sorted(verdicts.needed(way, precision))]


def tell(folder, checks, size="full"):
    append_rows(folder / verdicts.FILE, verdicts.check_rows(checks, CPU, size))


def time_steps(folder, seconds, model="resnet20"):
    rows = [
        {**machine_facts(CPU), "model": model, "precision": "bf16", "candidate": f"{way.name} {role}",
         "ms_per_step_median": value}
        for way, value in seconds.items()
        for role in ("patriarch", "student")
    ]  # fmt: skip
    append_rows(folder / "step.csv", rows)


@pytest.mark.parametrize("way", [EAGER, COMPILE], ids=lambda way: way.name)
def test_a_way_needs_every_check_that_concerns_it(way, tmp_path):
    checks = all_checks(way)
    assert len(checks) == len(verdicts.OF_ALL) + 2 + (way != EAGER)
    time_steps(tmp_path, {EAGER: 2.0, COMPILE: 1.0})
    tell(tmp_path, checks)
    assert verdicts.fastest(tmp_path, CPU, "bf16") == way
    assert verdicts.fastest(tmp_path, CPU, "fp16") is None
    for number, check in enumerate(checks):
        for folder, found in (
            ("missing", checks[:number] + checks[number + 1 :]),
            ("failed", [*checks, replace(check, error=2)]),
            ("nan", [*checks, replace(check, error=float("nan"))]),
        ):
            place = tmp_path / f"{folder}{number}"
            time_steps(place, {EAGER: 2.0, COMPILE: 1.0})
            tell(place, found)
            assert verdicts.fastest(place, CPU, "bf16") is None, (folder, check)


def test_kernels_and_graphs_need_theirs():
    assert verdicts.needed(FUSED, "bf16") - verdicts.needed(GRAPH, "bf16") == {
        "kernels", "batchnorm", "graph+kernels+batchnorm bf16 learns", "graph+kernels+batchnorm bf16 resumes",
        "graph+kernels+batchnorm agrees",
    }  # fmt: skip
    assert "batchnorm" not in verdicts.needed(Way("eager", "triton"), "bf16")


def test_checks_of_several_sessions_add_up_and_the_last_counts(tmp_path):
    checks = all_checks(EAGER)
    time_steps(tmp_path, {EAGER: 2.0})
    tell(tmp_path, checks[:3])
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None
    tell(tmp_path, checks[3:])
    assert verdicts.fastest(tmp_path, CPU, "bf16") == EAGER
    tell(tmp_path, [replace(checks[0], error=2)])
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None
    tell(tmp_path, [replace(checks[0], error=0.5)])
    assert verdicts.fastest(tmp_path, CPU, "bf16") == EAGER


def test_the_fastest_of_those_that_passed_is_taken(tmp_path):
    tell(tmp_path, all_checks(EAGER) + all_checks(COMPILE), size="small")
    time_steps(tmp_path, {EAGER: 2.0, COMPILE: 1.0})
    time_steps(tmp_path, {EAGER: 0.1, COMPILE: 9.0}, model="resnet8")
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None
    tell(tmp_path, all_checks(EAGER) + all_checks(COMPILE))
    assert verdicts.fastest(tmp_path, CPU, "bf16") == COMPILE
    time_steps(tmp_path, {EAGER: 0.5, COMPILE: 1.0})
    assert verdicts.fastest(tmp_path, CPU, "bf16") == EAGER
    # Another machine's, or another torch's, says nothing here.
    path = tmp_path / verdicts.FILE
    path.write_text(path.read_text().replace(torch.__version__, "0.1"))
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None


def test_the_queue_takes_it_and_keeps_to_what_was_begun(tmp_path, write_recipe):
    write_recipe()
    entries = [
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0, "overrides": {"train.precision": "bf16"}},
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0, "overrides": {"train.engine": "graph"}},
    ]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(entries))

    def experiments():
        words = [f"--queue={tmp_path / 'queue.yaml'}", f"--out={tmp_path / 'out'}", f"--results={tmp_path}"]
        arguments = queue._parse([*words, f"--data.root={tmp_path}"])
        return [queue._experiment(entry, arguments) for entry in queue.read_queue(arguments.queue)]

    def engines():
        return [experiment.recipe.train.engine for experiment in experiments()]

    assert engines() == ["eager", "graph"]
    tell(tmp_path, all_checks(EAGER) + all_checks(COMPILE))
    time_steps(tmp_path, {EAGER: 2.0, COMPILE: 1.0})
    assert engines() == ["compile", "graph"]
    begun = experiments()[0]
    time_steps(tmp_path, {EAGER: 0.5, COMPILE: 1.0})
    assert engines() == ["eager", "graph"]
    begun.folder.mkdir(parents=True)
    (begun.folder / "recipe.yaml").write_text(dump(begun.recipe))
    assert engines() == ["compile", "graph"]
    # What the entry says itself stands above all.
    assert queue.way_of(begun.folder / "recipe.yaml") == COMPILE


def test_a_way_that_an_entry_cannot_take_is_told(tmp_path, write_recipe, monkeypatch, capsys):
    write_recipe()
    overrides = {"train.precision": "bf16", "teacher.look_ahead_batches": 3}
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([
        {"recipe": str(tmp_path / "tiny.yaml"), "seed": 0, "overrides": overrides},
    ]))  # fmt: skip
    monkeypatch.setattr(queue, "fastest", lambda *_: GRAPH)
    words = [f"--queue={tmp_path / 'queue.yaml'}", f"--out={tmp_path / 'out'}", f"--data.root={tmp_path}", "--list"]
    assert command(queue.main, words) == 0
    out = capsys.readouterr().out
    assert "not by graph (teacher.look_ahead_batches = 3" in out
    assert "not begun" in out
