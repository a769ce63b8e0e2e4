"""Networks are neither measured on images that they have learned from, nor taken for other networks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fastgen.checkpoint import METADATA_KEY, read_weights
from fastgen.errors import command
from fastgen.evaluate import main as evaluate
from fastgen.export.__main__ import main as export
from fastgen.stored_labels import main as stored_labels
from fastgen.train import main as train

HOLDOUT = 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two patriarchs: `whole` has learned from all images, `held` from all but HOLDOUT."""
    from conftest import tiny_recipe
    from yaml import safe_dump

    here = tmp_path_factory.mktemp("runs")
    (here / "tiny.yaml").write_text(safe_dump(tiny_recipe(gen__generations=0)))
    for name, held in (("whole", 0), ("held", HOLDOUT)):
        train(["--cfg", str(here / "tiny.yaml"), f"--run.dir={here / name}", f"--data.holdout={held}"])
    return here


def weights_of(run):
    return run / "generation_0" / "model.safetensors"


def rewritten(run, to, **changes):
    """A copy of the weights that tells something else of itself; `...` leaves it out."""
    tensors, description = read_weights(weights_of(run))
    told = {key: value for key, value in (description | changes).items() if value is not ...}
    save_file(tensors, to, {METADATA_KEY: json.dumps(told)})
    return to


