"""fastgen.report where seeds do not pair, or generations are not there of all runs; and the commands it names."""

from __future__ import annotations

import json
import shlex
import statistics

import pytest
from report_runs import copied, edit

from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import Paragraph, plain, words
from fastgen.report.files import markdown
from fastgen.report.runs import read_runs

TOLERANT, PLAIN = "tolerant D(0.6, 0.6)", "plain D(1.0, 0.0)"


def document_of(folder, *runs):
    return report_of(read_runs([folder / name for name in runs] or [folder]), Wanted(None, 0, None))


def lines_of(document, name="missing"):
    """Points of a section."""
    found = [section for section in document.sections if section.name == name]
    return [plain(item) for section in found for block in section.blocks for item in block.items]


def cut(run):
    """Takes the last generation away."""
    edit(run / "results.json", lambda results: results["generations"].pop() and None)


def errors_of(folder, *runs):
    rows = [json.loads((folder / run / "results.json").read_text())["generations"][1] for run in runs]
    values = [row["top1_error"] for row in rows]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def test_seeds_that_do_not_pair_are_told(report_runs):
    document = document_of(report_runs, "tolerant_1", "tolerant_2", "plain_0")
    assert plain(document.headline) == "Nothing to compare: no seed has generation 1 of both recipes."
    assert f"{TOLERANT}: seeds 1, 2 have no run of {PLAIN}." in lines_of(document)
    one = lines_of(document_of(report_runs, "tolerant_0", "tolerant_1", "plain_0"))
    assert f"{TOLERANT}: seed 1 has no run of {PLAIN}." in one


def test_a_last_generation_that_does_not_pair_is_told(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "tolerant_1", "plain_0", "plain_1")
    cut(here / "tolerant_0")
    cut(here / "plain_1")
    assert plain(document_of(here).headline) == "Nothing to compare: no seed has generation 1 of both recipes."
    cut(here / "plain_0")
    assert "no student stands beside a network of the baseline" in plain(document_of(here).headline)


def test_means_beside_a_difference_are_of_its_pairs(report_runs):
    document = document_of(report_runs, "tolerant_0", "tolerant_1", "plain_1", "plain_2", "plain_0")
    own, other = errors_of(report_runs, "tolerant_0", "tolerant_1"), errors_of(report_runs, "plain_0", "plain_1")
    told = plain(document.details[0])
    assert told.startswith(f"{TOLERANT}, generation 1: {own} % top-1 error, {PLAIN} {other} %: ")
    assert " over 2 pairs, as are the means (" in told
    assert "as are the means" not in plain(document_of(report_runs, "tolerant_0", "plain_0").details[0])


def test_only_seeds_that_have_a_generation_are_counted(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "plain_0", "plain_1", "plain_2")
    for name in ("plain_1", "plain_2"):
        cut(here / name)
    document = document_of(here)
    assert plain(document.details[0]).endswith("% (1 seed).")
    figure = next(figure for figure in document.figures() if figure.name == "training-0")
    assert f"{PLAIN}: means over 3 seeds (generation 1: 1), epoch by epoch." in plain(figure.caption)


def test_commands_of_the_analysis_are_one_a_recipe(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "a $b `c`", "plain_0", "tolerant_1")
    document = document_of(here)
    commands = [shlex.join(["python", "-m", "fastgen.evaluate", str(here / name), "--analyse"])
                for name in ("plain_0", "tolerant_1")]  # fmt: skip
    left_out = [block for block in document.blocks() if isinstance(block, Paragraph) and len(block.words) > 1]
    for words_ in (left_out[0].words, left_out[1].words, document.sections[0].blocks[0].items[-1]):
        assert [span.text for span in words_ if span.style == "code"] == commands
        assert ", ".join(commands) in plain(words_)
    # A span in more backticks than it has in a row.
    assert f"`` {commands[0]} ``" in markdown(document)


@pytest.mark.parametrize(("text", "fence"), [("a", "```"), ("a ``` b", "````")])
def test_a_fence_is_longer_than_what_it_holds(text, fence):
    from fastgen.report.document import Code, Document, Section

    told = markdown(Document("t", "f", words("h"), (), (Section("s", "S", (Code("c", text),)),)))
    assert f"\n{fence}\n{text}\n{fence}\n" in told
