"""Small runs for the tests of the report: really trained on digits, once, and others made of their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from conftest import tiny_recipe

from fastgen.evaluate import main as evaluate_main
from fastgen.train import main as train_main

PLAIN = {"gen__patriarch": "cross_entropy", "gen__confidence": 1.0, "gen__teacher_weight": 0.0}
SEEDS = (0, 1, 2)


def train_runs(here: Path) -> Path:
    """Three seeds of tolerant and of plain networks, two generations of two epochs each; tolerant_0 is analysed."""
    recipes = {"tolerant": {}, "plain": PLAIN}
    for name, settings in recipes.items():
        path = here / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(train__epochs=2, run__eval_every_epochs=1, **settings)))
        for seed in SEEDS:
            train_main(["--cfg", str(path), f"--run.dir={here / f'{name}_{seed}'}", f"--run.seed={seed}"])
    evaluate_main([str(here / "tolerant_0"), "--analyse"])
    return here


def copied(runs: Path, to: Path, *names: str) -> Path:
    """Copies of runs in a folder of their own, whose generations lead to the very nodes."""
    to.mkdir(exist_ok=True)
    for name in names:
        shutil.copytree(runs / name, to / name, symlinks=True)
        for link in (to / name).glob("generation_*"):
            target = (runs / name / link.name).resolve()
            link.unlink()
            link.symlink_to(target)
    return to


def edit(path: Path, change) -> None:
    """Changes a JSON file in place: `change` gets its content, and may give another."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def set_errors(run: Path, generation: int, **errors: float) -> None:
    """Writes other errors into a generation's row of results.json."""

    def change(results):
        results["generations"][generation].update(errors)

    edit(run / "results.json", change)


def with_settings(run, to, errors=None, **settings):
    """A copy of a run under another recipe."""
    shutil.copytree(run, to, symlinks=True)
    recipe = yaml.safe_load((to / "recipe.yaml").read_text())
    for path, value in settings.items():
        section, key = path.split("__")
        recipe[section][key] = value
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if errors is not None:
        set_errors(to, 1, top1_error=errors, ensemble_top1_error=errors)
