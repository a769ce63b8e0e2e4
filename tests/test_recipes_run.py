"""Every recipe of rcp/ plans, and trains two steps of each generation; of large networks the patriarch alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import write_folder

from data_prep import manifest
from fastgen import train, trainer
from fastgen.errors import Stopped
from fastgen.recipe import read_recipe

RECIPES = sorted((Path(__file__).parent.parent / "rcp").glob("*.yaml"))
# A step of these takes seconds on a CPU: two of them, on four images each, and none of a student.
LARGE = ("resnet110", "densenet100", "densenet190")
# What only a GPU has, or would make small trainings long.
ON_A_CPU = {
    "train.engine": "eager", "train.kernels": "torch", "train.batchnorm": "torch", "train.warmup_epochs": "0",
    "train.lr_schedule": "steps", "run.device": "cpu", "run.eval_every_epochs": "0",
}  # fmt: skip


@pytest.fixture
def photographs(tmp_path):
    """Two classes of tiny photographs; five for k = 5."""
    for number, part in enumerate(("train", "val")):
        source = write_folder(tmp_path / "photographs" / part, classes=5, per_class=2, seed=number)
        manifest.main([f"--source={source}", f"--out={source}.manifest"])
    return tmp_path / "photographs"


def words_for(path, root):
    """A recipe on some of the data, for two steps an epoch."""
    recipe = read_recipe([f"--cfg={path}"])
    images = {"cifar100": 100, "digits": 100}.get(recipe.data.dataset, 10)
    settings = {**ON_A_CPU, "train.epochs": "1", "train.batch_size": str(images // 2), "data.root": str(root)}
    if recipe.data.dataset == "imagenet":
        settings |= {"data.backend": "folder", "data.workers": "1", "data.resolution_px": "64"}
        settings |= {"data.eval_resolution_px": "64"}
        settings |= {} if recipe.data.start_resolution_px is None else {"data.start_resolution_px": "32"}
    else:
        settings |= {"data.train_limit": str(images), "data.val_limit": "100"}
    if recipe.model.name in LARGE:
        settings |= {"train.batch_size": "4"}
    return recipe, [f"--cfg={path}", *(f"--{name}={value}" for name, value in settings.items())]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_and_trains_two_steps(path, fake_cifar100, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, words = words_for(path, photographs if "r18" in path.stem or "photo" in path.stem else fake_cifar100)
    train.main([*words, "--run.dry=true"])
    planned = capsys.readouterr().out.splitlines()
    assert len(planned) == 2 + recipe.gen.generations
    if recipe.model.name in LARGE:
        stop_after(2, monkeypatch)
        with pytest.raises(Stopped):
            train.main([*words, "--run.dir=run"])
        assert "saved" in capsys.readouterr().out
        return
    train.main([*words, "--run.dir=run"])
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["generations"]
    assert len(rows) == 1 + recipe.gen.generations
    for row in rows:
        facts = json.loads((tmp_path / "run" / f"generation_{row['generation']}" / "node.json").read_text())
        assert len(facts["training"]["history"]) == 1
        assert 0 < facts["training"]["history"][0]["loss"] < 200


def stop_after(steps, monkeypatch):
    right = trainer._Pauses._own_wish

    def wish(self, training, *, epoch_ends):
        found = right(self, training, epoch_ends=epoch_ends)
        return found._replace(stop=15) if training.step >= steps else found

    monkeypatch.setattr(trainer._Pauses, "_own_wish", wish)
