"""Students that several earlier generations teach, by their mean prediction."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fastgen import train
from fastgen.errors import UserError, command
from fastgen.laws import ideal_confidence
from fastgen.models import build_model, initialise
from fastgen.plan import ensemble_id
from fastgen.teacher import make_teacher, mean_teacher

CPU = torch.device("cpu")
RECIPE = (
    "{data: {dataset: digits, train_limit: 200}, model: {name: resnet8}, train: {epochs: 2, batch_size: 40},"
    " gen: {generations: 3, ensemble_teachers: 2}, run: {device: cpu, eval_every_epochs: 0}}"
)


def networks(count=3):
    models = [initialise(build_model("resnet8", 10, 3, "strided"), seed).eval() for seed in range(count)]
    return [model.to(memory_format=torch.channels_last) for model in models]


@pytest.mark.parametrize("engine", ["folded", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_teacher_is_the_mean_of_the_softmaxes(engine, dtype):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last).to(dtype)
    alone = [make_teacher(model, CPU, dtype, engine, shape=(4, 3, 8, 8)) for model in networks()]
    expected = torch.stack([teacher(images).double().softmax(1) for teacher in alone]).mean(0)
    teacher = mean_teacher(alone)
    logits = teacher(images)
    assert logits.dtype == dtype
    assert teacher.how.startswith(f"mean of 3, {engine}")
    # One rounding of numbers up to 8 to the dtype; in fp32 some ten more.
    tolerance = 8 * (2.0**-8 if dtype == torch.bfloat16 else 10 * 2.0**-24)
    torch.testing.assert_close(logits.double().softmax(1), expected, rtol=tolerance, atol=0)


def test_one_teacher_is_itself():
    (model,) = networks(1)
    teacher = make_teacher(model, CPU, torch.float32)
    assert mean_teacher([teacher]) is teacher
    assert teacher.how == "folded"


def run(folder, name, *more):
    (folder / "tiny.yaml").write_text(RECIPE)
    words = ["--cfg", str(folder / "tiny.yaml"), f"--run.dir={folder / name}", f"--run.nodes={folder / 'nodes'}"]
    train.main([*words, *more])
    return folder / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), "whole")


def plan_of(run):
    return json.loads((run / "plan.json").read_text())


def test_each_student_has_the_generations_before_it(whole):
    plan = plan_of(whole)
    nodes = [generation["node"] for generation in plan]
    assert [generation["members"] for generation in plan] == [[], nodes[:1], nodes[:2], nodes[1:3]]
    assert plan[1]["teacher"] == nodes[0]
    assert plan[3]["teacher"] == ensemble_id(nodes[1:3])
    record = json.loads((whole / "generation_3" / "node.json").read_text())
    assert record["training"]["path"]["teacher"] == "mean of 2, folded"


def test_the_first_student_is_that_of_one_teacher(whole, tmp_path):
    """Its name is the same, too: settings that change nothing are no part of it."""
    one = run(tmp_path, "one", "--gen.ensemble_teachers=1", "--gen.generations=2")
    assert [g["node"] for g in plan_of(one)][:2] == [g["node"] for g in plan_of(whole)][:2]
    assert plan_of(one)[2]["node"] != plan_of(whole)[2]["node"]


@pytest.mark.parametrize(
    "words", [["--teacher.labels=table"], ["--teacher.look_ahead_batches=2"], ["--train.engine=graph"]]
)
def test_however_they_are_asked_they_say_the_same(whole, words):
    other = run(whole.parent, words[0].strip("-").replace(".", "_"), *words)
    one, two = (load_file(folder / "generation_3" / "model.safetensors") for folder in (whole, other))
    # fp32; sums in another order at most.
    assert all(torch.allclose(one[name].double(), two[name].double(), atol=1e-4) for name in one)
    row = json.loads((other / "results.json").read_text())["generations"][3]
    assert row["role"] == "student"


def test_a_store_keeps_the_word_of_an_ensemble(tmp_path):
    words = ["--teacher.labels=store", "--teacher.store_dtype=fp32"]
    first = run(tmp_path, "first", *words)
    node = (first / "generation_3").resolve()
    weights = load_file(node / "model.safetensors")
    for path in (node / "node.json", node / "model.safetensors"):
        path.unlink()
    again = run(tmp_path, "again", *words, "--gen.only=3")
    record = json.loads((again / "generation_3" / "node.json").read_text())["training"]
    assert record["path"]["teacher"].endswith("all of it read")
    theirs = load_file(again / "generation_3" / "model.safetensors")
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


def test_the_ideal_confidence_is_that_of_the_mean():
    # f_0 = .6; f_1 = 1 - .6 * .4; f_2 = 1 - .6 (1 - (f_0 + f_1) / 2)
    assert ideal_confidence(0.6, 0.6, 2, teachers=2) == pytest.approx(1 - 0.6 * (1 - (0.6 + 0.76) / 2))
    assert ideal_confidence(0.6, [0.6, 0.5], 2, teachers=1) == pytest.approx(1 - 0.5 * (1 - 0.76))
    assert ideal_confidence(0.6, 0.6, 3, teachers=99) < ideal_confidence(0.6, 0.6, 3)


def test_missing_members_are_named(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = ["--cfg", str(tmp_path / "tiny.yaml"), f"--run.nodes={tmp_path / 'nodes'}", f"--run.dir={tmp_path / 'run'}"]
    assert command(train.main, [*words, "--gen.only=3"]) == 2
    assert "generation 3 needs its teacher, generation " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--gen.ensemble_teachers=0"], "give 1 or more"), (["--gen.only=1", "--gen.teacher=x"], "leave one of them out")],
)
def test_what_makes_no_sense_is_one_line(tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        run(tmp_path, "run", *words)


def test_the_mean_of_equal_members_is_each_of_them():
    (model,) = networks(1)
    teacher = make_teacher(model, CPU, torch.float32)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean = mean_teacher([teacher, teacher])(images)
    torch.testing.assert_close(mean.exp().sum(1), torch.ones(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(mean.softmax(1), teacher(images).softmax(1), rtol=1e-5, atol=0)
