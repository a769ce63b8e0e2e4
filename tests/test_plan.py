"""plan.py: a node's id changes exactly when something that decides its weights changes."""

import hashlib

import pytest

from fastgen.plan import Teacher, describe, init_seed_of, make_plan
from fastgen.recipe import read_recipe

HASH = "d" * 64
BASE = {"gen__generations": 3, "gen__teacher_weight": 0.6, "gen__k": 5, "gen__confidence": 0.6}


@pytest.fixture
def plan_of(write_recipe):
    def plan(*words, data_hash=HASH, teacher=None, **overrides):
        return make_plan(read_recipe([f"--cfg={write_recipe(**BASE | overrides)}", *words]), data_hash, teacher)

    return plan


def nodes(plan):
    return [generation.node for generation in plan]


def test_every_generation_is_taught_by_the_one_before(plan_of):
    plan = plan_of()
    assert [g.index for g in plan] == [0, 1, 2, 3]
    assert [g.role for g in plan] == ["patriarch", "student", "student", "student"]
    assert [g.teacher for g in plan] == [None, *nodes(plan)[:-1]]
    assert len(set(nodes(plan))) == 4
    assert all(g.train for g in plan)


def test_objectives_and_ideals_are_those_of_the_method(plan_of):
    plan = plan_of()
    assert plan[0].objective.eta == pytest.approx(4 / 7, abs=1e-14)
    assert plan[0].objective.k == 5
    assert [(g.objective.eta, g.objective.teacher_weight) for g in plan[1:]] == [(0.0, 0.6)] * 3
    assert [round(g.ideal, 3) for g in plan] == [0.6, 0.76, 0.856, 0.914]


DECISIVE_FOR_ALL = {
    "train__lr": 0.05,
    "train__epochs": 2,
    "train__batch_size": 64,
    "train__lr_milestones": [0.5],
    "train__lr_factor": 0.2,
    "train__momentum": 0.8,
    "train__nesterov": False,
    "train__weight_decay": 5e-4,
    "train__decay_norm_and_bias": False,
    "train__precision": "bf16",
    "train__engine": "compile",
    "model__name": "resnet20",
    "model__downsample": "pooled",
    "data__seed": 1,
    "data__augment": "none",
    "data__train_limit": 100,
    "data__holdout": 100,
    "data__backend": "synthetic",
    "run__init_seed": 1,
    "run__seed": 1,
    "gen__confidence": 0.7,
    "gen__k": 4,
    "dist__batchnorm": "synchronised",
    "dist__buffers": "first",
}


@pytest.mark.parametrize("key", DECISIVE_FOR_ALL)
def test_what_decides_the_weights_changes_every_node(plan_of, key):
    before, after = nodes(plan_of()), nodes(plan_of(**{key: DECISIVE_FOR_ALL[key]}))
    assert not set(before) & set(after)


def test_another_data_hash_changes_every_node(plan_of):
    assert not set(nodes(plan_of())) & set(nodes(plan_of(data_hash="e" * 64)))


NOT_DECISIVE = {
    "dist__processes": 2,
    "dist__max_restarts": 0,
    "dist__timeout_minutes": 1.0,
    "run__stop_after_minutes": 5.0,
    "run__dir": "elsewhere",
    "run__nodes": "nodes_elsewhere",
    "run__save_minutes": 0,
    "run__log_every_steps": 1,
    "run__eval_every_epochs": 7,
    "run__dry": True,
    "run__resume": False,
    "run__device": "auto",
    "data__root": "data_elsewhere",
    "data__download": True,
    "data__val_limit": 50,
}


@pytest.mark.parametrize("key", NOT_DECISIVE)
def test_where_and_how_it_runs_changes_no_node(plan_of, key):
    assert nodes(plan_of()) == nodes(plan_of(**{key: NOT_DECISIVE[key]}))


def test_the_number_of_generations_changes_no_node(plan_of):
    assert nodes(plan_of(gen__generations=2)) == nodes(plan_of())[:3]
    assert nodes(plan_of(gen__generations=5))[:4] == nodes(plan_of())


