"""Where fastgen.report writes: over its own earlier files alone, all or none, and what it says where it may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import copied

from fastgen.errors import UserError, command
from fastgen.report import place
from fastgen.report.__main__ import main
from fastgen.report.place import put

FILES = {
    "report.html": b"<footer><p>Made by fastgen.report; ...",
    "report.md": b"#",
    "results.csv": b"recipe",
    "figures/errors.png": b"PNG",
}


def tree(folder):
    """All there is below a folder, with what files hold."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capfd, *words):
    """The one line with which the command ends, and its exit code."""
    code = command(main, [str(word) for word in words])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.parametrize(
    "name", ["report.md", "report.html", "tables.tex", "results.csv", "history.csv", "figures/errors.png"]
)
def test_files_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a person's own")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: is there already, and of no report: name another folder with --to"):
        put(tmp_path, FILES)
    assert tree(tmp_path) == before


def test_pictures_of_others_stay(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("a person's own")
    for _ in range(2):
        put(tmp_path, FILES)
        assert tree(tmp_path) == {"figures/mine.png": b"a person's own", "figures": None, **FILES}
    put(tmp_path, {**FILES, "figures/second-best-1.png": b"PNG"})
    put(tmp_path, FILES)
    assert tree(tmp_path) == {"figures/mine.png": b"a person's own", "figures": None, **FILES}


@pytest.mark.parametrize("function", ["write_atomically", "os.replace"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, function, there):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    before, calls = tree(tmp_path), []
    real = os.replace if function == "os.replace" else place.write_atomically

    def interrupted(path, other):
        if "figures" in str(path):
            raise KeyboardInterrupt
        calls.append(path)
        real(path, other)

    monkeypatch.setattr(f"fastgen.report.place.{function}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(folder, FILES)
    assert calls
    assert tree(tmp_path) == before


def test_all_is_made_before_anything_is_written(report_runs, tmp_path, monkeypatch):
    def interrupted(figure):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgen.report.files.png", interrupted)
    assert command(main, [str(report_runs / "tolerant_1"), "--samples=0", f"--to={tmp_path / 'to'}"]) == 130
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("place", ["/proc/x", "file/x", "n" * 300])
def test_a_place_that_cannot_be_is_told(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"name a folder that you may write to with --to$"):
        put(Path(place), FILES)
    assert tree(tmp_path) == {"file": b""}


@pytest.mark.parametrize("words", [["RUN", "--to="], ["RUN", "--to", ""], [""]])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, capfd, words):
    monkeypatch.chdir(tmp_path)
    code, line = refused(capfd, *words)
    assert (code, "is empty: name a folder" in line) == (2, True)


def test_names_that_are_not_utf_8(report_runs, tmp_path, capfd):
    here = copied(report_runs, tmp_path / "x", "tolerant_1")
    run = os.rename(here / "tolerant_1", here / "n\udcfcme") or here / "n\udcfcme"
    assert command(main, [str(run), "--samples=0", "--title=T\udcfc\nB  c"]) == 0
    assert f"{here}/n?me/report/report.html" in capfd.readouterr().out
    assert "<h1>T? B c</h1>" in (run / "report" / "report.html").read_text()
    assert (run / "report" / "report.md").read_text().startswith("# T? B c\n")
    assert "n?me" in (run / "report" / "results.csv").read_text()


INTERRUPTED = """
import os, signal, sys, time
from fastgen.errors import command
from fastgen.report.__main__ import main

if {"torch", "numpy"} & {*sys.modules}:
    sys.exit("what takes seconds is imported before anybody would catch an interrupt")

class Library:
    def find_spec(self, name, path, target=None):
        if name == "fastgen.report.command":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                os.abort()

sys.meta_path.insert(0, Library())
sys.exit(command(main, []))
"""


def test_all_files_of_a_report_are_known_as_a_report_s(written_report):
    pictures = [path.name for path in (written_report / place.FIGURES).iterdir()]
    assert {"errors.png", "confidence.png", "scores.png", "reliability.png"} <= {*pictures}
    # By these names those are removed that a later report has not.
    assert all(place._OWN_PICTURE.fullmatch(name) for name in pictures)
    beside = {path.name for path in written_report.iterdir()}
    assert beside == {place.PAGE, *place.BESIDE, place.FIGURES}


@pytest.mark.usefixtures("_signals_are_heard")
def test_an_interrupt_while_modules_are_imported_is_a_line():
    # Compiled modules abort where an interrupt is raised in them.
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "fastgen: interrupted\n")
