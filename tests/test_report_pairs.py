"""fastgen.report where seeds do not pair, or generations are not there of all runs; and the commands it names."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics

import pytest
import yaml
from report_runs import copied, edit, set_errors, with_settings

from fastgen.errors import command
from fastgen.report.__main__ import main
from fastgen.report.compare import compare
from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import Paragraph, plain, words
from fastgen.report.files import markdown
from fastgen.report.groups import groups_of
from fastgen.report.runs import read_runs
from fastgen.report.tables import COMPARED

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
    assert plain(document.headline) == "Nothing to compare yet: no seed has generation 1 of both recipes."
    assert f"{TOLERANT}: seeds 1, 2 have no run of {PLAIN}." in lines_of(document)
    one = lines_of(document_of(report_runs, "tolerant_0", "tolerant_1", "plain_0"))
    assert f"{TOLERANT}: seed 1 has no run of {PLAIN}." in one


def test_a_last_generation_that_does_not_pair_is_told(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "tolerant_1", "plain_0", "plain_1")
    cut(here / "tolerant_0")
    cut(here / "plain_1")
    assert plain(document_of(here).headline) == "Nothing to compare yet: no seed has generation 1 of both recipes."
    cut(here / "plain_0")
    # What is tested is what is planned, not what happens to be measured.
    assert plain(document_of(here).headline) == "Nothing to compare yet: no seed has generation 1 of both recipes."


def cut_from_plan(run):
    """Makes it a run that was to have its patriarch alone."""
    cut(run)
    edit(run / "plan.json", lambda plan: plan.pop() and None)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["gen"]["generations"] = 0
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def comparison_of(folder):
    return compare(groups_of(read_runs([folder]).runs), tuple(COMPARED))


SEEDS = (0, 1, 2)
TOLERANTS, PLAINS = ([f"{kind}_{seed}" for seed in SEEDS] for kind in ("tolerant", "plain"))


def test_networks_without_a_common_seed_are_not_the_same(report_runs, tmp_path):
    comparison = comparison_of(copied(report_runs, tmp_path / "x", "tolerant_1", "tolerant_2", "plain_0"))
    assert comparison.contrasts
    assert not any(contrast.same_networks for contrast in comparison.contrasts)
    # Seeds that have generation 0 in common and generation 1 not.
    here = copied(report_runs, tmp_path / "y", "tolerant_0", "tolerant_1", "plain_0", "plain_1")
    cut(here / "tolerant_1")
    cut(here / "plain_0")
    assert not any(contrast.same_networks for contrast in comparison_of(here).contrasts)


def test_the_baseline_is_the_one_that_has_students(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *TOLERANTS, *PLAINS)
    for seed in SEEDS:
        # They come first.
        shutil.copytree(here / f"plain_{seed}", here / f"a_plain_{seed}", symlinks=True)
        cut_from_plan(here / f"a_plain_{seed}")
    comparison = comparison_of(here)
    assert {baseline.settings["gen.generations"] for baseline in comparison.baseline_of.values()} == {1}
    assert [(contrast.generation, contrast.difference.pairs) for contrast in comparison.tested] == [(1, 3), (1, 3)]


def test_patriarchs_are_not_the_result_of_a_run_under_way(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *TOLERANTS, *PLAINS)
    for name in (*TOLERANTS, *PLAINS):
        cut(here / name)
    assert comparison_of(here).tested == []
    assert plain(document_of(here).headline) == "Nothing to compare yet: no seed has generation 1 of both recipes."
    alone = copied(report_runs, tmp_path / "y", *TOLERANTS)
    for name in TOLERANTS:
        cut(alone / name)
    assert plain(document_of(alone).headline).endswith("; nothing is given to compare it with.")


def test_patriarchs_alone_are_tested_once(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *TOLERANTS, *PLAINS)
    for name in (*TOLERANTS, *PLAINS):
        cut_from_plan(here / name)
    # The ensemble of generation 0 is the network itself.
    assert [(c.generation, c.measure) for c in comparison_of(here).tested] == [(0, "top1_error")]


def test_students_are_missing_where_the_baseline_is_to_have_none(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *TOLERANTS, *PLAINS)
    for name in PLAINS:
        cut_from_plan(here / name)
    assert "no student stands beside a network of the baseline" in plain(document_of(here).headline)


def test_an_ensemble_beside_its_patriarch_may_be_the_headline(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *TOLERANTS)
    for seed, name in enumerate(TOLERANTS):
        set_errors(here / name, 0, top1_error=30.0 + seed, ensemble_top1_error=30.0 + seed)
        set_errors(here / name, 1, top1_error=30.0 + 2 * seed, ensemble_top1_error=25.0 + 1.01 * seed)
    headline = plain(document_of(here).headline)
    assert headline.startswith(f"The ensemble of 0 to 1 of {TOLERANT} makes fewer errors than its patriarch: −4.99")


def test_what_the_headline_tells_stands_first_with_its_test_and_its_cautions(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *PLAINS)
    for seed in SEEDS:
        set_errors(here / f"plain_{seed}", 1, top1_error=30.0 + seed, ensemble_top1_error=30.0 + seed)
        for n, epochs in enumerate((2, 2, 2, 2, 2, 7)):
            # Of the last recipe alone, differences are far from 0 and alike.
            own = 20.0 + seed + 0.01 * seed if epochs == 7 else 30.0 + (seed * n) % 3
            settings = {"gen__teacher_weight": 0.3 + n / 10, "train__epochs": epochs}
            with_settings(report_runs / f"tolerant_{seed}", here / f"t{n}_{seed}", own, **settings)
    document = document_of(here)
    assert "tolerant D(0.6, 0.8), epochs=7 makes fewer errors" in plain(document.headline)
    lines = [plain(line) for line in document.details]
    assert lines[0].startswith("tolerant D(0.6, 0.8), epochs=7, generation 1: ")
    assert "over 3 pairs (p < 0.0001, told apart)" in lines[0]
    assert (
        "tolerant D(0.6, 0.8), epochs=7 and plain D(1.0, 0.0), epochs=2 differ in more than the method: train.epochs."
        in lines
    )
    assert "The tests of 6 more are in the tables." in lines
    table = next(table for table in document.tables() if table.name == "tests")
    assert len(table.rows) == 12


def test_settings_without_a_say_tell_nothing(report_runs, tmp_path):
    here = tmp_path / "x"
    here.mkdir()
    with_settings(report_runs / "tolerant_0", here / "tolerant", gen__k=3)
    # Plain training has no use for K, nor, without students, for a teacher's weight.
    with_settings(report_runs / "plain_0", here / "plain", gen__k=5)
    document = document_of(here)
    assert [group.name for group in groups_of(read_runs([here]).runs)] == [PLAIN, TOLERANT]
    assert not any("differ in more than the method" in plain(line) for line in document.details)
    cut_from_plan(here / "plain")
    with_settings(here / "plain", tmp_path / "y" / "plain", gen__teacher_weight=0.6)
    assert [group.name for group in groups_of(read_runs([tmp_path / "y"]).runs)] == [PLAIN]


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


def test_what_is_off_by_default_goes_without_saying(report_runs, tmp_path):
    here = tmp_path / "x"
    here.mkdir()
    with_settings(report_runs / "tolerant_0", here / "one")
    with_settings(report_runs / "tolerant_0", here / "two", gen__ensemble_teachers=2)
    with_settings(report_runs / "tolerant_0", here / "warm", gen__temperature=2.0)
    assert [group.name for group in groups_of(read_runs([here]).runs)] == [
        f"{TOLERANT}, temperature=1", f"{TOLERANT}, temperature=1, ensemble_teachers=2", f"{TOLERANT}, temperature=2",
    ]  # fmt: skip


def test_a_baseline_that_is_named_is_what_others_are_compared_with(report_runs, tmp_path, capfd):
    runs = [str(report_runs / name) for name in (*TOLERANTS, *PLAINS)]
    words_ = [*runs, "--samples=0", f"--to={tmp_path / 'report'}"]
    assert command(main, [*words_, f"--baseline={report_runs / 'tolerant_1'}"]) == 0
    told = (tmp_path / "report" / "report.md").read_text()
    assert f"Difference to the same generation of {TOLERANT}" in told
    values = [statistics.mean(float(errors_of(report_runs, run)) for run in names) for names in (PLAINS, TOLERANTS)]
    row = next(line for line in told.splitlines() if line.startswith(f"| {PLAIN} | {TOLERANT} | top-1, single"))
    assert float(row.split("|")[5].split("±")[0].strip(" *").replace("−", "-")) == pytest.approx(
        values[0] - values[1], abs=0.02
    )
    capfd.readouterr()
    assert command(main, [*words_, f"--baseline={tmp_path}"]) == 2
    assert "is none of the runs that are measured: name one of them" in capfd.readouterr().err
    assert command(main, [*runs[:3], "--samples=0", f"--to={tmp_path / 'other'}", f"--baseline={runs[0]}"]) == 2
    assert "there is no other recipe to compare with it" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_unlike_numbers_of_processes_are_told(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "plain_0")
    assert not any("processes" in line for line in lines_of(document_of(here)))
    edit(here / "plain_0" / "results.json", lambda results: results["generations"][0].update(processes=8))
    expected = "Trained by 1 or 8 processes: batch-norm saw other parts of a batch, which may move errors."
    assert expected in lines_of(document_of(here))
