"""Several processes take the steps of one: gradients, batch-norm, samples, stops and resumes."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from processes import run_processes

from fastgen import train as train_command
from fastgen.augment import Normaliser
from fastgen.batchnorm_sync import synchronise
from fastgen.buffers import merge_statistics, merged_statistics, own_statistics
from fastgen.checkpoint import read_weights
from fastgen.config import TrainSettings
from fastgen.data.batch import Batch
from fastgen.distributed import ALONE, Group
from fastgen.errors import Stopped, Told, UserError
from fastgen.grade import make_grade
from fastgen.learner import Learner, make_learner
from fastgen.models import build_model, initialise
from fastgen.plan import Objective
from fastgen.pulse import Pulse, StopsOfAll, Wish
from fastgen.recipe import read_recipe
from fastgen.shapes import own_bounds, part_bounds
from fastgen.step import DTYPES
from fastgen.views import Share

CPU = torch.device("cpu")
STEPS, BATCH, ODD = 20, 32, 13
BATCHNORM = torch.nn.BatchNorm2d

# How a training of STEPS steps is done: precision, fp64 throughout, engine, and whether batch-norm is frozen, of each
# process's part alone, or of the whole batch.
PLAIN = {"precision": "fp32", "double": False, "engine": "eager", "norm": "frozen", "steps": STEPS}


def learner_of(group, parts, *, precision, double, engine, norm, **_):
    train = TrainSettings(epochs=1, batch_size=BATCH, accumulate_steps=parts, precision=precision, engine=engine)
    model = initialise(build_model("resnet8", 10, 3, "strided"), 0).to(memory_format=torch.channels_last).train()
    if double:
        model = model.double()
    if norm == "frozen":
        for module in model.modules():
            if isinstance(module, BATCHNORM):
                module.eval()
    if norm == "synchronised" and group.world > 1:
        model = synchronise(model, CPU)
    grade = make_grade(Objective(eta=4 / 7, k=5))
    return make_learner(model, grade, None, lambda images, jitter: images, train, CPU, 2, group)


def trained(group, parts, how):
    """Weights and statistics after some steps; every fifth batch is of another, odd size."""
    torch.set_num_threads(1)
    learner = learner_of(group, parts, **how)
    dtype = torch.float64 if how["double"] else DTYPES[how["precision"]]
    draw = torch.Generator().manual_seed(1)
    for step in range(how["steps"]):
        images = ODD if step % 5 == 4 else BATCH
        pixels = torch.randn(images, 3, 8, 8, generator=draw, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, 10, (images,), generator=draw)
        mine = slice(*group.share.bounds(images))
        own = Batch(pixels[mine].contiguous(memory_format=torch.channels_last), labels[mine], labels[mine])
        learner.step(own, 0.05, images)
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def all_trained(group, cases):
    return [trained(group, parts, {**PLAIN, **how}) for parts, how in cases]


def furthest(one, two, *, statistics=False):
    names = [name for name in one if statistics or not name.endswith(("running_mean", "running_var", "tracked"))]
    return max((one[name].double() - two[name].double()).abs().max().item() for name in names)


CASES = {
    "fp32": (1, {}),
    "bf16": (1, {"precision": "bf16"}),
    "fp16": (1, {"precision": "fp16"}),
    "ordinary batch-norm": (1, {"norm": "local"}),
    "compiled": (1, {"precision": "bf16", "engine": "compile", "steps": 6}),
    "fp64": (1, {"double": True}),
    "fp64, two parts each": (4, {"double": True}),
    "fp64, three parts in all": (3, {"double": True}),
    "one step": (1, {"steps": 1}),
    "bf16, two parts each, one step": (4, {"precision": "bf16", "steps": 1}),
    "fp64, synchronised batch-norm": (1, {"double": True, "norm": "synchronised"}),
    "fp64, ordinary batch-norm": (1, {"double": True, "norm": "local"}),
}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Weights of each case, by each of two processes."""
    answers = run_processes(tmp_path_factory.mktemp("two"), 2, all_trained, list(CASES.values()))
    return {name: [answer[number] for answer in answers] for number, name in enumerate(CASES)}


def by_one(name, parts):
    return trained(ALONE, parts, {**PLAIN, **CASES[name][1]})