def refused(main, *words, capfd):
    capfd.readouterr()
    assert command(main, [*map(str, words)]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize("how", ["run", "analysis", "file"])
def test_images_that_a_network_has_learned_from_are_no_holdout(runs, how, capfd):
    words = {
        "run": [runs / "whole"],
        "analysis": [runs / "whole", "--analyse"],
        "file": [weights_of(runs / "whole"), "--cfg", runs / "tiny.yaml"],
    }[how]
    told = refused(evaluate, *words, f"--data.holdout={HOLDOUT}", capfd=capfd)
    assert "was trained with data.holdout = 0, so it may know the 300 images that are held out here" in told
    assert not (runs / "whole" / "analysis.json").exists()


def test_images_that_it_has_not_seen_are(runs, capfd):
    assert command(evaluate, [str(runs / "held")]) == 0
    assert "holdout" in capfd.readouterr().out
    assert command(evaluate, [str(runs / "held"), "--data.holdout=0"]) == 0
    assert "holdout" not in capfd.readouterr().out
    assert "give data.holdout=300" in refused(evaluate, runs / "held", "--data.holdout=200", capfd=capfd)


def test_weights_that_do_not_tell_are_not_measured_on_a_holdout(runs, tmp_path, capfd):
    words = ["--cfg", runs / "tiny.yaml", f"--data.holdout={HOLDOUT}"]
    silent = rewritten(runs / "held", tmp_path / "silent.safetensors", holdout=...)
    assert "does not tell which images were held out" in refused(evaluate, silent, *words, capfd=capfd)
    other = rewritten(runs / "held", tmp_path / "other.safetensors", data="0123")
    assert "was trained on other images than" in refused(evaluate, other, *words, capfd=capfd)
    # On test images neither matters.
    assert command(evaluate, [str(silent), "--cfg", str(runs / "tiny.yaml")]) == 0
    assert command(evaluate, [str(other), "--cfg", str(runs / "tiny.yaml")]) == 0


def test_networks_of_other_classes_or_another_kind_are_refused(runs, tmp_path, capfd):
    words = ["--cfg", runs / "tiny.yaml"]
    other = rewritten(runs / "whole", tmp_path / "other.safetensors", class_names="0123")
    assert "was trained for other classes" in refused(evaluate, other, *words, capfd=capfd)
    teach = [*words, "--gen.generations=1", "--gen.only=1", f"--run.dir={tmp_path / 'run'}"]
    assert "for other classes" in refused(train, *teach, f"--gen.teacher={other}", capfd=capfd)
    _, description = read_weights(weights_of(runs / "whole"))
    model = {**description["model"], "downsample": "pooled"}
    # Its tensors have the very names and shapes.
    other = rewritten(runs / "whole", tmp_path / "pooled.safetensors", model=model)
    told = "has model.downsample = pooled, the recipe has strided: make them equal"
    assert told in refused(evaluate, other, *words, capfd=capfd)
    assert told in refused(train, *teach, f"--gen.teacher={other}", capfd=capfd)
    # How much memory its training took is no other network.
    model = {**description["model"], "memory_efficient": True}
    other = rewritten(runs / "whole", tmp_path / "efficient.safetensors", model=model)
    assert command(evaluate, [str(other), *map(str, words)]) == 0


@pytest.mark.parametrize("exported", [False, True])
def test_a_teacher_must_not_know_what_its_student_is_measured_on(runs, tmp_path, exported, capfd):
    teacher = runs / "whole"
    if exported:
        words = [str(runs / "whole"), "--format=safetensors", f"--to={tmp_path / 'out'}", "--images=1"]
        assert command(export, words) == 0
        teacher = tmp_path / "out" / "generation_0.safetensors"
    words = ["--cfg", runs / "tiny.yaml", "--gen.generations=1", "--gen.only=1", f"--run.dir={tmp_path / 'run'}"]
    teacher_word = f"--gen.teacher={teacher if exported else weights_of(teacher)}"
    told = refused(train, *words, teacher_word, f"--data.holdout={HOLDOUT}", capfd=capfd)
    assert "was trained with data.holdout = 0" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", ["table", "store"])
def test_a_teacher_that_was_trained_anew_is_asked_anew(write_recipe, tmp_path, capsys, labels):
    """A node's name does not tell its weights: on a GPU they differ from training to training."""
    recipe = write_recipe(data__train_limit=100, gen__generations=1)

    def student(name):
        train(["--cfg", str(recipe), f"--run.dir={tmp_path / name}", f"--teacher.labels={labels}"])
        weights = tmp_path / name / "generation_1" / "model.safetensors"
        tensors, _ = read_weights(weights)
        shutil.rmtree(weights.resolve().parent)
        return tensors

    def folders():
        return {path.name for path in (tmp_path / "nodes" / "labels").iterdir()}

    first, one = student("first"), folders()
    again = student("again")
    assert folders() == one
    assert all(torch.equal(first[name], again[name]) for name in first)
    teacher = (tmp_path / "first" / "generation_0" / "model.safetensors").resolve()
    tensors, description = read_weights(teacher)
    tensors["fc.bias"] = tensors["fc.bias"] + torch.arange(10) / 10
    save_file(tensors, teacher, {METADATA_KEY: json.dumps(description)})
    other = student("other")
    assert len(folders()) == 2
    assert any(not torch.equal(first[name], other[name]) for name in first)
    capsys.readouterr()
    stored_labels([str(tmp_path / "nodes"), "--remove=stale"])
    assert folders().isdisjoint(one)
    assert len(folders()) == 1


def test_a_seed_that_nobody_hears_is_refused(runs, capfd):
    cfg = runs / "whole" / "recipe.yaml"
    told = refused(train, "--cfg", cfg, "--run.seed=1", f"--run.dir={runs / 'new'}", capfd=capfd)
    assert "--run.seed=1 has no say" in told
    assert "give --run.init_seed=1 --data.seed=1 too" in told
    dry = ["--cfg", str(cfg), f"--run.dir={runs / 'new'}", "--run.dry=true"]
    assert command(train, [*dry, "--run.seed=1", "--run.init_seed=1", "--data.seed=1"]) == 0
    assert command(train, [*dry, "--run.seed=0"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gen.teacher_weight=[]", "--gen.ensemble_teachers=2"], "gen.ensemble_teachers has no say"),
        (["--gen.student_confidence=[]", "--gen.student_k=3"], "gen.student_k has no say"),
    ],
)
def test_empty_lists_of_no_students_are_no_crash(runs, words, told, capfd):
    assert told in refused(train, "--cfg", runs / "tiny.yaml", "--run.dry=true", *words, capfd=capfd)


def test_a_generation_of_another_number_of_processes_is_told(runs, tmp_path, capfd):
    node = (runs / "whole" / "generation_0").resolve()
    facts = json.loads((node / "node.json").read_text())
    kept = (node / "node.json").read_text()
    facts["training"]["processes"] = 2
    (node / "node.json").write_text(json.dumps(facts))
    try:
        words = ["--cfg", str(runs / "tiny.yaml"), f"--run.nodes={runs / 'nodes'}", f"--run.dir={tmp_path / 'again'}"]
        capfd.readouterr()
        assert command(train, words) == 0
        assert "generation 0 was trained by 2 processes, not 1" in capfd.readouterr().out
    finally:
        (node / "node.json").write_text(kept)