def test_a_list_of_equal_weights_is_the_one_number(plan_of):
    assert nodes(plan_of(gen__teacher_weight=[0.6, 0.6, 0.6])) == nodes(plan_of())


@pytest.mark.parametrize("key", ["gen__teacher_weight", "gen__temperature"])
@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_students_own_setting_changes_it_and_its_descendants(plan_of, key, changed):
    values = [0.6, 0.6, 0.6]
    before = nodes(plan_of(**{key: values}))
    values[changed - 1] = 0.7
    after = nodes(plan_of(**{key: values}))
    assert [one == two for one, two in zip(before, after, strict=True)] == [index < changed for index in range(4)]


def test_settings_of_the_score_difference_matter_only_where_it_is_used(plan_of):
    plain = {"gen__confidence": 1.0}
    assert nodes(plan_of(**plain, gen__k=4)) == nodes(plan_of(**plain, gen__k=5))
    assert nodes(plan_of(**plain, gen__patriarch="cross_entropy")) == nodes(plan_of(**plain))


def test_run_seed_is_the_default_of_both_seeds(plan_of):
    assert nodes(plan_of(run__seed=7)) == nodes(plan_of(run__init_seed=7, data__seed=7))


def test_repeats_may_share_their_views_and_nothing_else(plan_of):
    one, two = plan_of(run__seed=0), plan_of(run__seed=0, run__init_seed=1)
    assert [g.data_seed for g in one] == [g.data_seed for g in two]
    assert not {g.init_seed for g in one} & {g.init_seed for g in two}


