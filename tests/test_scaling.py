"""Images/s of processes that train together: arithmetic that can say no, the same work in every turn, one real run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_processes

from benchmarks import common, scaling, scaling_ranks, scaling_steps
from benchmarks.common import Timings, read_rows, spread
from benchmarks.feed_steps import supply_of
from benchmarks.scaling import Found
from benchmarks.scaling_ranks import ALL_REDUCE, ALONE_PIECE, HELD, SILENT, WHOLE, Piece
from benchmarks.scaling_steps import case_of, cut, make_rig, read_setup, scaled, taught
from fastgen.data.resident import ResidentLoader
from fastgen.distributed import ALONE, Group
from fastgen.errors import UserError, command
from fastgen.supply import Supply

pytestmark = pytest.mark.timeout(240)

CPU = torch.device("cpu")
# The first of two processes, which can tell the other nothing.
FIRST_OF_TWO = Group(0, 2, 0, 2)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def words_of(recipe, *more):
    return ["--cfg", str(recipe), "--run.device=cpu", *more]


def setup_of(recipe, *more, role="student"):
    return read_setup(words_of(recipe, *more), role, random=False)


def doctored(mode="weak", processes=2, batch_size=20, **seconds):
    """One process takes a batch of 10; times by piece, a value a round."""
    names = {"whole": WHOLE, "silent": SILENT, "held": HELD, "alone": ALONE_PIECE, "all_reduce": ALL_REDUCE}
    timings = Timings({names[name]: tuple(values) for name, values in seconds.items()})
    return Found(mode, processes, batch_size, 10, 4, None, 8_000_000, {"device": "none"}, timings)


WEAK = {
    "whole": (2.0, 4.0, 5.0), "silent": (1.0, 3.0, 4.5), "held": (1.8, 2.0, 5.5), "alone": (1.0, 3.0, 4.0),
    "all_reduce": (0.001, 0.002, 0.004),
}  # fmt: skip


# Arithmetic.


def test_losses_are_shares_of_the_whole_step_of_the_same_round():
    found = doctored(**WEAK)
    assert found.lost_to_communication == pytest_spread([0.5, 0.25, 0.1])
    # Noise may put it below 0.
    assert found.lost_to_data == pytest_spread([0.1, 0.5, -0.1])


def pytest_spread(values):
    expected = spread(values)
    return common.Spread(*(pytest.approx(value) for value in (expected.median, expected.low, expected.high)))


def test_efficiency_is_over_as_many_processes_by_themselves():
    weak = doctored(**WEAK)
    assert weak.images_per_second == pytest_spread([10, 5, 4])
    assert weak.one_images_per_second == pytest_spread([10, 10 / 3, 2.5])
    assert weak.efficiency == pytest_spread([0.5, 0.75, 0.8])
    # A batch of 10 shared by two in half the time is all that can be had.
    strong = doctored("strong", batch_size=10, whole=(1.0, 1.0, 2.0), alone=(2.0, 1.0, 2.0))
    assert strong.efficiency == pytest_spread([1.0, 0.5, 0.5])


def test_sums_alone_are_told_as_the_bus_has_them():
    found = doctored(processes=4, batch_size=40, **WEAK)
    assert found.all_reduce_ms == pytest_spread([1, 2, 4])
    # 2 * 3 / 4 * 8 MB.
    assert found.bus_gb_per_second == pytest_spread([12.0, 6.0, 3.0])


def test_one_process_is_what_it_is_set_beside():
    one = doctored("one", 1, 10, whole=(1.0, 2.0), held=(0.5, 1.8))
    assert one.efficiency == pytest_spread([1.0, 1.0])
    assert one.images_per_second == one.one_images_per_second == pytest_spread([10, 5])
    assert one.lost_to_data == pytest_spread([0.5, 0.1])
    assert one.lost_to_communication is one.all_reduce_ms is one.bus_gb_per_second is None


@pytest.mark.parametrize(
    ("efficient", "begin", "end"), [(0.91, "PASS", "asked at least 0.9"), (0.89, "FAIL", "asked at least 0.9")]
)
def test_the_target_is_asked_of_weak_scaling_on_eight_gpus(efficient, begin, end):
    eight = doctored(processes=8, batch_size=80, whole=(1 / efficient,), alone=(1.0,))
    others = [doctored(processes=4, whole=(1.0,), alone=(0.1,)), doctored("strong", 8, 10, whole=(1.0,), alone=(1.0,))]
    line = scaling.target([*others, eight], "cuda").line()
    assert line.startswith(begin)
    assert line.endswith(end)
    assert scaling.target(others[:1], "cuda").line().endswith("asked at least 0.9: not measured (at most 4 of them)")
    assert scaling.target([eight], "cpu").line().endswith("asked at least 0.9: not measured (no GPU)")


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_processes_are_doubled_up_to_what_there_is(most, counts, monkeypatch):
    monkeypatch.setattr(scaling, "usable_cores", lambda: most)
    assert scaling.counts_for("cpu", None) == counts
    assert scaling.counts_for("cpu", (most,)) == (most,)
    with pytest.raises(UserError, match=f"{most + 1} need as many cores, and there are {most}: lower it"):
        scaling.counts_for("cpu", (1, most + 1))


def test_one_process_is_measured_once_and_more_in_both_ways():
    assert scaling.sides((1, 2, 4)) == [
        ("one", 1), ("strong", 2), ("weak", 2), ("strong", 4), ("weak", 4),
    ]  # fmt: skip


# Turns.


class Ticking:
    """A clock that pieces, and waiting for each other, let go on; notes what happens."""

    def __init__(self, monkeypatch):
        self.now, self.seen = 0.0, []
        monkeypatch.setattr(scaling_ranks, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(scaling_ranks, "wait_for", lambda device: self.seen.append("device"))

    def happen(self, name, seconds):
        self.seen.append(name)
        self.now += seconds

    def most(self, numbers):
        self.happen("all", 0.5)
        return numbers


def test_the_clock_runs_from_when_all_begin_to_when_all_have_ended(monkeypatch):
    clock = Ticking(monkeypatch)
    piece = Piece(lambda: clock.happen("step", 1.0), 3, 2, lambda: clock.happen("begin", 7.0))
    assert scaling_ranks.timed(piece, clock, CPU) == 3.5
    assert clock.seen == ["begin", "step", "step", "device", "all", *["step"] * 3, "device", "all"]


@pytest.mark.parametrize(
    ("counts", "order"), [((2, 2, 2), "aabbccbbccaaccaabb"), ((0, 2, 2), "bbccbbccccbb")], ids=["works", "waits"]
)
def test_pieces_take_turns_and_the_first_round_is_dropped(counts, order, monkeypatch):
    clock = Ticking(monkeypatch)
    lasting = zip("abc", counts, (1.0, 2.0, 4.0), strict=True)
    pieces = {name: Piece(partial(clock.happen, name, seconds), count, 0) for name, count, seconds in lasting}
    taken = scaling_ranks.measure(pieces, clock, CPU, 2, dict.fromkeys(pieces, 2))
    assert "".join(name for name in clock.seen if name in pieces) == order
    # And half a second of waiting for each other.
    assert taken == {"a": [counts[0] / 2 + 0.25] * 2, "b": [2.25] * 2, "c": [4.25] * 2}


def test_the_first_process_alone_has_the_turn_of_one(write_recipe, monkeypatch):
    made = []

    def noting(case, supply, group, *, summed=True):
        made.append((case.batch_size, group.world, summed))
        return SimpleNamespace(step=None)

    monkeypatch.setattr(scaling_ranks, "make_rig", noting)
    setup = setup_of(write_recipe(train__batch_size=64))
    for rank, more in ((0, [ALONE_PIECE]), (1, [])):
        group = replace(FIRST_OF_TWO, rank=rank)
        case = case_of(setup, "weak", group, CPU)
        assert list(scaling_ranks.make_rigs(setup, "weak", group, case)) == [WHOLE, HELD, SILENT, *more]
    assert made[:4] == [(128, 2, True), (128, 2, True), (128, 2, False), (64, 1, True)]
    assert made[4:] == made[:3]
    case = case_of(setup, "one", ALONE, CPU)
    assert list(scaling_ranks.make_rigs(setup, "one", ALONE, case)) == [WHOLE, HELD]


@pytest.mark.parametrize(
    ("more", "steps", "lead"),
    [
        ([], (4, 5), 1),
        (["--train.engine=graph", "--train.graph_steps=3"], (6, 6), 3),
        (["--teacher.look_ahead_batches=2"], (4, 6), 2),
        # What three batches ahead may have been decoded.
        (["--data.backend=folder"], (4, 5), 4),
        (["--data.backend=folder", "--data.batches_ahead=4", "--teacher.look_ahead_batches=2"], (4, 6), 6),
    ],
)
def test_turns_are_of_whole_programs_and_groups(more, steps, lead, write_recipe):
    case = case_of(setup_of(write_recipe(), *more), "one", ALONE, CPU)
    assert (scaling_ranks.steps_of(case, None), scaling_ranks.steps_of(case, 5)) == steps
    assert scaling_ranks.lead_of(case) == lead


# What is trained.


def test_the_batch_is_shared_out_or_multiplied(write_recipe):
    setup = setup_of(write_recipe(train__batch_size=64, train__accumulate_steps=2))
    for mode, size, parts in (("one", 64, 2), ("strong", 64, 2), ("weak", 192, 6)):
        train = scaled(setup.recipe, mode, 3).train
        assert (train.batch_size, train.accumulate_steps) == (size, parts)


def test_all_steps_of_an_epoch_are_alike(write_recipe):
    # 1442 digits; three programs of two batches of 192.
    setup = setup_of(write_recipe(train__batch_size=64), "--train.engine=graph", "--train.graph_steps=2")
    assert [len(cut(setup, mode, 3)[1].train) for mode in ("strong", "weak")] == [1408, 1152]
    with pytest.raises(UserError, match=r"weak scaling, 12 processes: 2 batches of 768 .* there are 1442 images"):
        cut(setup, "weak", 12)
    with pytest.raises(UserError, match="a batch holds 64 images, fewer than the 65 processes"):
        cut(setup, "strong", 65)


def test_processes_share_the_cores_that_one_has_for_itself(write_recipe, monkeypatch):
    for module in ("benchmarks.scaling_steps", "benchmarks.feed_steps"):
        monkeypatch.setattr(f"{module}.usable_cores", lambda: 6)
    setup = setup_of(write_recipe(), "--data.backend=folder")
    case = case_of(setup, "strong", FIRST_OF_TWO, CPU)
    assert (case.workers, scaling_steps.alone(setup, case).workers) == (3, 6)
    given = setup_of(write_recipe(), "--data.backend=folder", "--data.workers=5")
    assert case_of(given, "strong", FIRST_OF_TWO, CPU).workers == 5
    assert case_of(setup_of(write_recipe()), "strong", FIRST_OF_TWO, CPU).workers is None


def test_held_batches_leave_the_loader_alone(write_recipe, monkeypatch):
    calls = []
    execute = ResidentLoader.execute
    monkeypatch.setattr(ResidentLoader, "execute", lambda self, columns: calls.append(1) or execute(self, columns))
    for more in ([], ["--train.engine=graph", "--train.graph_steps=2"], ["--teacher.look_ahead_batches=2"]):
        setup = setup_of(write_recipe(), *more)
        case = case_of(setup, "one", ALONE, CPU)
        rigs = scaling_ranks.make_rigs(setup, "one", ALONE, case)
        for name, expected in ((WHOLE, True), (HELD, False)):
            calls.clear()
            for _ in range(2):
                rigs[name].step()
            assert bool(calls) == expected, (name, more)
            assert rigs[name].steps == 2
            rigs[name].require_finite()


def gradients(group, recipe, mode, more):
    """Of the first step of each kind, with how often the other process was asked for its wishes, and the images."""
    setup, learners, asked = setup_of(recipe, *more), [], []
    make, ask = scaling_steps.new_learner, Group.ask_most
    scaling_steps.new_learner = lambda *arguments: learners.append(make(*arguments)) or learners[-1]
    Group.ask_most = lambda self, numbers: asked.append(1) or ask(self, numbers)
    case = case_of(setup, mode, group, CPU)
    rigs, answers = scaling_ranks.make_rigs(setup, mode, group, case), {}
    for (name, rig), learner in zip(rigs.items(), learners, strict=True):
        before = [weight.detach().clone() for weight in learner.model.parameters()]
        asked.clear()
        rig.step()
        weights = list(learner.model.parameters())
        learnt = any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
        gradient = torch.cat([weight.grad.flatten() for weight in weights])
        answers[name] = (gradient, len(asked), learnt, rig.meter.read().images)
        if name == WHOLE:
            sent = sum(weight.numel() * 4 for weight in weights)
            assert scaling_steps.gradient_bytes(case) == sent
    return answers


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("weak", ["--train.accumulate_steps=2"]),
        ("strong", ["--train.accumulate_steps=4", "--train.batch_size=63", "--train.precision=bf16"]),
    ],
)
def test_steps_differ_by_the_sum_over_processes_alone(mode, more, write_recipe, tmp_path):
    recipe = write_recipe(train__batch_size=64)
    (tmp_path / "meet").mkdir()
    first, second = run_processes(tmp_path / "meet", 2, gradients, recipe, mode, more)
    size, exact = (63 if "--train.batch_size=63" in more else 64), "--train.precision=bf16" not in more
    total, own = first[WHOLE][0], [answers[SILENT][0] for answers in (first, second)]
    assert not torch.allclose(own[0], own[1], rtol=1e-2)
    torch.testing.assert_close(sum(own), total, rtol=1e-4, atol=1e-6 if exact else 1e-4)
    torch.testing.assert_close(second[WHOLE][0], total, rtol=0, atol=0)
    # The batch that is held is the first one.
    torch.testing.assert_close(first[HELD][0], total, rtol=1e-4, atol=1e-6 if exact else 1e-4)
    for answers in (first, second):
        assert [answers[name][1] for name in (WHOLE, HELD, SILENT)] == [1, 1, 0]
        assert not any(learnt for _, _, learnt, _ in answers.values())
    whole = size * (2 if mode == "weak" else 1)
    for name in (WHOLE, HELD, SILENT):
        assert [answers[name][3] for answers in (first, second)] == [whole // 2, whole - whole // 2]
    assert first[ALONE_PIECE][3] == size


def test_a_student_has_a_teacher_and_the_patriarch_none(write_recipe):
    for role, live in (("student", True), ("patriarch", False)):
        case = case_of(setup_of(write_recipe(), role=role), "strong", FIRST_OF_TWO, CPU)
        images = supply_of(case)
        supply = taught(case, images, FIRST_OF_TWO.share)(images)
        assert (supply.live_teacher is not None) == live
        rig = make_rig(case, supply, FIRST_OF_TWO, summed=False)
        rig.step()
        assert rig.meter.read().images == 64


@pytest.mark.parametrize("more", [[], ["--train.engine=graph", "--train.graph_steps=2"]], ids=" ".join)
def test_a_patriarch_remembers_its_predictions_of_all_images_it_saw(more, write_recipe, monkeypatch):
    made, attach = [], Supply.with_means
    monkeypatch.setattr(
        Supply, "with_means", lambda self, means, device: made.append(means) or attach(self, means, device)
    )
    setup = setup_of(write_recipe(), "--gen.patriarch=soteacher", "--gen.confidence=1.0", *more, role="patriarch")
    case = case_of(setup, "one", ALONE, CPU)
    rig = scaling_ranks.make_rigs(setup, "one", ALONE, case)[WHOLE]
    means, size = made[0], setup.recipe.train.batch_size
    assert not means.table_RC.any()
    for _ in range(2):
        rig.step()
    seen_R = means.table_RC.any(1)
    assert seen_R.sum() == 2 * size
    # Of whole predictions, each once.
    torch.testing.assert_close(means.table_RC[seen_R].sum(1), torch.ones(2 * size))


def test_random_images_are_those_of_the_data_set_in_number_and_size(write_recipe):
    setup = read_setup(words_of(write_recipe(), "--data.root=nowhere"), "student", random=True)
    real = setup_of(write_recipe())
    assert (setup.images, real.images) == ("random", "digits")
    assert setup.dataset.train.images_NHWC.shape == real.dataset.train.images_NHWC.shape
    assert setup.dataset.train.images_NHWC.std() > 70
    synthetic = setup_of(write_recipe(), "--data.backend=synthetic")
    assert synthetic.images == "random"


# The command.


def test_without_a_recipe_it_is_resnet20_in_16_bits_on_random_images():
    default = ["--cfg", str(scaling.RECIPE)]
    assert scaling.recipe_words([]) == ([*default, "--train.precision=bf16"], True)
    own = ["--train.precision=fp32", "--data.root=here"]
    assert scaling.recipe_words(own) == ([*default, *own], False)
    assert scaling.recipe_words(["--cfg=a.yaml"]) == (["--cfg=a.yaml"], False)
    setup = read_setup([*default, "--train.precision=bf16", "--data.train_limit=200"], "student", random=True)
    assert (setup.recipe.model.name, setup.recipe.train.batch_size, setup.images) == ("resnet20", 128, "random")
    assert setup.dataset.train.images_NHWC.shape == (200, 32, 32, 3)


def test_two_processes_are_measured(write_recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(scaling, "usable_cores", lambda: 2)
    words = words_of(write_recipe(train__batch_size=32), "--processes=2", "--rounds=2", "--steps=2")
    assert command(scaling.main, [*words, f"--results={tmp_path}"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert f"{scaling.ON_A_CPU}; all of one thread each" in captured.out
    assert captured.out.splitlines()[-1].endswith("asked at least 0.9: not measured (no GPU)")
    rows = read_rows(tmp_path / "scaling.csv")
    found = [(row["scaling"], row["processes"], row["batch_size"], row["one_batch_size"]) for row in rows]
    assert found == [("strong", "2", "32", "32"), ("weak", "2", "64", "32")]
    for row in rows:
        assert (row["threads"], row["role"], row["images"], row["workers"]) == ("1", "student", "digits", "")
        assert (row["recipe"], row["overrides"]) == ("tiny.yaml", "run.device=cpu")
        assert (row["rounds"], row["steps_per_round"]) == ("2", "2")
        assert float(row["images_per_second_median"]) > 0
        assert float(row["one_images_per_second_median"]) > 0
        # By definition they cannot be 1 or more; below 0 is noise, which has no bound on a busy machine.
        assert float(row["lost_to_data_q75"]) < 1
        assert float(row["lost_to_communication_q75"]) < 1
        assert float(row["efficiency_q25"]) > 0
        assert float(row["all_reduce_ms_median"]) > 0
        assert float(row["bus_gb_per_second_median"]) > 0


def test_one_process_is_measured(write_recipe, tmp_path, capsys):
    out = tmp_path / "found.json"
    own = ["--mode=one", "--role=patriarch", "--rounds=3", "--steps=2", "--random=no", f"--out={out}"]
    recipe = words_of(write_recipe(train__batch_size=32))
    torch.set_num_threads(2)
    scaling_ranks.main([*own, *recipe])
    found = scaling.read_found(out)
    assert (found.mode, found.processes, found.batch_size, found.one_batch_size, found.steps) == ("one", 1, 32, 32, 2)
    assert {name: len(values) for name, values in found.timings.seconds_per_step.items()} == {WHOLE: 3, HELD: 3}
    assert found.images_per_second.median > 0
    assert found.efficiency.median == found.machine["threads"] == 1
    setup = read_setup(recipe, "patriarch", random=False)
    row = scaling.result_row(setup, found, {"run.dir": "here", "train.lr": "1"}, Path("somewhere/tiny.yaml"))
    assert (row["teacher"], row["overrides"], row["recipe"]) == (None, "train.lr=1", "tiny.yaml")
    assert row["lost_to_communication_median"] is row["all_reduce_ms_median"] is None
    # One file holds rows of one process and of several.
    several = doctored(**WEAK)
    assert list(scaling.result_row(setup, replace(found, processes=2, timings=several.timings), {}, Path())) == list(
        row
    )
    scaling.report(setup, [found, several])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "weak 2: the gradients, 8 MB, are summed alone in 2.00 (1.50 .. 3.00) ms, 4 GB/s"


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--processes=0", "'0' is below 1"),
        ("--processes=1,two", "'two' is no whole number"),
        ("--processes=2,2", "'2,2' names a number twice"),
        ("--processes=", "'' is no whole number"),
        ("--processes=100000", "100000 need as many cores"),
        ("--rounds=0", "'0' is below 1"),
        ("--steps=0", "'0' is below 1"),
        ("--role=teacher", "invalid choice: 'teacher'"),
        ("--wrong=1", "'wrong'"),
        ("--train.batch_size=1443", "1 batches of 1443 images are taken at once, and there are 1442 images"),
        ("--gen.generations=0", "--role=student: the recipe has none"),
        ("--dist.processes=2", "dist.processes has no say here: give --processes"),
        ("--teacher.labels=table", "nothing is trained here that could fill one: set live"),
        ("--train.kernels=triton", "train.kernels = triton is timed on an NVIDIA GPU alone"),
        ("--run.dry=true", "run.dry and gen.only have no say here"),
    ],
)
def test_a_wrong_word_is_one_line(word, why, write_recipe, tmp_path, capsys):
    assert command(scaling.main, words_of(write_recipe(), word, f"--results={tmp_path / 'results'}")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert why in captured.err
    assert not captured.out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("words", [["--data.dataset=imagenet", "--data.backend=folder"], ["--data.backend=ffcv"]])
def test_images_of_files_are_not_drawn_at_random(words, capsys):
    assert command(scaling.main, [*words, "--run.device=cpu"]) == 2
    assert "name the folder of the recipe's with data.root" in capsys.readouterr().err


@without_gpu
def test_a_gpu_that_is_not_there_is_told(write_recipe, capsys):
    assert command(scaling.main, ["--cfg", str(write_recipe()), "--run.device=cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_help_lists_its_own_words_and_the_recipes(capsys):
    assert command(scaling.main, ["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("--processes", "--role", "--train.batch_size"):
        assert word in out
