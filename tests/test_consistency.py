"""SoTeacher's consistency term: means over epochs, against plain numpy; processes, stops and engines."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file

from fastgen import train, trainer
from fastgen.config import TrainSettings
from fastgen.consistency import Means
from fastgen.data.batch import Remembered
from fastgen.distributed import ALONE
from fastgen.errors import Stopped
from fastgen.grade import make_grade
from fastgen.plan import Objective
from fastgen.views import Share, batch_positions

CPU = torch.device("cpu")
IMAGES, CLASSES, BATCH, EPOCHS, WEIGHT = 23, 5, 6, 4, 0.7


def orders():
    draw = np.random.default_rng(0)
    return [draw.permutation(IMAGES) for _ in range(EPOCHS)]


def logits_of(epoch, positions):
    """Of an image in an epoch, whoever asks."""
    draw = torch.Generator().manual_seed(epoch)
    return 2 * torch.randn(IMAGES, CLASSES, generator=draw, dtype=torch.float64)[torch.from_numpy(positions)]


def views_of(order):
    return SimpleNamespace(order=order)


def make_means(group=ALONE, dtype="fp32"):
    train = TrainSettings(epochs=EPOCHS, batch_size=BATCH)
    objective = Objective(consistency_weight=WEIGHT, consistency_dtype=dtype)
    return Means(IMAGES, CLASSES, train, objective, CPU, group)


def run_epochs(means, share, first=0, until=EPOCHS, stop_at=None):
    """Terms of all batches, by (epoch, batch); epochs from `first` on, the last one until a batch."""
    terms = {}
    for epoch in range(first, until):
        order = orders()[epoch]
        means.begin(epoch, views_of(order))
        for number, own in enumerate(batch_positions(order, BATCH, 0, share)):
            if stop_at is not None and epoch == until - 1 and number == stop_at:
                return terms
            p = logits_of(epoch, own).float().softmax(1)
            terms[epoch, number] = means.term(p, torch.from_numpy(means.rows(own))).item()
    return terms


def expected_terms():
    """From the definition, in fp64: the mean over all earlier epochs, whatever the order."""
    everything, terms = np.arange(IMAGES), {}
    softmaxes = [logits_of(epoch, everything).softmax(1).numpy() for epoch in range(EPOCHS)]
    for epoch, order in enumerate(orders()):
        for number, own in enumerate(batch_positions(order, BATCH, 0, Share(0, 1))):
            if epoch == 0:
                terms[epoch, number] = 0.0
                continue
            mean = np.mean(softmaxes[:epoch], axis=0)[own]
            distance = ((softmaxes[epoch][own] - mean) ** 2).sum(1).mean()
            terms[epoch, number] = WEIGHT * epoch / EPOCHS * distance
    return terms, np.mean(softmaxes, axis=0)


@pytest.mark.parametrize(
    # A mean of up to four rounded four times, and a square of a difference of numbers up to 1.
    ("dtype", "tolerance"), [("fp32", 20 * 2.0**-24), ("fp16", 8 * 2.0**-12)],
)  # fmt: skip
def test_the_terms_and_the_means_are_those_of_the_definition(dtype, tolerance):
    means = make_means(dtype=dtype)
    found, (expected, mean) = run_epochs(means, Share(0, 1)), expected_terms()
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in found) <= tolerance
    last = means.table_RC[torch.from_numpy(means.rows(np.arange(IMAGES)))].double().numpy()
    assert np.abs(last - mean).max() <= tolerance


def test_the_gradient_is_that_of_the_present_prediction_alone():
    means, own = make_means(), np.arange(4)
    means.begin(0, views_of(np.arange(IMAGES)))
    rows = torch.from_numpy(means.rows(own))
    first = logits_of(0, own).float().softmax(1)
    means.term(first, rows)
    means.begin(2, views_of(np.arange(IMAGES)))
    p = logits_of(1, own).float().softmax(1).requires_grad_()
    means.term(p, rows).backward()
    # d/dp of w e/E mean_b sum_c (p - m)^2
    expected = WEIGHT * 2 / EPOCHS * 2 * (p.detach() - first) / 4
    torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-8)


def by_one_of(group, dtype):
    means = make_means(group, dtype)
    run_epochs(means, group.share)
    return means._own, means.table_RC, means.state()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_processes_pass_on_what_others_will_be_shown(tmp_path, dtype):
    """Three processes keep the very means that one keeps."""
    alone = make_means(dtype=dtype)
    run_epochs(alone, Share(0, 1))
    by_position = alone.table_RC[torch.from_numpy(alone.rows(np.arange(IMAGES)))]
    answers, seen = run_processes(tmp_path, 3, by_one_of, dtype), []
    for own, table, _ in answers:
        assert torch.equal(table, by_position[torch.from_numpy(own)])
        seen += own.tolist()
    assert sorted(seen) == list(range(IMAGES))
    # All of it goes to the main process, and to no other.
    assert torch.equal(answers[0][2], by_position)
    assert torch.equal(alone.state(), by_position)
    assert [answer[2] for answer in answers[1:]] == [None, None]


@pytest.mark.parametrize("stop_at", [0, 2, None])
def test_a_training_that_goes_on_has_the_same_means(stop_at):
    """From the middle of an epoch, and from its end; from several processes too."""
    whole = run_epochs(make_means(), Share(0, 1))
    before = make_means()
    run_epochs(before, Share(0, 1), until=3, stop_at=stop_at)
    again, order = make_means(), orders()[2]
    again.restore(before.state())
    epoch, batch = (2, stop_at) if stop_at is not None else (3, 0)
    order = orders()[epoch]
    again.begin(epoch, views_of(order))
    for number, own in enumerate(batch_positions(order, BATCH, 0, Share(0, 1))):
        if number >= batch:
            term = again.term(logits_of(epoch, own).float().softmax(1), torch.from_numpy(again.rows(own))).item()
            assert term == whole[epoch, number]


def restored_by(group, full):
    means = make_means(group)
    means.restore(full if group.main else None)
    means.begin(1, views_of(orders()[1]))
    return means._own, means.table_RC


def test_several_processes_go_on_from_what_one_had(tmp_path):
    alone = make_means()
    run_epochs(alone, Share(0, 1), until=1)
    full = alone.state()
    for own, table in run_processes(tmp_path, 3, restored_by, full):
        assert torch.equal(table, full[torch.from_numpy(own)])


def test_what_rehearsed_steps_write_is_put_back():
    means, blank = make_means(), torch.zeros(2, dtype=torch.int64)
    for epoch in range(2):
        before = means.table_RC.clone()
        with means.preserved():
            means.term(torch.full((2, CLASSES), 0.2), blank)
            assert not torch.equal(means.table_RC, before)
        assert torch.equal(means.table_RC, before)
        assert (means.state() is None) == (epoch == 0)
        means.begin(epoch, views_of(orders()[epoch]))
        means.term(torch.full((2, CLASSES), 0.1), torch.tensor([0, 1]))
    assert means.table_RC.any()


def test_a_grade_without_means_is_refused():
    objective = Objective(consistency_weight=1.0, consistency_dtype="fp32")
    with pytest.raises(ValueError, match="means belong to a consistency term"):
        make_grade(objective)
    with pytest.raises(ValueError, match="means belong to a consistency term"):
        make_grade(Objective(), means=make_means())
    means = make_means()
    means.begin(2, views_of(np.arange(IMAGES)))
    grade, z = make_grade(objective, means=means), logits_of(0, np.arange(3)).float()
    with pytest.raises(TypeError, match="does not know where"):
        grade(z, torch.tensor([0, 1, 2]), None, None)
    graded = grade(z, torch.tensor([0, 1, 2]), Remembered(torch.arange(3)), None)
    term = WEIGHT * 2 / EPOCHS * z.softmax(1).square().sum(1).mean()
    expected = torch.nn.functional.cross_entropy(z, torch.tensor([0, 1, 2])) + term
    assert graded.loss_sum.item() / 3 == pytest.approx(expected.item(), rel=1e-6)


# Trainings.

RECIPE = (
    "{data: {dataset: digits, train_limit: 200}, model: {name: resnet8}, train: {epochs: 3, batch_size: 64},"
    " gen: {generations: 0, patriarch: soteacher, confidence: 1.0}, run: {device: cpu, eval_every_epochs: 0}}"
)


def run(folder, name, *more):
    (folder / "tiny.yaml").write_text(RECIPE)
    nodes = f"--run.nodes={folder / f'nodes-{name}'}"
    train.main(["--cfg", str(folder / "tiny.yaml"), f"--run.dir={folder / name}", nodes, *more])
    return folder / name


def weights(run):
    return load_file(run / "generation_0" / "model.safetensors")


def require_equal(ours, theirs):
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), "whole")


def test_the_term_moves_the_weights(whole, tmp_path):
    without = weights(run(tmp_path, "without", "--gen.consistency_weight=0.0"))
    assert any(not torch.equal(tensor, without[name]) for name, tensor in weights(whole).items())


# Of twelve steps: at the end of an epoch, and in the middle of the next.
@pytest.mark.parametrize("step", [4, 6])
def test_a_stopped_training_ends_with_the_same_weights(whole, tmp_path, monkeypatch, step):
    right = trainer._Pauses.after_step

    def after_step(self, training, views):
        if training.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        right(self, training, views)

    # The last step of an epoch is saved at its end.
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Pauses, "after_step", after_step)
        if step % 4 == 0:
            patch.setattr(trainer._Pauses, "wish_of_all", _killed_at(step, trainer._Pauses.wish_of_all))
        with pytest.raises(Stopped):
            run(tmp_path, "stopped")
    require_equal(weights(run(tmp_path, "stopped")), weights(whole))


def _killed_at(step, right):
    def wish_of_all(self, training, *, last):
        if training.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self, training, last=last)

    return wish_of_all


def test_programs_take_the_steps_of_eager(whole, tmp_path):
    """The engine of CUDA graphs, not captured: the same operators in the same order."""
    require_equal(weights(run(tmp_path, "programs", "--train.engine=graph")), weights(whole))


def test_a_program_that_is_made_in_the_middle_of_an_epoch_leaves_the_means_alone(whole, tmp_path, monkeypatch):
    right = trainer.Training.take

    def take(training, tally):
        right(training, tally)
        if training.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    # Four steps an epoch, in programs of two: stopped behind the first one, it needs a program of one step, too.
    words = "--gen.consistency_weight=20.0", "--train.batch_size=50", "--train.engine=graph"
    expected = weights(run(tmp_path, "undisturbed", *words))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "take", take)
        with pytest.raises(Stopped):
            run(tmp_path, "stopped", *words, "--train.graph_steps=1")
    require_equal(weights(run(tmp_path, "stopped", *words, "--train.graph_steps=2")), expected)


def test_two_processes_take_the_very_steps_of_one_that_adds_up_two_parts(tmp_path, run_command):
    """Without the Lipschitz term: that knows each process's own running statistics."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = ["--cfg", tmp_path / "tiny.yaml", "--gen.lipschitz_weight=0.0", "--train.batch_size=50"]
    two = run_command([*words, "--run.dir=two", "--run.nodes=nodes-two", "--dist.processes=2"])
    assert two.code == 0, two.err
    one = run_command([*words, "--run.dir=one", "--run.nodes=nodes-one", "--train.accumulate_steps=2"])
    assert one.code == 0, one.err
    (here,) = {path.parent for path in tmp_path.rglob("two") if path.is_dir()}
    ours, theirs = weights(here / "two"), weights(here / "one")
    learned = [name for name in ours if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(ours[name], theirs[name]) for name in learned)
    record = json.loads((here / "two" / "results.json").read_text())
    assert record["generations"][0]["processes"] == 2