def test_initial_seeds_differ_between_generations_and_runs():
    seeds = {init_seed_of(run, generation) for run in range(50) for generation in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # About half of them use the highest bit: they are hashes, not small numbers.
    assert 400 < sum(seed >= 2**62 for seed in seeds) < 600


def test_the_plan_uses_those_seeds(plan_of):
    assert [g.init_seed for g in plan_of(run__init_seed=5)] == [init_seed_of(5, g) for g in range(4)]


@pytest.mark.parametrize("key", ["teacher_weight", "temperature"])
def test_only_narrows_a_number_from_the_command_line_to_that_student(plan_of, key):
    whole = plan_of()
    plan = plan_of("--gen.only=2", f"--gen.{key}=0.7")
    assert [g.index for g in plan] == [0, 1, 2]
    assert nodes(plan)[:2] == nodes(whole)[:2]
    assert plan[2].node != whole[2].node
    assert plan[2].teacher == whole[1].node
    assert getattr(plan[2].objective, key) == 0.7
    assert [g.train for g in plan] == [False, False, True]


def test_only_keeps_a_list_of_the_file_for_the_other_students(plan_of):
    settings = {"gen__teacher_weight": [0.5, 0.6, 0.7]}
    plan = plan_of("--gen.only=3", "--gen.teacher_weight=0.9", **settings)
    assert nodes(plan)[:3] == nodes(plan_of(**settings))[:3]
    assert [g.objective.teacher_weight for g in plan] == [0.0, 0.5, 0.6, 0.9]


def test_only_with_the_same_value_is_the_same_node(plan_of):
    assert nodes(plan_of("--gen.only=3", "--gen.teacher_weight=0.6")) == nodes(plan_of())


def test_only_in_the_file_takes_the_files_weight_for_all(plan_of):
    assert nodes(plan_of(gen__only=2)) == nodes(plan_of())[:3]


def test_the_patriarch_alone(plan_of):
    plan = plan_of("--gen.only=0")
    assert nodes(plan) == nodes(plan_of())[:1]
    assert plan[0].train


def test_a_named_teacher_replaces_the_generation_before(plan_of):
    named = Teacher("some_node", "somewhere/model.safetensors")
    (student,) = plan_of("--gen.only=2", "--gen.teacher=somewhere", teacher=named)
    assert (student.index, student.teacher, student.teacher_weights) == (2, named.id, named.weights)
    assert student.ideal is None
    assert student.train
    (other,) = plan_of("--gen.only=2", "--gen.teacher=somewhere", teacher=Teacher("another", named.weights))
    assert other.node != student.node
    (moved,) = plan_of("--gen.only=2", "--gen.teacher=moved", teacher=Teacher(named.id, "moved/model.safetensors"))
    assert moved.node == student.node


def test_naming_the_planned_teacher_gives_the_planned_node(plan_of):
    whole = plan_of()
    (student,) = plan_of("--gen.only=2", "--gen.teacher=x", teacher=Teacher(whole[1].node, "x"))
    assert student.node == whole[2].node


def test_students_without_a_teachers_share_are_independent(plan_of):
    plan = plan_of(gen__teacher_weight=0.0, gen__confidence=1.0)
    assert [g.role for g in plan] == ["patriarch", "independent", "independent", "independent"]
    assert all(g.teacher is None and g.teacher_weights is None for g in plan)
    assert all(g.objective == plan[0].objective for g in plan)
    assert len({g.node for g in plan}) == len({g.init_seed for g in plan}) == 4
    assert [g.ideal for g in plan] == [1.0] * 4


def test_an_independent_generation_does_not_depend_on_the_one_before(plan_of):
    settings = {"gen__teacher_weight": [0.6, 0.0, 0.6]}
    before, after = nodes(plan_of(**settings)), nodes(plan_of(gen__confidence=0.7, **settings))
    assert [one == two for one, two in zip(before, after, strict=True)] == [False, False, True, True]


def test_no_law_is_claimed_at_another_temperature(plan_of):
    plan = plan_of(gen__temperature=[1.0, 4.0, 1.0])
    assert [g.ideal is None for g in plan] == [False, False, True, True]


def test_describe_names_every_node_and_its_teacher(plan_of):
    plan = plan_of()
    lines = describe(plan).splitlines()
    assert len(lines) == 1 + len(plan)
    for line, generation in zip(lines[1:], plan, strict=True):
        words = line.split()
        assert words[:4] == [str(generation.index), generation.role, generation.node, generation.teacher or "-"]
        assert str(generation.init_seed) in words
        assert words[-1] == f"{generation.ideal:.3f}"
    assert "eta 0.5714, k 5" in lines[1]
    assert "teacher_weight 0.6" in lines[2]


def test_initial_seeds_are_written_down():
    """A run that is resumed under a later version must start its next generation from the same weights."""
    digest = hashlib.sha256(b'["initial weights",5,2]').hexdigest()
    assert init_seed_of(5, 2) == int(digest[:16], 16) // 2


def nodes_of(write_recipe, dataset, model, *words):
    """Nodes of the generations of a recipe with a label store."""
    path = write_recipe(
        data__dataset=dataset, data__backend=... if dataset == "digits" else "folder", model__name=model
    )
    return [g.node for g in make_plan(read_recipe(["--cfg", str(path), *words]), "data")]


@pytest.mark.parametrize(
    ("dataset", "model", "cuts", "different"),
    [
        ("digits", "resnet8", [[], ["classes=10"], ["classes=50"], ["classes=3"], ["classes=4"]], 3),
        ("digits", "resnet8", [["dtype=fp32"], ["dtype=fp32", "classes=10"], ["dtype=fp32", "classes=3"]], 2),
        ("imagenet", "resnet18", [[], ["classes=1"], ["classes=16"], ["dtype=fp32"], ["dtype=fp32", "classes=1"]], 5),
    ],
)
def test_truncations_have_nodes_of_their_own(write_recipe, dataset, model, cuts, different):
    """What is kept decides, not how it was said; of photographs the number of classes is not known to the recipe."""
    live = nodes_of(write_recipe, dataset, model)
    found = [
        nodes_of(write_recipe, dataset, model, "--teacher.labels=store", *(f"--teacher.store_{word}" for word in cut))
        for cut in cuts
    ]
    assert {nodes[0] for nodes in found} == {live[0]}
    assert len({nodes[1] for nodes in found}) == different
    exact = dataset == "digits" and any("dtype=fp32" in cut for cut in cuts)
    assert (live[1] in {nodes[1] for nodes in found}) == exact
