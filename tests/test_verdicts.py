"""Which way to run a step may be used: one that has passed all that concerns it, the fastest of them."""

from dataclasses import replace

import pytest
import torch
import yaml

from benchmarks import queue, verdicts
from benchmarks.checks import Outcome
from benchmarks.common import Timings, append_rows
from benchmarks.rigs import Way, timed_ways
from fastgen.recipe import dump

CPU = torch.device("cpu")
EAGER, COMPILE, GRAPH = Way("eager"), Way("compile"), Way("graph")
FUSED = Way("graph", "triton", "triton")


def all_checks(way, precision="bf16"):
    return [Outcome(tag, 0, 1, of=tag) for tag in sorted(verdicts.needed(way, precision))]


@pytest.mark.parametrize("way", [EAGER, COMPILE, GRAPH, Way("eager", "triton"), FUSED], ids=lambda way: way.name)
def test_a_way_needs_every_check_that_concerns_it(way):
    checks = all_checks(way)
    assert len(checks) == 2 + (way != EAGER) + (way.kernels == "triton") + (way.batchnorm == "triton")
    assert verdicts.has_passed(way, "bf16", checks)
    assert not verdicts.has_passed(way, "fp16", checks)
    for number, check in enumerate(checks):
        others = checks[:number] + checks[number + 1 :]
        assert not verdicts.has_passed(way, "bf16", others), "a check did not take place"
        assert not verdicts.has_passed(way, "bf16", [*others, replace(check, error=2)]), "a check failed"
        assert not verdicts.has_passed(way, "bf16", [*checks, replace(check, error=float("nan"))])


def test_what_fails_for_others_is_no_fault_of_a_way():
    failed = Outcome("batchnorm", 2, 1, of=verdicts.BATCHNORM)
    assert verdicts.has_passed(GRAPH, "bf16", [*all_checks(GRAPH), failed])
    assert not verdicts.has_passed(FUSED, "bf16", [*all_checks(FUSED), failed])
    # What is of nobody in particular is of all.
    assert not verdicts.has_passed(GRAPH, "bf16", [*all_checks(GRAPH), Outcome("views", 2, 1)])


ROLES = ("patriarch", "student")


def rows(checks, seconds, size="full"):
    timings = Timings({f"{way.name} {role}": (seconds[way],) for way in timed_ways(CPU) for role in ROLES})
    return verdicts.verdict_rows(checks, {"bf16": timings}, CPU, size)


def test_the_fastest_that_passed_last_is_taken(tmp_path):
    path, both = tmp_path / verdicts.FILE, all_checks(EAGER) + all_checks(COMPILE)
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None
    append_rows(path, rows(both, {EAGER: 2.0, COMPILE: 1.0}, size="small"))
    assert verdicts.fastest(tmp_path, CPU, "bf16") is None
    append_rows(path, rows(both, {EAGER: 2.0, COMPILE: 1.0}))
    assert verdicts.fastest(tmp_path, CPU, "bf16") == COMPILE
    assert verdicts.fastest(tmp_path, CPU, "fp32") is None
    append_rows(path, rows(both, {EAGER: 0.5, COMPILE: 1.0}))
    assert verdicts.fastest(tmp_path, CPU, "bf16") == EAGER
    append_rows(path, rows(all_checks(COMPILE), {EAGER: 0.5, COMPILE: 1.0}))
    assert verdicts.fastest(tmp_path, CPU, "bf16") == COMPILE
    # Another machine's, or another torch's, says nothing here.
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
    append_rows(tmp_path / verdicts.FILE, rows(all_checks(COMPILE), {EAGER: 2.0, COMPILE: 1.0}))
    assert engines() == ["compile", "graph"]
    begun = experiments()[0]
    append_rows(tmp_path / verdicts.FILE, rows(all_checks(EAGER), {EAGER: 0.5, COMPILE: 1.0}))
    assert engines() == ["eager", "graph"]
    begun.folder.mkdir(parents=True)
    (begun.folder / "recipe.yaml").write_text(dump(begun.recipe))
    assert engines() == ["compile", "graph"]
    # What the entry says itself stands above all.
    assert queue.way_of(begun.folder / "recipe.yaml") == COMPILE
