"""Whole steps as programs: on a CPU all but the capture itself. They learn what steps one by one learn."""

import json
import signal
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.checks_training import AGREE_LR, AGREE_RELATIVE, AGREE_STEPS, OBJECTIVES, memorisable_split
from benchmarks.gpu_check import SMALL_FACTS
from benchmarks.rigs import PATRIARCH, STUDENT, Case, make_rig, supply_of
from fastgen import engines, trainer
from fastgen.data.resident import ResidentLoader
from fastgen.engines import GraphEngine, Plant, StepByStep, make_engine
from fastgen.errors import Stopped, UserError
from fastgen.grade import make_grade
from fastgen.learner import make_learner
from fastgen.lessons import LookAhead
from fastgen.meters import Meter, Tally
from fastgen.models import build_model, initialise
from fastgen.programs import Program
from fastgen.recipe import read_recipe
from fastgen.step import DTYPES
from fastgen.teacher import make_teacher
from fastgen.train import main
from fastgen.views import training_views

CPU = torch.device("cpu")
# 4 whole batches and one of 8: with 3 steps a program there are programs of three, of one, and of the rest.
IMAGES, BATCH, AT_ONCE = 72, 16, 3

RECIPE = """
data: {dataset: digits, train_limit: 150, val_limit: 100}
model: {name: resnet8}
train: {epochs: 2, batch_size: 32}
gen: {generations: 1}
run: {eval_every_epochs: 0}
"""


def case_of(precision="fp32", images=IMAGES, **settings):
    split = memorisable_split(SMALL_FACTS, images, seed=3)
    return Case("resnet8", BATCH, precision, SMALL_FACTS, split, CPU, graph_steps=AT_ONCE, **settings)


def plant_of(case, engine, accumulate_steps=1, ahead=0, objective=STUDENT):
    """A student's plant on the case, with its teacher asked within the step, or ahead of so many of them."""
    loader = ResidentLoader(case.split, case.facts.pad_px, CPU)
    model = initialise(build_model(case.model, case.facts.classes, 3, "strided"), 0)
    other = initialise(build_model(case.model, case.facts.classes, 3, "strided"), 1)
    teacher = make_teacher(other, CPU, DTYPES[case.precision])
    supply = supply_of(case, loader, teacher if objective.teacher_weight and not ahead else None)
    if ahead:
        looking = LookAhead(loader, teacher, supply.prepare, ahead, case.facts.classes)
        supply = replace(supply, ahead=looking, loader=looking, dress=looking.dress)
    train = case.settings(engine)
    object.__setattr__(train, "accumulate_steps", accumulate_steps)
    model = model.to(memory_format=torch.channels_last).train()
    learner = make_learner(model, make_grade(objective), supply.live_teacher, supply.prepare, train, CPU)
    sizes = sorted({min(BATCH, len(case.split)), len(case.split) % BATCH} - {0})
    shapes = [(size, case.facts.height_px, case.facts.width_px) for size in sizes]
    return Plant(learner, supply, train, len(case.split), shapes, 3, False, CPU)


def epoch_views(case, epoch=0):
    return training_views(case.split.ids, case.crop, data_seed=0, generation=0, epoch=epoch)


def losses_of(tally):
    values = torch.cat([values.reshape(-1).double() for values in tally.loss_sums])
    return (values / torch.tensor(tally.images)).tolist()


def train_on(plant, case, lrs, first_batch=0):
    """(losses of an epoch, state after it, steps of each item)"""
    engine, losses, counts = make_engine(plant), [], []
    for tally in engine.epoch(epoch_views(case), first_batch, lrs):
        losses += losses_of(tally)
        counts.append(tally.count)
    return losses, plant.learner.model.state_dict(), counts