@pytest.mark.parametrize("name", list(CASES))
def test_all_processes_have_the_same_weights(by_two, name):
    first, second = by_two[name]
    assert furthest(first, second) == 0


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "ordinary batch-norm", "compiled", "fp64"])
def test_two_processes_take_the_very_steps_of_one_that_adds_up_two_parts(by_two, name):
    assert furthest(by_two[name][0], by_one(name, 2)) == 0


@pytest.mark.parametrize(("name", "parts"), [("fp64", 1), ("fp64, two parts each", 1), ("fp64, three parts in all", 1)])
def test_in_fp64_they_take_the_steps_of_the_whole_batch(by_two, name, parts):
    # 20 steps; sums of some hundred terms, in another order.
    assert furthest(by_two[name][0], by_one(name, parts)) < 1e-12


def test_one_step_in_fp32_is_that_of_the_whole_batch(by_two):
    assert 0 < furthest(by_two["one step"][0], by_one("one step", 1)) < 1e-6


def test_sixteen_bit_gradients_are_summed_in_fp32(by_two):
    """A sum in 16 bits would be off by 2^-9 of a gradient; the parts' gradients themselves are the same."""
    name = "bf16, two parts each, one step"
    assert furthest(by_two[name][0], by_one(name, 4)) < 1e-7


def last_timed(group):
    learner = learner_of(group, 1, **PLAIN)
    images_NCHW, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    for _ in range(103):
        learner.step(Batch(images_NCHW, labels, labels), 0.0, 2)
    return learner.reducer._wrapped._get_ddp_logging_data()["iteration"]


def test_gradients_are_not_timed_behind_the_first_steps(tmp_path):
    # DDP waits for the device to tell how long a step took: as it was, of the first ten and of every hundredth, which
    # may be one that is captured.
    assert max(run_processes(tmp_path, 2, last_timed)) <= 10


def test_synchronised_batch_norm_sees_the_whole_batch(by_two):
    name = "fp64, synchronised batch-norm"
    assert furthest(by_two[name][0], by_one(name, 1), statistics=True) < 1e-12
    # And that is not what it sees otherwise: ordinary statistics are of each process's images.
    ordinary = "fp64, ordinary batch-norm"
    assert furthest(by_two[ordinary][0], by_one(ordinary, 1)) > 1e-3


