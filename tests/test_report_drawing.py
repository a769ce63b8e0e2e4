"""Drawings of fastgen.report with names and numbers that are easily drawn wrong."""

from __future__ import annotations

import re
import warnings

import pytest
from report_runs import copied, edit

from fastgen.recipe import load_text
from fastgen.report.document import Chart, Figure, HeatMap, Key, Line, words
from fastgen.report.drawing import png, svg
from fastgen.report.figures import second_best_figures
from fastgen.report.groups import groups_of
from fastgen.report.runs import read_runs
from fastgen.report.samples import _recipe


def chart(name="a", xs=(1.0, 2.0), **settings):
    return Chart(name, "x", "y", (Line(name, xs, tuple(0.5 for _ in xs), "c0"),), **settings)


def heat_map(names):
    values = tuple(tuple(float(row == column) for column in range(len(names))) for row in range(len(names)))
    return HeatMap("t", "x", "y", values, 1.0, tuple(names), "percent", (), "alt")


def texts(drawn):
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn)


@pytest.mark.parametrize("name", [r"$\frac{a$0", "$x_1$", "5 $"])
def test_dollars_are_no_formula(name):
    assert name in texts(svg(heat_map([name, "b"]), "f"))
    assert name in texts(svg(chart(name), "f"))
    assert png(Figure("f", "t", words("c"), (chart(name),), (Key(name, "c0"),))).startswith(b"\x89PNG")


def test_powers_of_ten_are_a_formula_still():
    assert not [text for text in texts(svg(chart(log=True), "f")) if "$" in text]


def test_of_one_epoch_the_axis_has_one_tick():
    drawn = texts(svg(chart(xs=(1.0,)), "f"))
    assert "1" in drawn
    assert not [text for text in drawn if text.startswith(("0.9", "1.0"))]


def test_letters_that_the_type_lacks_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "漢" in texts(svg(heat_map(["漢", "b"]), "f"))
        assert png(Figure("f", "t", words("c"), (heat_map(["漢", "b"]),))).startswith(b"\x89PNG")


def test_long_names_leave_room_for_a_heat_map(report_runs, tmp_path):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    long = [f"a class whose name has forty-five letters {n:04}" for n in range(10)]
    edit(here / "tolerant_0" / "analysis.json", lambda content: {**content, "class_names": long})
    (figure,) = second_best_figures(groups_of(read_runs([here]).runs))
    assert figure.panels[0].names[3] == "a class w…s 0003"
    with warnings.catch_warnings():
        # "constrained_layout not applied because axes sizes collapsed to zero"
        warnings.simplefilter("error")
        svg(figure.panels[0], "f")
        png(figure)


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_samples_of_a_dali_run_are_read_without_a_gpu(report_runs, tmp_path, decoder):
    here = copied(report_runs, tmp_path / "x", "tolerant_0")
    (run,) = read_runs([here]).runs
    path = here / "tolerant_0" / "recipe.yaml"
    text = path.read_text().replace("backend: resident", "backend: dali")
    path.write_text(text.replace("dali_decoder: cpu", f"dali_decoder: {decoder}"))
    assert load_text(path.read_text(), "recipe").data.dali_decoder == decoder
    assert _recipe(run, None).data.backend == "folder"