@pytest.mark.parametrize("role", list(OBJECTIVES))
def test_the_losses_of_the_first_steps_are_those_of_eager(role):
    case, found = case_of(), {}
    for engine in ("eager", "graph"):
        loader = ResidentLoader(case.split, case.facts.pad_px, CPU)
        rig = make_rig(case, engine, OBJECTIVES[role], loader, lr=AGREE_LR, whole_epochs=True)
        losses = []
        while len(losses) < AGREE_STEPS:
            losses += losses_of(next(rig.tallies))
        found[engine] = np.array(losses[:AGREE_STEPS])
    assert np.isfinite(found["eager"]).all()
    assert np.abs(found["graph"] / found["eager"] - 1).max() <= AGREE_RELATIVE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_steps": 3},
        {"ahead": 3},
        {"ahead": 1},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"images": 64},
        {"images": 48},
        {"images": 16},
        {"images": 7},
    ],
    ids=str,
)
def test_programs_take_the_steps_of_an_epoch(settings):
    settings = dict(settings)
    of_case = {name: settings.pop(name) for name in ("precision", "images") if name in settings}
    case = case_of(**of_case)
    steps = -(-len(case.split) // BATCH)
    # Another one in each step: a program that kept one of them would show.
    lrs = [0.02 * (step + 1) for step in range(steps)]
    eager, eager_state, ones = train_on(plant_of(case, "eager", **settings), case, lrs)
    graph, graph_state, counts = train_on(plant_of(case, "graph", **settings), case, lrs)
    full = len(case.split) // BATCH
    assert counts == [AT_ONCE] * (full // AT_ONCE) + [1] * (full % AT_ONCE) + [1] * bool(len(case.split) % BATCH)
    assert ones == [1] * steps
    # A learning rate is kept as fp32 in a program, to 2^-24; the weights move by 1e-2 and more.
    tolerance = 1e-5 if case.precision == "fp32" else 2e-2
    np.testing.assert_allclose(graph, eager, rtol=tolerance)
    for name, tensor in eager_state.items():
        torch.testing.assert_close(graph_state[name], tensor, rtol=tolerance, atol=tolerance)


def test_an_epoch_goes_on_in_its_middle():
    case = case_of(images=104)
    lrs = [0.05] * 7
    whole, state, _ = train_on(plant_of(case, "graph"), case, lrs)
    plant = plant_of(case, "graph")
    engine = make_engine(plant)
    tallies = engine.epoch(epoch_views(case), 0, lrs)
    first = next(tallies)
    tallies.close()
    rest = [
        loss for tally in engine.epoch(epoch_views(case), first.count, lrs[first.count :]) for loss in losses_of(tally)
    ]
    assert losses_of(first) + rest == whole
    assert all(torch.equal(tensor, state[name]) for name, tensor in plant.learner.model.state_dict().items())


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_building_an_engine_changes_nothing(engine, precision):
    plant = plant_of(case_of(precision), engine)
    learner = plant.learner
    # From where a resumed run would begin: with momentum, and a scale that has moved.
    batch = plant.supply.source.execute(plant.supply.source.columns(epoch_views(case_of()), np.arange(BATCH)))
    learner.step(batch, 0.05)
    learner.optimizer.zero_grad()
    momenta = [state["momentum_buffer"] for state in learner.optimizer.state.values()]
    before = [tensor.clone() for tensor in (*learner.model.state_dict().values(), *momenta)]
    scaler = learner.scaler.state_dict()
    make_engine(plant)
    after = [*learner.model.state_dict().values(), *momenta]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert learner.scaler.state_dict() == scaler
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    # The very tensors: what a program was captured with.
    for kept, state in zip(momenta, learner.optimizer.state.values(), strict=True):
        assert kept is state["momentum_buffer"]


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values that go to the host, or come from it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert name not in self.FORBIDDEN, f"{func} in a program"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"accumulate_steps": 2}, {"ahead": 3}, {"objective": PATRIARCH}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_program_waits_for_nothing(precision, settings):
    case = case_of(precision)
    plant = plant_of(case, "graph", **settings)
    engine = GraphEngine(plant)
    columns = plant.supply.source.columns(epoch_views(case), epoch_views(case).order)
    assert {steps for _, steps in engine._programs} == {1, AT_ONCE}
    for (size, steps), program in engine._programs.items():
        part = {name: column[: size * steps] for name, column in columns.items()}
        with NoWaiting():
            program.run(part, torch.full((steps,), 0.1))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(()).item()


def test_a_program_keeps_its_inputs_and_gives_away_its_outputs():
    seen, written = [], torch.zeros(2)

    def body(columns, lrs):
        seen.append((columns["x"], lrs))
        # As a graph does: each time to the same memory.
        written.copy_((columns["x"].sum() * lrs[0]).expand(2))
        return Tally((0, 1), (3, 3), (written,), (written,))

    program = Program(body, {"x": torch.zeros(3)}, 2, CPU)
    first = program.run({"x": torch.tensor([1.0, 2, 3])}, torch.tensor([0.5, 1]))
    second = program.run({"x": torch.tensor([2.0, 2, 3])}, torch.tensor([2.0, 1]))
    assert (first.loss_sums[0].tolist(), second.loss_sums[0].tolist()) == ([3, 3], [14, 14])
    assert (first.correct[0].tolist(), second.correct[0].tolist()) == ([3, 3], [14, 14])
    assert len({id(tensor) for inputs in seen for tensor in inputs}) == 2
    with pytest.raises(ValueError, match=r"x is \(2,\), the program takes \(3,\)"):
        program.run({"x": torch.zeros(2)}, torch.zeros(2))
    with pytest.raises(ValueError, match="takes x, and was given y"):
        program.run({"y": torch.zeros(3)}, torch.zeros(2))


class FakeCapture:
    """Keeps what a capture is asked for, and calls where a GPU would capture."""

    warm_up_passes = 3

    def __init__(self):
        self.asked = []

    @contextmanager
    def beside(self):
        self.asked.append("warm up")
        yield

    def graph_of(self, call):
        tally = call()
        self.asked.append(sum(tally.images))
        return call


@pytest.mark.parametrize("ahead", [0, 2])
def test_all_programs_are_warmed_up_then_captured_largest_first(monkeypatch, ahead):
    case, made = case_of(images=104), []
    monkeypatch.setattr(engines, "Capture", lambda stream, joined: made.append(FakeCapture()) or made[-1])
    plant = plant_of(case, "graph", ahead=ahead)
    object.__setattr__(plant.train, "graph_steps", 4)
    object.__setattr__(plant.learner, "stream", "a stream")
    monkeypatch.setattr(engines, "Program", lambda body, inputs, steps, device: Program(body, inputs, steps, CPU))
    before = {name: tensor.clone() for name, tensor in plant.learner.model.state_dict().items()}
    engine = GraphEngine(plant)
    # Six whole batches and one of 8: four at once, what is left in groups of the look ahead or one by one, the rest.
    images = [4 * BATCH, 2 * BATCH, 8] if ahead else [4 * BATCH, BATCH, 8]
    assert len(made) == 1, "programs that share no capture share no memory"
    assert made[0].asked == ["warm up"] * 3 + images
    assert engine.how == "graphs of 4 steps"
    assert all(torch.equal(tensor, before[name]) for name, tensor in plant.learner.model.state_dict().items())


def test_engines_of_earlier_generations_are_gone_when_the_next_is_made(write_recipe, tmp_path, monkeypatch):
    alive, found, right = weakref.WeakSet(), [], GraphEngine.__init__

    def noted(engine, plant):
        found.append(len(alive))
        alive.add(engine)
        right(engine, plant)

    monkeypatch.setattr(GraphEngine, "__init__", noted)
    recipe = write_recipe(data__train_limit=150, train__engine="graph", gen__generations=2)
    main(["--cfg", str(recipe), f"--run.dir={tmp_path / 'run'}"])
    # Each would keep its graphs' memory on the GPU.
    assert found == [0, 0, 0]


def test_the_teacher_sees_the_same_groups_whatever_a_graph_holds():
    case, groups = case_of(images=120), {}
    for at_once in (6, 4, 2):
        plant = plant_of(case, "graph", ahead=2)
        object.__setattr__(plant.train, "graph_steps", at_once)
        engine = make_engine(plant)
        teacher, seen = plant.supply.ahead._teacher, []
        plant.supply.ahead._teacher = lambda images, teacher=teacher, seen=seen: (
            seen.append(len(images)) or teacher(images)
        )
        assert sum(tally.count for tally in engine.epoch(epoch_views(case), 0, [0.1] * 8)) == 8
        groups[at_once] = seen
    assert groups[6] == groups[4] == groups[2] == [32, 32, 32, 16, 8]


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_teacher_that_is_asked_before_the_steps_is_rehearsed(engine):
    plant = plant_of(case_of(), engine, ahead=3)
    object.__setattr__(plant.supply, "source", None)
    teacher, seen = plant.supply.ahead._teacher, []
    plant.supply.ahead._teacher = lambda images: seen.append(len(images)) or teacher(images)
    make_engine(plant)
    # Groups of three batches of 16, and what 72 images leave.
    assert sorted(seen) == [24, 48]


def words(folder, name, *more):
    (folder / "tiny.yaml").write_text(RECIPE)
    place = [f"--run.dir={folder / name}", f"--run.nodes={folder / f'nodes_{name}'}"]
    return ["--cfg", str(folder / "tiny.yaml"), *place, *more]


def weights(folder, name):
    return [load_file(folder / name / f"generation_{generation}" / "model.safetensors") for generation in range(2)]


WAYS = [
    [],
    ["--teacher.look_ahead_batches=2"],
    ["--teacher.engine=fused"],
    ["--teacher.labels=table"],
    ["--train.accumulate_steps=2"],
    ["--data.rotation_degrees=8"],
    ["--train.lr_schedule=cosine", "--train.warmup_epochs=1"],
]


@pytest.mark.parametrize("more", WAYS, ids=" ".join)
def test_a_run_by_graph_ends_as_one_by_eager(tmp_path, more):
    main(words(tmp_path, "eager", *more))
    main(words(tmp_path, "graph", "--train.engine=graph", "--train.graph_steps=2", *more))
    for ours, theirs in zip(weights(tmp_path, "graph"), weights(tmp_path, "eager"), strict=True):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    results = json.loads((tmp_path / "graph" / "results.json").read_text())
    assert [row["path"]["step"] for row in results["generations"]] == ["programs of 2 steps, not captured: no GPU"] * 2
    assert [row["engine"] for row in results["generations"]] == ["graph"] * 2


@pytest.mark.parametrize("more", [*WAYS[:4], ["--train.precision=fp16"]], ids=" ".join)
def test_a_run_by_graph_that_is_stopped_ends_with_the_same_bits(tmp_path, monkeypatch, more):
    more = ["--train.engine=graph", "--train.graph_steps=2", *more]
    main(words(tmp_path, "whole", *more))
    take, taken, stops = trainer.Training.take, 0, (2, 5, 13)

    def stopping(training, tally):
        nonlocal taken
        before = taken
        take(training, tally)
        taken += tally.count
        if any(before < stop <= taken for stop in stops):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer.Training, "take", stopping)
    for _ in stops:
        with pytest.raises(Stopped):
            main(words(tmp_path, "stopped", *more))
    main(words(tmp_path, "stopped", *more))
    for ours, theirs in zip(weights(tmp_path, "stopped"), weights(tmp_path, "whole"), strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_log_lines_come_where_programs_pass_their_steps(tmp_path):
    main(words(tmp_path, "run", "--train.engine=graph", "--train.graph_steps=2", "--run.log_every_steps=3"))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "step" and event["generation"] == 0]
    # 150 images in batches of 32: programs end at steps 2, 4 and 5 of each epoch; its end is always told.
    assert steps == [4, 5, 7, 9, 10]


def test_what_a_graph_cannot_do_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"train\.graph_steps = 0: give 1 or more"):
        read_recipe(words(tmp_path, "run", "--train.graph_steps=0"))
    with pytest.raises(UserError, match=r"a graph of train\.graph_steps = 8 holds no whole number of such groups"):
        read_recipe(words(tmp_path, "run", "--train.engine=graph", "--teacher.look_ahead_batches=3"))


def test_a_meter_takes_what_programs_give():
    case = case_of()
    plant, meter, step = plant_of(case, "graph"), Meter(), 0
    for tally in make_engine(plant).epoch(epoch_views(case), 0, [0.1] * 5):
        meter.add(step, tally)
        step += tally.count
    reading = meter.read()
    assert (step, reading.images) == (5, IMAGES)
    assert 0 < reading.loss < 10
    assert isinstance(make_engine(plant_of(case, "compile")), StepByStep)
