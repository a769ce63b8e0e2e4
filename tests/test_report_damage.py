"""fastgen.report on run folders whose files are JSON of another form: one line, or a report that says what it lacks."""

from __future__ import annotations

import json

import pytest
from report_runs import copied, edit

from fastgen.analysis_runs import read_analysis, read_run
from fastgen.errors import UserError
from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import plain
from fastgen.report.runs import read_runs

LAST = "generations", -1


@pytest.fixture
def run(report_runs, tmp_path):
    """A run with an analysis, to be damaged."""
    return copied(report_runs, tmp_path / "x", "tolerant_0") / "tolerant_0"


def put_at(path, place, value):
    """Puts a value into a JSON file; `...` takes away what is there."""

    def change(content):
        *way, last = place
        for key in way:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    edit(path, change)


def missing_of(run):
    """What a report says is missing."""
    document = report_of(read_runs([run]), Wanted(None, 0, None))
    section = [section for section in document.sections if section.name == "missing"]
    return [plain(item) for found in section for block in found.blocks for item in block.items], document


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["generations"], [1]),
        (["generations"], [{}]),
        (["generations"], "all"),
        (["train_images"], "x"),
        (["model"], None),
        ([*LAST, "top1_error"], "abc"),
        ([*LAST, "top1_error"], None),
        ([*LAST, "top5_error"], float("nan")),
        ([*LAST, "nll"], float("inf")),
        ([*LAST, "nll"], 10**400),
        ([*LAST, "ensemble_top1_error"], "abc"),
        ([*LAST, "generation"], "1"),
        ([*LAST, "generation"], 0),
        ([*LAST, "samples_evaluated"], None),
        ([*LAST, "path"], None),
        ([*LAST, "node"], ["a"]),
    ],
)
def test_results_of_another_form_are_damaged(run, place, value):
    put_at(run / "results.json", place, value)
    with pytest.raises(UserError, match=r"results\.json: is damaged"):
        read_runs([run])


def test_what_older_results_lack_is_no_damage(run):
    for name in ("nll", "path", "processes", "ideal_confidence_at_share"):
        put_at(run / "results.json", [*LAST, name], ...)
    assert missing_of(run)[0]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ([], {}),
        ([], {"format": 1}),
        (["second_best"], ...),
        (["second_best"], []),
        (["second_best", 0, "counts"], [[1, 2], [3]]),
        (["second_best", 0, "frequent", 0], [[99, 1]]),
        (["ensembles"], ...),
        (["ensembles", "all"], {}),
        (["ensembles", "last_members_top1_error"], []),
        (["generations", 0, "training"], None),
        (["generations", 0, "training", "sorted_scores"], ...),
        (["generations", 0, "training", "sorted_scores"], []),
        (["generations", 0, "generation"], 7),
        (["generations", 0, "evaluation", "reliability", "accuracy"], []),
        (["class_names"], ["a"]),
        (["class_names", 3], 2.5),
        (["second_best", 0, "counts", 0, 1], -5),
        (["groups"], {"of_class": [0]}),
        (["evaluated_on"], "test"),
    ],
)
def test_an_analysis_of_another_form_counts_as_none(run, place, value):
    assert read_analysis(read_run(run)) is not None
    if place:
        put_at(run / "analysis.json", place, value)
    else:
        (run / "analysis.json").write_text(json.dumps(value))
    lines, document = missing_of(run)
    assert "tolerant_0: analysis.json is not of these networks and samples, or damaged, and is left out." in lines
    assert not {"scores", "reliability"} & {figure.name for figure in document.figures()}


@pytest.mark.parametrize(
    "content", [None, "not json", "{}", '{"device": "x", "command": null, "packages": {}, "commit": null}',
                '{"device": "x", "command": [], "packages": [1], "commit": null}',
                '{"device": "x", "command": [], "packages": {}, "commit": 5}'],
)  # fmt: skip
def test_without_an_environment_the_machine_is_not_told(run, content):
    (run / "environment.json").unlink()
    if content is not None:
        (run / "environment.json").write_text(content)
    lines, document = missing_of(run)
    expected = "environment.json is damaged or not there: its machine and command are not told."
    assert f"tolerant_0: {expected}" in lines
    table = next(table for table in document.tables() if table.name == "runs")
    assert [cell.text for cell in table.rows[0][3:]] == ["–"] * 7


NODES = ["not json", "{}", '{"training": null}', '{"training": {"history": [{"loss": 1}]}}']


@pytest.mark.parametrize("content", NODES)
def test_without_a_node_s_history_curves_come_from_the_events(run, content):
    before = read_runs([run]).runs[0].histories[1]
    (run / "generation_1").unlink()
    (run / "generation_1").mkdir()
    (run / "generation_1" / "node.json").write_text(content)
    found = read_runs([run]).runs[0]
    after = found.histories[1]
    assert found.unfit == ("node.json of generation 1 is damaged: its training curve is from events.jsonl",)
    assert [(row["epoch"], row["loss"], row["top1_error"]) for row in after] == [
        (row["epoch"], row["loss"], row["top1_error"]) for row in before
    ]


def test_a_node_that_is_gone_is_no_damage(run):
    before = read_runs([run]).runs[0].histories[1]
    (run / "generation_1").unlink()
    found = read_runs([run]).runs[0]
    assert found.unfit == ()
    assert [row["loss"] for row in found.histories[1]] == [row["loss"] for row in before]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("1\n[]\n{}\n", ""),
        ('{"event": "stopped"}\n', " (stopped)"),
        ('{"event": "stopped", "reason": "by\\nhand"}\n{"event": 5}\n', " (by hand)"),
        ('{"event": "step"}\n', ""),
        ('{"event": "step", "generation": 1, "step": 7}\n', " (last heard of in generation 1, step 7)"),
        ('{"event": "epoch", "generation": 1}\n', ""),
    ],
)
def test_events_of_another_form_are_left_out(run, lines, expected):
    (run / "events.jsonl").write_text(lines)
    edit(run / "results.json", lambda results: results["generations"].pop() and None)
    (run / "generation_0").unlink()
    found = read_runs([run]).runs[0]
    assert found.histories == {0: []}
    assert found.lacking == f"generation 1 of 0 to 1 is not trained and measured yet{expected}"


def test_what_nobody_thought_of_names_the_folder(run, monkeypatch):
    monkeypatch.setattr("fastgen.report.runs._lacking", lambda record, planned: {}["nobody thought of it"])
    with pytest.raises(UserError, match=r"tolerant_0: a file of it is damaged \(KeyError\('nobody thought of it'\)\)"):
        read_runs([run])