def shares_add_up(images, parts, world):
    whole = part_bounds(images, world * -(-parts // world))
    own = [own_bounds(images, parts, Share(rank, world)) for rank in range(world)]
    begins = [Share(rank, world).bounds(images)[0] for rank in range(world)]
    return sorted({begin + bound for begin, bounds in zip(begins, own, strict=True) for bound in bounds}) == whole


def test_parts_of_all_processes_are_those_that_one_would_form():
    for images in range(1, 70):
        for parts in (1, 2, 3, 5, 8):
            for world in (1, 2, 3, 4, 8):
                assert shares_add_up(images, parts, world), (images, parts, world)


def statistics_of(group):
    model = build_model("resnet8", 10, 3, "strided")
    with torch.no_grad():
        for number, buffer in enumerate(model.buffers()):
            if buffer.is_floating_point():
                buffer.fill_(number + 1 + group.rank)
    before = own_statistics(model)
    with merged_statistics(model, group, "mean"):
        inside = own_statistics(model)
    after = own_statistics(model)
    merge_statistics(model, group, "first")
    return before, inside, after, own_statistics(model)


def test_running_statistics_are_brought_together_as_the_recipe_says(tmp_path):
    answers = run_processes(tmp_path, 3, statistics_of)
    for before, inside, after, first in answers:
        assert torch.equal(after, before)
        assert torch.equal(inside, answers[1][0])  # numbers n, n + 1, n + 2: the mean is the second's
        assert torch.equal(first, answers[0][0])


def asked_by_one(group):
    """Steps at which processes stop and save where one alone wishes it, and what the others tell meanwhile."""
    pulse, found = Pulse(group), []
    for step in range(6):
        stop = 15 if group.rank == 1 and step == 2 else 0
        wish = pulse.beat(Wish(stop, group.main and step == 0))
        found.append((step, *wish))
        if wish.stop:
            break
    end = pulse.now(Wish(0, group.rank == 0))
    turn = []
    try:
        group.in_turn(lambda: fail() if group.main else turn.append("called"))
    except UserError:
        turn.append("own error")
    except Told as told:
        turn.append(told.exit_code)
    return found, tuple(end), turn, group.agree(group.rank), group.gather(group.rank), group.most([group.rank, -1])


def fail():
    raise UserError("the main process alone can tell")


def test_processes_agree_a_step_later(tmp_path):
    answers = run_processes(tmp_path, 3, asked_by_one)
    for rank, (found, end, turn, agreed, gathered, most) in enumerate(answers):
        assert found == [(0, 0, False), (1, 0, True), (2, 0, False), (3, 15, False)]
        assert end == (0, True)
        assert turn == (["own error"] if rank == 0 else [2])
        assert (agreed, gathered, most) == (0, [0, 1, 2], [2, -1])


def test_alone_a_wish_is_fulfilled_at_once():
    pulse = Pulse(ALONE)
    assert pulse.beat(Wish(15, True)) == (15, True)
    assert pulse.now(Wish(0, False)) == (0, False)
    assert ALONE.most([3]) == [3]
    assert ALONE.in_turn(lambda: "done") == "done"


def stopped_while_the_main_process_works(group):
    """What each process meets where a signal comes to the last one alone, and what it meets where none comes."""
    asked = SimpleNamespace(number=0)
    ended = []
    for signalled in (False, True):
        asked.number = signal.SIGTERM if signalled and group.rank == group.world - 1 else 0
        stops = StopsOfAll(group, asked)
        try:
            if group.main:
                stops.check()
                stops.check()
                stops.end()
            else:
                stops.wait()
            ended.append("went on")
        except Stopped as stopped:
            ended.append(stopped.exit_code)
    plan = (SimpleNamespace(node="same"), SimpleNamespace(node="same" if group.rank < 2 else "another"))
    try:
        train_command._require_one_plan(plan, group)
    except UserError as error:
        ended.append(str(error))
    return ended


def test_a_signal_to_one_ends_what_the_main_process_does_alone_and_other_plans_are_refused(tmp_path):
    for ended in run_processes(tmp_path, 3, stopped_while_the_main_process_works):
        assert ended[:2] == ["went on", 128 + signal.SIGTERM]
        assert ended[2].startswith("process 2 of 3 has another recipe or other data than process 0")


# Whole runs: two generations, a last batch that is smaller, odd shares.
RUN = {
    "data": {"dataset": "digits", "train_limit": 200, "val_limit": 60},
    "model": {"name": "resnet8"},
    "train": {"epochs": 3, "batch_size": 32, "lr": 0.05},
    "gen": {"generations": 1, "k": 3},
    "run": {"device": "cpu", "save_minutes": 60, "eval_every_epochs": 2, "log_every_steps": 5},
}
STEPS_IN_EPOCH = 7


def whole_run(group: Group, folder: str, words: list[str], stop_after: int | None) -> tuple[list[list[int]], str]:
    """Ids of this process's samples in each step, and a fingerprint of the run ('' where it was stopped).

    Args:
        group: of the run.
        folder: has recipe.yaml; the run goes into it.
        words: for the command line.
        stop_after: steps after which a signal comes to the last process alone.
    """
    from fastgen import train
    from fastgen.training import Training

    torch.set_num_threads(1)
    seen, taken = [], 0
    step, take = Learner.step, Training.take

    def seeing(learner, batch, lr, images=None):
        # Rehearsals before the training have a learning rate of 0, or samples of one id.
        if len(set(batch.ids.tolist())) == len(batch.ids) and float(lr):
            seen.append(batch.ids.tolist())
        return step(learner, batch, lr, images)

    def taking(training, tally):
        nonlocal taken
        take(training, tally)
        taken += tally.count
        if stop_after is not None and group.rank == group.world - 1 and taken >= stop_after:
            signal.raise_signal(signal.SIGTERM)
            training_stops.append(taken)

    training_stops: list[int] = []
    Learner.step, Training.take = seeing, taking
    try:
        recipe = read_recipe([f"--cfg={folder}/recipe.yaml", f"--run.dir={folder}/run", *words])
        train.train(recipe, group, words, time.monotonic())
    except Stopped:
        return seen, ""
    finally:
        Learner.step, Training.take = step, take
    return seen, fingerprint(Path(folder)) if group.main else ""


def fingerprint(folder: Path) -> str:
    """Equal only for the same weights, losses and results."""
    found = []
    for generation in range(2):
        node = folder / "run" / f"generation_{generation}"
        # The tensors alone: the file names its node, and so the engine.
        tensors, _ = read_weights(node / "model.safetensors")
        found.append(hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest())
        found.append(json.loads((node / "node.json").read_text())["training"]["history"])
    rows = json.loads((folder / "run" / "results.json").read_text())["generations"]
    kept = ("top1_error", "top5_error", "ensemble_top1_error", "mean_confidence", "nll", "ece", "samples_evaluated")
    return json.dumps([found, [{name: row[name] for name in kept} for row in rows]])


@pytest.fixture
def run(tmp_path):
    """Function that runs the recipe in so many processes; a folder that was used before is gone on in."""

    def start(world: int, name: str, *words: str, stop_after: int | None = None) -> tuple[list[list[list[int]]], str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RUN))
        here = tmp_path / f"{name}-{time.monotonic_ns()}"
        here.mkdir()
        answers = run_processes(here, world, whole_run, str(folder), list(words), stop_after)
        return [seen for seen, _ in answers], answers[0][1]

    return start


def joined_by_rank(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [[id_ for part in step for id_ in part] for step in zip(*ranks, strict=True)]


GRAPH = ("--train.engine=graph", "--train.graph_steps=3")


def test_all_numbers_of_processes_see_the_same_samples_in_the_same_steps(run):
    (alone,), _ = run(1, "one")
    assert len(alone) == 2 * 3 * STEPS_IN_EPOCH
    for world in (2, 4):
        ranks, _ = run(world, f"{world}")
        assert joined_by_rank(ranks) == alone, world
        assert {len(part) for rank in ranks for part in rank} == {32 // world, 8 // world}


def test_two_processes_give_the_same_bits_whatever_takes_their_steps(run):
    """One step a program, several, or none; a teacher that is asked ahead, or in the step; a table of its labels."""
    ranks, eager = run(2, "eager")
    for name, words in {
        "graph": GRAPH,
        "ahead": ("--teacher.look_ahead_batches=3", *GRAPH),
        "table": ("--teacher.labels=table",),
        "folder": ("--data.backend=folder", "--data.workers=1"),
    }.items():
        others, fingerprint_ = run(2, name, *words)
        assert others == ranks or name in ("graph", "ahead"), name
        assert fingerprint_ == eager, name


@pytest.mark.parametrize("words", [(), GRAPH], ids=["eager", "graph"])
def test_a_signal_to_one_of_two_stops_both_after_the_same_step_and_loses_nothing(run, words):
    _, undisturbed = run(2, "whole", *words)
    before, ended = run(2, "cut", *words, stop_after=10)
    assert ended == ""
    assert len(before[0]) == len(before[1])
    after, resumed = run(2, "cut", *words)
    assert resumed == undisturbed
    # No step was taken twice.
    assert len(before[0]) + len(after[0]) == 2 * 3 * STEPS_IN_EPOCH or words


def test_a_run_goes_on_in_another_number_of_processes(run):
    (alone,), _ = run(1, "one")
    first, _ = run(2, "moved", stop_after=10)
    second, _ = run(1, "moved", stop_after=12)
    third, ended = run(4, "moved")
    assert joined_by_rank(first) + joined_by_rank(second) + joined_by_rank(third) == alone
    assert ended


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_at_the_end_of_an_epoch_does_not_lose_its_measurement(run, world):
    """The second epoch is to be measured; the signal comes in its last step."""
    _, undisturbed = run(world, "whole")
    before, ended = run(world, "cut", stop_after=2 * STEPS_IN_EPOCH)
    assert (len(before[0]), ended) == (2 * STEPS_IN_EPOCH, "")
    assert run(world, "cut")[1] == undisturbed


def test_synchronised_batch_norm_refuses_unlike_numbers_of_parts(run):
    words = ("--dist.batchnorm=synchronised", "--train.accumulate_steps=8", "--train.batch_size=39")
    with pytest.raises(AssertionError, match="a batch of 5 images gives 2 processes unlike numbers of parts"):
        run(2, "unlike", *words)


def test_more_processes_than_images_is_one_line(run):
    with pytest.raises(AssertionError, match="the last batch of an epoch holds 8 images, fewer than the 9 processes"):
        run(9, "nine")


def test_the_normaliser_of_the_tests_is_the_products():
    """`trained` hands over images as they are: nothing of the product's preparation is left out where it matters."""
    normalise = Normaliser((0.0,), (1.0,), CPU, torch.float32)
    assert normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item() == 1
