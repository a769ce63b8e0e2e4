"""fastgen.report on small runs: every number against results.json, what the headline may say, files, and bad input."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from report_runs import copied, edit, set_errors
from scipy import stats as scipy_stats

from fastgen.data import open_dataset
from fastgen.errors import command
from fastgen.evaluate import load_network
from fastgen.recipe import load_text
from fastgen.report import figures
from fastgen.report.__main__ import main
from fastgen.report.compare import compare
from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import Chart, Figure, Gallery, Line, Paragraph, Span, Table, plain, strong, words
from fastgen.report.drawing import png, svg
from fastgen.report.files import latex
from fastgen.report.groups import groups_of
from fastgen.report.page import page
from fastgen.report.runs import read_runs
from fastgen.report.samples import drawn
from fastgen.report.stats import difference_of, p_of_t, signed, spread_text
from fastgen.report.style import palette
from fastgen.report.tables import COMPARED
from fastgen.spread import spread_of

TOLERANT, PLAIN = "tolerant D(0.6, 0.6)", "plain D(1.0, 0.0)"


def names(kind, *seeds):
    return [f"{kind}_{seed}" for seed in (seeds or (0, 1, 2))]


def document_of(folder, *runs, samples=0):
    places = [folder / name for name in runs] or [folder]
    return report_of(read_runs(places), Wanted(None, samples, None))


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["generations"]


def refused(capfd, *words_):
    """The one line with which the command ends, and its exit code."""
    code = command(main, [str(word) for word in words_])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.fixture(scope="module")
def whole(report_runs):
    """The same report as a document."""
    return document_of(report_runs, samples=8)


# Statistics


@pytest.mark.parametrize("freedom", range(1, 12))
@pytest.mark.parametrize("t", [0.0, 0.3, -1.7, 2.5, 12.0, 300.0])
def test_p_is_that_of_student_s_t(t, freedom):
    assert p_of_t(t, freedom) == pytest.approx(2 * scipy_stats.t.sf(abs(t), freedom), abs=1e-14)


def test_differences_are_of_pairs():
    first, second = {0: 10.0, 1: 12.0, 2: 11.0, 9: 99.0}, {2: 10.5, 0: 10.0, 1: 11.0, 7: 0.0}
    found = difference_of(first, second)
    expected = scipy_stats.ttest_rel([10, 12, 11], [10, 11, 10.5])
    assert (found.mean, found.pairs) == (0.5, 3)
    assert found.standard_error == pytest.approx(0.5 / np.sqrt(3), rel=1e-14)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({0: 3.1}, {0: 3.0}, (1, None, None)),
        ({0: 3.1}, {1: 3.0}, None),
        # 0.1 apart in binary fractions that are not: no spread, so no test.
        ({0: 0.3, 1: 1.1, 2: 2.7}, {0: 0.2, 1: 1.0, 2: 2.6}, (3, 0.0, None)),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, (2, 0.0, None)),
    ],
)
def test_what_cannot_be_tested_has_no_p(first, second, expected):
    found = difference_of(first, second)
    assert (None if found is None else (found.pairs, found.standard_error, found.p)) == expected


def test_numbers_as_text():
    assert spread_text(spread_of([1.0, 2.0, 4.5])) == "2.50 ± 1.80"
    assert spread_text(spread_of([1234.5]), 0) == "1,234"
    assert spread_text(spread_of([])) == "–"
    assert [signed(value) for value in (0.123, -0.126, -0.001, 0.0)] == ["+0.12", "−0.13", "0.00", "0.00"]


# Contents


def test_recipes_are_named_by_what_differs(report_runs, tmp_path):
    groups = groups_of(read_runs([report_runs]).runs)
    assert [(group.name, group.kind, len(group.runs)) for group in groups] == [
        (PLAIN, "plain", 3),
        (TOLERANT, "other", 3),
    ]
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "tolerant_1", "plain_0", "plain_1")
    for name in ("tolerant_0", "plain_1"):
        recipe = here / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("lr: 0.1\n", "lr: 0.05\n"))
    recipe = here / "plain_1" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("teacher_weight: 0.0", "teacher_weight: 0.5"))
    recipe = here / "tolerant_1" / "recipe.yaml"
    text = recipe.read_text().replace("only: null", "only: 1").replace("  teacher: null", "  teacher: some/where/abc")
    recipe.write_text(text)
    found = {group.name: group.kind for group in groups_of(read_runs([here]).runs)}
    assert found == {
        "plain D(1.0, 0.0), lr=0.1": "plain",
        "born-again D(1.0, 0.5), lr=0.05": "born-again",
        "tolerant D(0.6, 0.6), lr=0.05": "other",
        "tolerant D(0.6, 0.6), lr=0.1, teacher=abc": "other",
    }


@pytest.mark.parametrize(("table", "measures"), [(0, ("top1", "ensemble_top1")), (-1, ("top5", "ensemble_top5"))])
def test_error_tables_are_means_and_deviations_of_results(whole, report_runs, table, measures):
    found = [t for t in whole.tables() if t.name.startswith("errors")][table]
    assert found.headings == ("recipe", "networks", "seeds", "gen 0", "gen 1")
    cells = [[cell.text for cell in row] for row in found.rows]
    expected = []
    for name, kind in ((PLAIN, "plain"), (TOLERANT, "tolerant")):
        for measure, networks in zip(measures, ("single", "ensemble"), strict=True):
            runs = [rows_of(report_runs / run) for run in names(kind)]
            values = [[rows[g][f"{measure}_error"] for rows in runs] for g in (0, 1)]
            expected.append([name, networks, "3", *(f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}" for v in values)])
    assert cells == expected


def test_differences_are_of_the_same_generation_and_seed(whole, report_runs):
    table = next(t for t in whole.tables() if t.name == "differences")
    pairs = [(rows_of(report_runs / f"tolerant_{s}"), rows_of(report_runs / f"plain_{s}")) for s in (0, 1, 2)]
    for row, measure in zip(table.rows, COMPARED, strict=True):
        for generation, cell in enumerate(row[2:]):
            values = [own[generation][measure] - other[generation][measure] for own, other in pairs]
            error = statistics.stdev(values) / 3**0.5
            assert cell.text == f"{signed(statistics.mean(values))} ± {error:.2f}"


def test_tidy_files_hold_every_result(written_report, report_runs):
    with (written_report / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        told = rows_of(report_runs / row["run"])[int(row["generation"])]
        for name in ("top1_error", "ensemble_top5_error", "nll", "wall_seconds"):
            assert float(row[name]) == told[name]
        assert (row["node"], row["role"]) == (told["node"], told["role"])
    with (written_report / "history.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 24
    for row in epochs:
        run = report_runs / f"{row['recipe'].split()[0]}_{row['seed']}"
        node = json.loads((run / f"generation_{row['generation']}" / "node.json").read_text())
        told = node["training"]["history"][int(row["epoch"])]
        assert float(row["loss"]) == told["loss"]
        # The last epoch's network is the one of results.json.
        last = rows_of(run)[int(row["generation"])]
        assert float(row["top1_error"]) == told.get("top1_error", last["top1_error"])


def test_curves_without_nodes_come_from_the_events(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    before = read_runs([here]).runs[0].histories
    for link in here.glob("*/generation_*"):
        link.unlink()
    after = read_runs([here]).runs[0].histories
    for generation, epoch in itertools.product((0, 1), (0, 1)):
        own, other = before[generation][epoch], after[generation][epoch]
        assert (own["epoch"], own["loss"], own["top1_error"]) == (other["epoch"], other["loss"], other["top1_error"])


def test_figure_2_shows_the_means(whole):
    figure = next(f for f in whole.figures() if f.name == "errors")
    table = next(t for t in whole.tables() if t.name == "errors-top1")
    assert [panel.title for panel in figure.panels] == [
        "top-1 error, single", "top-1 error, ensemble", "top-5 error, single", "top-5 error, ensemble",
    ]  # fmt: skip
    for panel, networks in zip(figure.panels[:2], ("single", "ensemble"), strict=True):
        for line in panel.lines:
            row = next(row for row in table.rows if (row[0].text, row[1].text) == (line.name, networks))
            told = [f"{y:.2f} ± {bar:.2f}" for y, bar in zip(line.ys, line.bars, strict=True)]
            assert told == [cell.text for cell in row[3:]]
    assert figure.panels[0].y_range == figure.panels[1].y_range


def test_figure_1_is_drawn_where_a_run_is_analysed(whole, report_runs):
    analysis = json.loads((report_runs / "tolerant_0" / "analysis.json").read_text())
    figures = {figure.name: figure for figure in whole.figures()}
    (scores,) = figures["scores"].panels
    for line, row in zip(scores.lines, analysis["generations"], strict=True):
        assert list(line.ys) == row["training"]["sorted_scores"]
    maps = figures["second-best-0"].panels
    assert [panel.title for panel in maps] == ["generation 0", "generation 1"]
    for panel, found in zip(maps, analysis["second_best"], strict=True):
        counts = np.array(found["counts"])
        assert np.allclose(panel.values, 100 * counts / counts.sum(1, keepdims=True))
    assert "reliability" in figures
    without = document_of(report_runs, *names("plain"))
    text = "".join(plain(block.words) for block in without.blocks() if isinstance(block, Paragraph))
    assert f"python -m fastgen.evaluate {report_runs / 'plain_0'} --analyse" in text
    assert not {"scores", "reliability"} & {figure.name for figure in without.figures()}


# The headline


def with_errors(report_runs, to, tolerant, plain_):
    """Copies whose last generations have these errors, single; ensembles do not differ."""
    here = copied(report_runs, to, *names("tolerant", *range(len(tolerant))), *names("plain", *range(len(plain_))))
    for kind, errors in (("tolerant", tolerant), ("plain", plain_)):
        for seed, error in enumerate(errors):
            set_errors(here / f"{kind}_{seed}", 1, top1_error=error, ensemble_top1_error=50.0 + seed)
    return here


def test_a_difference_beyond_noise_is_told_in_bold(report_runs, tmp_path):
    # t = -3.0 / (0.1 / sqrt 3) = -52, p = 0.00037, below 0.05 / 2 of two comparisons.
    document = document_of(with_errors(report_runs, tmp_path / "x", (27.0, 27.1, 27.2), (30.0, 30.2, 30.1)))
    assert plain(document.headline) == (
        f"Generation 1 of {TOLERANT} makes fewer errors than that of {PLAIN}: −3.00 ± 0.06 points."
    )
    assert [span.text for span in document.headline if span.style == "strong"] == [
        f"fewer errors than that of {PLAIN}: −3.00 ± 0.06 points"
    ]
    bold = [cell.text for table in document.tables() for row in table.rows for cell in row if cell.style == "strong"]
    assert bold == ["27.10 ± 0.10", "−3.00 ± 0.06", "−3.00 ± 0.06"]
    tests = next(table for table in document.tables() if table.name == "tests")
    assert [[cell.text for cell in row] for row in tests.rows] == [
        [TOLERANT, PLAIN, "top-1, single", "1", "−3.00 ± 0.06", "3", "0.00037"],
        [TOLERANT, PLAIN, "top-1, ensemble", "1", "0.00 ± 0.00", "3", "no test"],
    ]


def test_a_difference_within_noise_is_not_told_apart(report_runs, tmp_path):
    # t = -0.6 / (0.36 / sqrt 3) = -2.9, p = 0.10.
    document = document_of(with_errors(report_runs, tmp_path / "x", (29.0, 29.8, 29.7), (30.0, 30.1, 30.2)))
    assert plain(document.headline) == (
        "Nothing is told apart: in generation 1 no difference stands out from the noise of the seeds."
    )
    spans = [cell for table in document.tables() for row in table.rows for cell in row]
    assert not [span for span in (*spans, *itertools.chain(*document.details)) if span.style == "strong"]
    assert "−0.60 ± 0.21 points over 3 pairs (p = 0.1, not told apart)" in plain(document.details[0])


def test_two_comparisons_ask_for_more_than_one(report_runs, tmp_path):
    # p = 0.035 passes a single test, and not Holm's procedure over two.
    here = with_errors(report_runs, tmp_path / "x", (29.0, 29.5, 29.0), (30.0, 30.1, 30.2))
    comparison = compare(groups_of(read_runs([here]).runs), tuple(COMPARED))
    single = next(c for c in comparison.tested if c.measure == "top1_error")
    assert 0.025 < single.difference.p < 0.05
    assert not any(contrast.apart for contrast in comparison.tested)


def test_one_seed_tells_nothing_apart(report_runs, tmp_path):
    document = document_of(with_errors(report_runs, tmp_path / "x", (10.0,), (30.0,)))
    assert plain(document.headline).startswith("One seed alone has generation 1 of both")
    assert "**" not in "".join(span.style for span in document.headline)
    assert "One seed of each recipe: nothing is known of the noise." in missing_lines(document)


def test_without_plain_runs_students_stand_beside_their_patriarch(report_runs):
    document = document_of(report_runs, *names("tolerant"))
    assert "nothing is said of plain networks of that generation" in plain(document.headline)
    assert any("Give plain runs too" in plain(line) for line in document.details)
    table = next(table for table in document.tables() if table.name == "differences")
    runs = [rows_of(report_runs / name) for name in names("tolerant")]
    for row, measure in zip(table.rows, ("top1_error", "ensemble_top1_error"), strict=True):
        values = [rows[1][measure] - rows[0][measure] for rows in runs]
        expected = f"{signed(statistics.mean(values))} ± {statistics.stdev(values) / 3**0.5:.2f}"
        assert [cell.text for cell in row[2:5]] == ["1", expected, "3"]
        p = scipy_stats.ttest_1samp(values, 0).pvalue
        assert row[5].text == ("< 0.0001" if p < 1e-4 else f"{p:.2g}")


def test_plain_runs_alone_are_compared_with_nothing(report_runs):
    document = document_of(report_runs, *names("plain"))
    assert plain(document.headline).endswith("; nothing is given to compare it with.")
    assert not any("Give plain runs too" in plain(line) for line in document.details)


def test_the_last_generation_that_both_have_is_compared(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", *names("tolerant"), *names("plain"))
    for name in names("plain"):
        edit(here / name / "results.json", lambda results: results["generations"].pop() and None)
    comparison = compare(groups_of(read_runs([here]).runs), tuple(COMPARED))
    assert {(c.generation, c.baseline_generation) for c in comparison.contrasts} == {(0, 0)}
    # A patriarch is no result of students.
    assert comparison.tested == []
    lines = missing_lines(document_of(here))
    assert any("ends with generation 0" in line for line in lines)
    assert sum("generation 1 of 0 to 1 is not trained" in line for line in lines) == 3


def missing_lines(document):
    section = next(section for section in document.sections if section.name == "missing")
    return [plain(item) for block in section.blocks for item in block.items]


def test_what_is_unfinished_is_named(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "tolerant_1", "plain_0", "plain_1")
    edit(here / "plain_1" / "results.json", lambda results: results["generations"].pop() and None)
    with (here / "plain_1" / "events.jsonl").open("a") as file:
        file.write('{"event": "stopped", "time": 1.0, "reason": "stopped by SIGTERM"}\n')
    (here / "tolerant_1" / "results.json").unlink()
    edit(here / "plain_0" / "environment.json", lambda facts: {**facts, "device": "Another", "commit": "abc"})
    lines = missing_lines(document_of(here))
    assert "plain_1: generation 1 of 0 to 1 is not trained and measured yet (stopped by SIGTERM)." in lines
    assert any(line.startswith("tolerant_1: no generation is measured yet (last heard of in") for line in lines)
    assert f"{TOLERANT}: 1 of 2 seeds." in lines
    assert any(line.startswith("Trained on ") and "Another" in line for line in lines)
    assert any("2 different versions" in line for line in lines)


# Samples


def test_samples_are_drawn_by_their_ids_alone():
    ids = np.arange(355, dtype=np.int64)
    assert drawn(ids, 8)[:3].tolist() == drawn(ids, 3).tolist()
    # As it was on the day it was written: another version of numpy, or another machine, draws the same.
    assert ids[drawn(ids, 5)].tolist() == GOLDEN
    assert sorted(drawn(ids, 1000)) == list(range(355))
    shuffled = ids[::-1]
    assert shuffled[drawn(shuffled, 5)].tolist() == GOLDEN


GOLDEN = [86, 347, 3, 88, 178]


def test_samples_show_what_the_networks_say(whole, report_runs):
    (gallery,) = [block for block in whole.blocks() if isinstance(block, Gallery)]
    recipe = load_text((report_runs / "tolerant_0" / "recipe.yaml").read_text(), "recipe.yaml")
    dataset = open_dataset(recipe)
    position_of = {int(sample): n for n, sample in enumerate(dataset.evaluation.ids)}
    assert len(gallery.samples) == 8
    for sample in gallery.samples:
        position = position_of[sample.sample_id]
        assert sample.label == str(dataset.evaluation.labels[position])
        image_HWC = torch.from_numpy(dataset.evaluation.images_NHWC[position])
        normalised = (image_HWC.float() / 255 - dataset.facts.mean[0]) / dataset.facts.std[0]
        for generation, (name, ranked) in enumerate(sample.answers):
            weights = report_runs / "tolerant_0" / f"generation_{generation}" / "model.safetensors"
            model = load_network(recipe, dataset, weights, torch.device("cpu")).eval()
            p_C = model(normalised.permute(2, 0, 1)[None]).softmax(1)[0]
            assert [one.probability for one in ranked] == pytest.approx(sorted(p_C.tolist())[:-6:-1], rel=1e-4)
            assert [one.is_label for one in ranked] == [one.name == sample.label for one in ranked]
            assert ranked[0].name == str(int(p_C.argmax()))
            assert name == f"{('patriarch', 'student')[generation]}, gen {generation}"


def test_samples_that_cannot_be_shown_are_a_line(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    for link in here.glob("*/generation_1"):
        link.unlink()
    document = document_of(here, samples=3)
    lines = [plain(block.words) for block in document.blocks() if isinstance(block, Paragraph)]
    assert sum("Samples are left out: " in line and "is not there any more" in line for line in lines) == 1
    edit(here / "tolerant_0" / "plan.json", change_hash)
    document = document_of(here, samples=3)
    lines = [plain(block.words) for block in document.blocks() if isinstance(block, Paragraph)]
    assert sum("other images than those of the run" in line for line in lines) == 1


def change_hash(plan):
    plan[0]["identity"]["data"]["hash"] = "0" * 64


# Files


class Seen(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.text += data


def test_the_page_fetches_nothing_and_runs_nothing(written_report):
    seen = Seen((written_report / "report.html").read_text())
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in seen.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    text = (written_report / "report.html").read_text()
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    targets = {attributes["href"][1:] for tag, attributes in seen.tags if tag == "a"}
    assert targets
    assert targets <= {*ids}


def test_all_forms_tell_the_same(written_report, whole):
    html = Seen((written_report / "report.html").read_text()).text.replace("\N{NO-BREAK SPACE}", " ")
    markdown = (written_report / "report.md").read_text()
    tex = (written_report / "tables.tex").read_text()
    for table in whole.tables():
        for cell in itertools.chain(*table.rows):
            assert cell.text in html
            assert cell.text.replace("_", r"\_") in markdown or f"`{cell.text}`" in markdown
    for table in (table for table in whole.tables() if table.in_paper):
        for cell in itertools.chain(*table.rows):
            assert cell.text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--") in tex
    for figure in re.findall(r"\]\((figures/[^)]*)\)", markdown):
        assert (written_report / figure).read_bytes().startswith(b"\x89PNG")
    assert len(list((written_report / "figures").iterdir())) == len(whole.figures())
    assert plain(whole.headline) in html


def test_another_process_writes_the_same_bytes(written_report, whole, report_runs, tmp_path, run_command):
    again = tmp_path / "again"
    (again / "figures").mkdir(parents=True)
    (again / "report.html").write_text("<p>Made by fastgen.report; ...")
    (again / "figures" / "training-7.png").write_bytes(b"of an earlier report")
    ended = run_command([report_runs, "--to", again], module="fastgen.report")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-2:] == [plain(whole.headline), f"{again}/report.html  (11 files beside it)"]
    files = sorted(path.relative_to(written_report) for path in written_report.rglob("*") if path.is_file())
    assert len(files) == 12
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in files:
        assert (written_report / path).read_bytes() == (again / path).read_bytes(), path


def test_names_are_text_whatever_they_hold():
    hostile = '<script>alert("&")</script> 100 % $x_1$ {a}\\b'
    table = Table("t", words(hostile), ("a", hostile), ((Span(hostile), strong(hostile)),), in_paper=True)
    line = Line(hostile, (0.0, 1.0), (1.0, 2.0), "c0")
    figure = Figure("f", hostile, words(hostile), (Chart(hostile, "x", "y", (line,)),))
    from fastgen.report.document import Document, Section

    document = Document(hostile, hostile, words(hostile), (), (Section("s", hostile, (table, figure)),))
    seen = Seen(page(document))
    assert "script" not in {tag for tag, _ in seen.tags}
    assert seen.text.replace("\N{NO-BREAK SPACE}", " ").count(hostile) >= 6
    tex = latex(document)
    escaped = r"100 \% \$x\_1\$ \{a\}\textbackslash{}b"
    assert tex.count(escaped) == 4
    assert png(figure).startswith(b"\x89PNG")


def test_latex_tables_are_whole(written_report):
    text = (written_report / "tables.tex").read_text()
    for table in re.findall(r"\\begin{tabular}{(\w+)}(.*?)\\end{tabular}", text, re.DOTALL):
        columns, body = table
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 2
        assert {row.count("&") for row in rows} == {len(columns) - 1}
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\bottomrule") == 4
    assert text.isascii()


def test_second_best_classes_of_all_generations_have_one_scale(report_runs):
    group = groups_of(read_runs([report_runs / "tolerant_0"]).runs)[0]
    content = json.loads((report_runs / "tolerant_0" / "analysis.json").read_text())
    figure = figures._second_best(0, group, content)
    largest = max(value for panel in figure.panels for row in panel.values for value in row)
    assert [panel.full for panel in figure.panels] == [largest] * 2
    assert f"on a scale of square roots up to {largest:.0f} %, the same for all generations" in plain(figure.caption)
    assert "neighbours" not in plain(figure.caption)
    for found in content["second_best"]:
        found["classes_per_cell"] = 10
    caption = plain(figures._second_best(0, group, content).caption)
    assert "10 neighbours a row and column, so that the diagonal tells of others of the same cell" in caption


def test_drawings_take_the_page_s_colours(whole):
    colours = {colour for pair in palette().values() for colour in pair}
    for figure in whole.figures():
        for panel in figure.panels:
            drawn_ = svg(panel, figure.name)
            assert not [colour for colour in colours if colour in drawn_]
            assert "var(--ink)" in drawn_
            assert "<text" in drawn_
            assert "font-family" not in drawn_


def luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_ground():
    colours = palette()
    for ground in ("ground", "raised"):
        for scheme in (0, 1):
            for name, pair in colours.items():
                if name in ("ground", "raised", "line"):
                    continue
                # WCAG 2.2: 4.5 of text, 3 of what is drawn; the palest generation is also told by its place in order.
                least = 4.5 if name in ("ink", "muted", "accent") else 3.0 if name[0] == "c" else 1.5
                assert contrast(pair[scheme], colours[ground][scheme]) >= least, (name, ground, scheme)


def test_a_sweep_s_folder_stands_for_its_runs(report_runs, tmp_path):
    copied(report_runs, tmp_path / "runs", "tolerant_0", "tolerant_1")
    found = read_runs([tmp_path])
    assert [run.record.name for run in found.runs] == ["tolerant_0", "tolerant_1"]


def test_of_one_run_the_report_lies_in_its_folder(report_runs, tmp_path, capsys):
    here = copied(report_runs, tmp_path / "x", "tolerant_1")
    main([str(here / "tolerant_1"), "--samples=0", "--title", "My title"])
    assert "<h1>My title</h1>" in (here / "tolerant_1" / "report" / "report.html").read_text()
    assert str(here / "tolerant_1" / "report" / "report.html") in capsys.readouterr().out


# Bad input


def test_mistakes_are_one_line(report_runs, tmp_path, capfd):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "plain_0")
    to = f"--to={tmp_path / 'to'}"
    assert refused(capfd, tmp_path / "none", to) == (
        2, f"fastgen: {tmp_path / 'none'}: there is no such folder: name folders that fastgen.train made, such as "
        "runs/NAME, or runs for all of them",
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert "is no run folder (it has no recipe.yaml), and holds none" in refused(capfd, tmp_path / "empty", to)[1]
    code, line = refused(capfd, here / "tolerant_0", here / "tolerant_0", to)
    assert (code, "this run is named twice" in line) == (2, True)
    shutil.copytree(here / "plain_0", here / "twin", symlinks=True)
    assert "are the same training (one recipe, one seed)" in refused(capfd, here, to)[1]
    shutil.rmtree(here / "twin")
    (tmp_path / "file").write_text("")
    assert "is a file: name a folder" in refused(capfd, here, f"--to={tmp_path / 'file'}")[1]
    assert "no whole number from 0 to 200" in refused(capfd, here, to, "--samples=-1")[1]
    assert "the following arguments are required: RUN" in refused(capfd)[1]
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("results.json", "{", "is damaged"),
        ("results.json", "[]", "is damaged"),
        ("results.json", "{}", "is damaged"),
        ("results.json", '{"dataset": "digits", "generations": []}', "is damaged"),
        ("plan.json", "{}", "is damaged"),
        ("plan.json", "[1, 2]", "is damaged"),
        ("plan.json", '[{"index": 0, "train": true}]', "is damaged"),
        ("plan.json", '[{"index": 0, "identity": {"data": {"hash": "a"}}}]', "is damaged"),
        ("recipe.yaml", b"# n\xfc", "is damaged"),
        ("recipe.yaml", "run: [", "is not valid YAML"),
        ("analysis.json", "{", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(report_runs, tmp_path, capfd, name, content, expected):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    (here / "tolerant_0" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, line = refused(capfd, here, f"--to={tmp_path / 'to'}")
    assert code == 2
    assert name in line
    assert expected in line


def test_runs_of_other_images_are_not_compared(report_runs, tmp_path, capfd):
    here = copied(report_runs, tmp_path / "x", "tolerant_0", "plain_0")

    def fewer(results):
        for row in results["generations"]:
            row["samples_evaluated"] = 100

    edit(here / "plain_0" / "results.json", fewer)
    code, line = refused(capfd, here / "tolerant_0", here / "plain_0", f"--to={tmp_path / 'to'}")
    assert code == 2
    assert "100 test images of digits" in line
    assert "--against" not in line


def test_a_run_that_is_not_measured_is_told(report_runs, tmp_path, capfd):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    (here / "tolerant_0" / "results.json").unlink()
    code, line = refused(capfd, here / "tolerant_0", f"--to={tmp_path / 'to'}")
    assert (code, "no generation is measured yet" in line) == (2, True)


def test_a_folder_that_may_not_be_written_to_is_told(report_runs, tmp_path, capfd, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fastgen.report.place.write_atomically", full)
    code, line = refused(capfd, report_runs / "tolerant_0", "--samples=0", f"--to={tmp_path / 'to'}")
    assert (code, "No space left on device" in line) == (1, True)
