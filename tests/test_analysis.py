"""The command with --analyse on small runs: against their own results, other runs, and what is not there."""

import io
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_recipe
from PIL import Image
from rich.console import Console
from torch import nn

from fastgen import analysis_runs
from fastgen.analysis import looked_at
from fastgen.analysis_columns import evaluation_columns, joined
from fastgen.analysis_content import ABOUT
from fastgen.analysis_figures import draw_all
from fastgen.analysis_measures import in_blocks
from fastgen.analysis_tables import all_tables
from fastgen.augment import Normaliser
from fastgen.crops import ShiftCrop
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.errors import UserError
from fastgen.evaluate import main as evaluate_main
from fastgen.laws import confidence_for_eta, ideal_confidence
from fastgen.measuring import Examination
from fastgen.progress import Display
from fastgen.train import main
from fastgen.views import evaluation_views

CPU = torch.device("cpu")
ALONE = {"gen__patriarch": "cross_entropy", "gen__confidence": 1.0, "gen__teacher_weight": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of three generations, three independent networks, and a patriarch alone; on 1,442 digits."""
    here = tmp_path_factory.mktemp("runs")
    recipes = {
        "taught_0": ({"gen__generations": 2}, 0),
        "taught_1": ({"gen__generations": 2}, 1),
        "alone": ({"gen__generations": 2, **ALONE}, 0),
        "patriarch": ({"gen__generations": 0}, 0),
    }
    for name, (settings, seed) in recipes.items():
        path = here / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(**settings)))
        main(["--cfg", str(path), f"--run.dir={here / name}", f"--run.seed={seed}"])
    return here


def analysed(folder: Path, *words: str) -> dict:
    evaluate_main([str(folder), "--analyse", *words])
    return json.loads((folder / "analysis.json").read_text())


@pytest.fixture(scope="module")
def taught(runs):
    return analysed(runs / "taught_0")


def results_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["generations"]


def test_an_analysis_repeats_the_run_s_results(runs, taught):
    rows = results_of(runs / "taught_0")
    assert [row["node"] for row in taught["generations"]] == [row["node"] for row in rows]
    for row, told in zip(rows, taught["generations"], strict=True):
        training, evaluation = told["training"], told["evaluation"]
        # Both have each image's fp32 softmax, and add fp64 in another order.
        for name in ("mean_confidence", "mean_label_confidence"):
            assert training[name] == pytest.approx(row[name], rel=1e-12)
        assert training["top1_error"] == pytest.approx(row["train_top1_error"], rel=1e-9)
        for name in ("top1_error", "nll", "ece"):
            assert evaluation[name] == pytest.approx(row[name], rel=1e-9)
    first = taught["ensembles"]["first_members_top1_error"]
    assert first == pytest.approx([row["ensemble_top1_error"] for row in rows], rel=1e-9)
    assert taught["ensembles"]["all"]["top1_error"] == pytest.approx(first[-1], rel=1e-12)
    last = taught["ensembles"]["last_members_top1_error"]
    assert last[0] == pytest.approx(rows[-1]["top1_error"], rel=1e-9)
    assert last[-1] == pytest.approx(first[-1], rel=1e-12)


def test_laws_are_those_of_the_recipe(taught):
    # The default: confidence 0.6, k 5, teacher_weight 0.6.
    eta = 4 / (4 + 5 * 0.6)
    for g, row in enumerate(taught["generations"]):
        training = row["training"]
        assert training["ideal_confidence"] == pytest.approx(1 - 0.6**g * 0.4, rel=1e-12)
    scores = taught["generations"][0]["training"]["sorted_scores"]
    share = sum(scores[1:5]) / (1 - scores[0])
    start = confidence_for_eta(eta, 5, share)
    for g, row in enumerate(taught["generations"]):
        # The share of fp32 scores: sums of five of them, over what is left beside the first.
        expected = ideal_confidence(start, 0.6, g)
        assert row["training"]["ideal_confidence_at_share"] == pytest.approx(expected, rel=1e-5)


def test_a_file_says_what_it_holds(taught):
    explained = {*ABOUT, "format", "about", "run", "dataset", "model", "percentiles", "bins"}
    assert set(taught) <= explained
    assert taught["about"] == ABOUT
    assert taught["evaluated_on"] == {"part": "test", "samples": 355}
    assert taught["training_images"] == 1442
    for found in taught["second_best"]:
        counts = np.array(found["counts"])
        assert counts.sum() == 1442
        assert (counts.diagonal() == 0).all()
        label, (other, images) = 3, found["frequent"][3][0]
        assert images == counts[label].max() == counts[label, other]
    assert [found["generation"] for found in taught["second_best"]] == [0, 2]
    agreement = np.array(taught["pairs"]["agreement"])
    assert (agreement == agreement.T).all()
    assert (agreement.diagonal() == 1).all()
    assert (np.array(taught["pairs"]["kl"]) >= 0).all()
    assert any(line.startswith("left out: groups of classes") for line in taught["notes"])


def test_figures_are_drawn_on_a_light_background(runs, taught):
    found = sorted(path.stem.removeprefix("analysis_") for path in (runs / "taught_0").glob("analysis_*.png"))
    names = ["calibration", "confidence", "ensembles", "pairs", "second_best_0", "second_best_2"]
    assert found == [*names, "sorted_scores", "time"]
    for path in (runs / "taught_0").glob("analysis_*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] == 1050
        assert (pixels[0, 0], pixels.min() < 80) == (255, True)
        assert len(np.unique(pixels)) > 20


def test_many_generations_and_a_thousand_classes_are_drawn_and_printed(taught, tmp_path):
    """What takes weeks to train: the content of three generations, repeated, and counts in blocks of ten classes."""
    content = dict(taught)
    content["generations"] = [dict(taught["generations"][g % 3], generation=g) for g in range(14)]
    content["pairs"] = {
        name: [[values[a % 3][b % 3] + a for b in range(14)] for a in range(14)]
        for name, values in taught["pairs"].items()
    }
    content["class_names"] = [f"class_{label}" for label in range(1000)]
    counts = torch.randint(0, 9, (1000, 1000), generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)
    most = counts.sort(dim=1, descending=True, stable=True)
    frequent = torch.stack([most.indices, most.values], 2)[:, :5].tolist()
    blocks, images = in_blocks(counts, 10).tolist(), counts.sum(1).tolist()
    shared = {"classes_per_cell": 10, "counts": blocks, "images": images, "frequent": frequent}
    content["second_best"] = [{"generation": 13, **shared}]
    (tmp_path / "analysis_second_best_9.png").write_bytes(b"of a shorter run")
    written = draw_all(tmp_path, content)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert tmp_path / "analysis_second_best_13.png" in written
    console = Console(width=120, record=True, file=io.StringIO())
    for table in all_tables(content):
        console.print(table)
    shown = console.export_text()
    # The last ten: a column for 13, none for 3.
    assert ("b = 13" in shown, "b = 4 " in shown, "b = 3 " in shown) == (True, True, False)
    assert "(the last 10 of 14)" in shown
    assert "…" not in shown


def test_tables_and_notes_are_printed(runs, capsys):
    evaluate_main([str(runs / "taught_0"), "--analyse"])
    shown = capsys.readouterr().out
    for text in ("r-th largest", "most frequent second-best", "calibration", "rank the same class first", "KL(p_a ||"):
        assert text in shown
    assert "3 networks, training images: 1442 of 1442" in shown
    assert "left out: groups of classes: none are known of digits" in shown
    assert str(runs / "taught_0" / "analysis.json") in shown


@pytest.mark.parametrize(
    ("teachers", "alone"),
    # Generation 2 learned from labels alone.
    [(1, [1, 3, 4, 12]), (2, [1, 3, 4, 8 + 4 + 2 + 1])],
)
def test_a_student_takes_the_seconds_of_all_its_teachers(teachers, alone):
    roles = ["patriarch", "student", "independent", "student"]
    rows = [{"generation": g, "role": role, "node": str(g), "train_seconds": 2.0**g} for g, role in enumerate(roles)]
    record = SimpleNamespace(recipe={"gen": {"ensemble_teachers": teachers}}, results={"generations": rows})
    found = analysis_runs.rows_of(record)
    assert [row["seconds_alone"] for row in found] == alone
    assert [row["seconds_together"] for row in found] == [1, 3, 7, 15]


@pytest.mark.parametrize("once", [True, False])
def test_runs_are_compared_by_recipe(once, runs, taught):
    first, second = str(runs / "taught_1"), str(runs / "alone")
    others = ["--against", first, second] if once else [f"--against={first}", "--against", second]
    content = analysed(runs / "taught_0", *others)
    recipes = {recipe["name"]: recipe for recipe in content["comparison"]}
    assert {name: len(recipe["runs"]) for name, recipe in recipes.items()} == {"taught": 2, "alone": 1}
    rows = [results_of(runs / name) for name in ("taught_0", "taught_1")]
    for g, point in enumerate(recipes["taught"]["points"]):
        assert (point["generation"], point["members"], point["runs"]) == (g, g + 1, 2)
        a, b = (run[g]["ensemble_top1_error"] for run in rows)
        assert point["ensemble_top1_error"]["mean"] == pytest.approx((a + b) / 2, rel=1e-12)
        assert point["ensemble_top1_error"]["deviation"] == pytest.approx(abs(a - b) / math.sqrt(2), rel=1e-9)
        seconds = [sum(row["train_seconds"] for row in run[: g + 1]) for run in rows]
        for name in ("seconds_alone", "seconds_together"):
            assert point[name]["mean"] == pytest.approx(sum(seconds) / 2, rel=1e-9)
        # The second seed is not analysed: of the last networks' ensembles there is no mean over both.
        assert point["last_members_top1_error"] is None
    independent = results_of(runs / "alone")
    for g, point in enumerate(recipes["alone"]["points"]):
        # A network that nobody taught takes its own training alone; an ensemble takes all of it.
        assert point["seconds_alone"]["mean"] == pytest.approx(independent[g]["train_seconds"])
        total = sum(row["train_seconds"] for row in independent[: g + 1])
        assert point["seconds_together"]["mean"] == pytest.approx(total)
        assert point["top1_error"]["deviation"] is None
    assert content["patriarchs"] == []
    (bare,) = [line for line in content["notes"] if "without an analysis.json" in line]
    assert bare.endswith(f": {first}, {second}")


def test_what_another_run_s_analysis_adds(runs, taught):
    alone = analysed(runs / "alone")
    content = analysed(runs / "taught_0", f"--against={runs / 'alone'}")
    (recipe,) = [recipe for recipe in content["comparison"] if recipe["name"] == "alone"]
    told = [point["last_members_top1_error"]["mean"] for point in recipe["points"]]
    assert told == alone["ensembles"]["last_members_top1_error"]
    scores = alone["generations"][0]["training"]["sorted_scores"]
    assert content["patriarchs"] == [{"run": str(runs / "alone"), "sorted_scores": scores}]
    # On other samples its errors would be others: such an analysis is not taken.
    analysed(runs / "alone", "--data.val_limit=100")
    content = analysed(runs / "taught_0", f"--against={runs / 'alone'}")
    assert content["patriarchs"] == []


def test_a_patriarch_alone_is_analysed(runs):
    content = analysed(runs / "patriarch")
    assert (content["pairs"], content["ensembles"]["all"]) == (None, None)
    assert len(content["second_best"]) == 1
    assert any("there is one network" in line for line in content["notes"])
    found = sorted(path.stem for path in (runs / "patriarch").glob("analysis_*.png"))
    assert not {"analysis_pairs", "analysis_ensembles"} & set(found)
    assert {"analysis_confidence", "analysis_time", "analysis_second_best_0"} <= set(found)


def test_a_generation_under_a_named_teacher_has_no_law_and_no_ensemble(runs, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(gen__generations=2)))
    words = [f"--run.nodes={runs / 'nodes'}", "--gen.only=2", f"--gen.teacher={runs / 'alone' / 'generation_0'}"]
    main(["--cfg", str(tmp_path / "tiny.yaml"), f"--run.dir={tmp_path / 'run'}", *words])
    content = analysed(tmp_path / "run", f"--against={runs / 'patriarch'}")
    assert [row["generation"] for row in content["generations"]] == [2]
    assert content["generations"][0]["training"]["ideal_confidence"] is None
    (point,) = content["comparison"][0]["points"]
    assert (point["generation"], point["ensemble_top1_error"]) == (2, None)
    notes = "\n".join(content["notes"])
    assert "ideal law of generation 2: none is known" in notes
    assert "generations before 2: are another run's" in notes


def test_a_generation_that_is_not_finished_is_left_out(runs, tmp_path):
    shutil.copytree(runs / "taught_0", tmp_path / "run", symlinks=True)
    folder = tmp_path / "run"
    for generation in range(3):
        link = folder / f"generation_{generation}"
        target = (runs / "taught_0" / link.name).resolve()
        link.unlink()
        os.symlink(target, link)
    (folder / "generation_old").mkdir()
    results = json.loads((folder / "results.json").read_text())
    results["generations"] = results["generations"][:2]
    (folder / "results.json").write_text(json.dumps(results))
    content = analysed(folder)
    assert [row["generation"] for row in content["generations"]] == [0, 1]
    assert "left out: generation 2: is not trained and measured to its end" in content["notes"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{taught_0}", "--against={alone}"], "give --analyse too"),
        (["{taught_0}", "--analyse", "--against"], "--against has no value"),
        (["{taught_0}", "--analyse", "--against="], "--against has no value"),
        (["{taught_0}", "--analyse", "--against=nowhere"], "nowhere: is no run folder"),
        (["{taught_0}", "--analyse", "--against={taught_0}"], "named twice"),
        (["{taught_0}", "--analyse", "--against={taught_1}", "--against={taught_1}"], "named twice"),
        (["{taught_0}", "--analyse", "--data.backend=synthetic"], "random images have nothing to analyse"),
        (["{taught_0}", "--analyze"], "--analyze"),
        (["{taught_0}/generation_0/model.safetensors", "--analyse"], "needs a run folder"),
        (["--analyse"], "usage"),
    ],
)
def test_mistakes_are_told(runs, words, text):
    places = {path.name: str(path) for path in runs.iterdir() if path.is_dir()}
    with pytest.raises(UserError) as told:
        evaluate_main([word.format(**places) for word in words])
    assert text in str(told.value)
    assert "\n" not in str(told.value)


def test_runs_on_other_images_are_not_compared(runs, tmp_path):
    for name, setting in (("fewer", "data__val_limit"), ("held", "data__holdout")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(gen__generations=0, **{setting: 100})))
        main(["--cfg", str(path), f"--run.dir={tmp_path / name}"])
        with pytest.raises(UserError, match=r"was measured on 100 (test|holdout) images of digits"):
            evaluate_main([str(runs / "taught_0"), "--analyse", f"--against={tmp_path / name}"])


class Lookup(nn.Module):
    """A network whose logits are known: it reads the number of the sample out of the picture."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images_NCHW):
        return self.logits[(images_NCHW[:, 0, 0, 0] + 256 * images_NCHW[:, 0, 0, 1]).round().long()]


def numbered(count=700, classes=10):
    """Pictures that hold their numbers, and what two networks say of them."""
    pixels = np.zeros((count, 2, 2, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = np.arange(count) % 256, np.arange(count) // 256
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    split = Split(pixels, labels.numpy(), np.arange(count))
    # (pixel / 255 - 0) / (1 / 255) = pixel
    normalise = Normaliser((0.0,), (1 / 255,), CPU, torch.float32)
    views = evaluation_views(split.ids, ShiftCrop(2, 2, 0, flip=False))
    on = Examination(ResidentLoader(split, 0, CPU), views, normalise, 5, CPU)
    return on, labels, [torch.randn(count, classes, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("size", [1, 64, 699, 5000])
def test_networks_see_each_sample_once_whatever_the_batch(size):
    on, labels, logits = numbered()
    networks = [Lookup(values).eval() for values in logits]
    display = Display(Console(quiet=True))
    found = joined([evaluation_columns(*seen) for seen in looked_at(networks, on, "images", display, size)])
    whole = evaluation_columns(logits, labels)
    for name, value in vars(whole).items():
        assert torch.equal(getattr(found, name), value), name


def test_scores_that_are_no_numbers_are_refused():
    on, _, logits = numbered()
    logits[1][650, 3] = math.nan
    display = Display(Console(quiet=True))
    with pytest.raises(UserError, match="network 1 of 2 gives scores that are no numbers"):
        list(looked_at([Lookup(values).eval() for values in logits], on, "images", display))


def test_cifar100_is_told_by_its_groups(fake_cifar100, tmp_path):
    recipe = tiny_recipe(data__dataset="cifar100", data__root=str(fake_cifar100), gen__generations=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    main(["--cfg", str(tmp_path / "tiny.yaml"), f"--run.dir={tmp_path / 'run'}"])
    content = analysed(tmp_path / "run")
    assert content["groups"]["of_class"][:3] == [4, 1, 14]
    for row in content["generations"]:
        near = row["training"]["in_group"]
        assert near["others_by_chance"] == pytest.approx(16 / 99, rel=1e-9)
        assert 0 <= near["others"] <= 4
        rest = (1 - row["training"]["mean_label_confidence"]) * 4 / 99
        assert near["mass_by_chance"] == pytest.approx(rest, rel=1e-9)
    assert (tmp_path / "run" / "analysis_groups.png").exists()
