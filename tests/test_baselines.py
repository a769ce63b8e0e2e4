"""What a step is measured against: do the baselines train, ask their teachers, and say what is not here?"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import baselines
from benchmarks.rigs import STUDENT, Case, random_split
from fastgen.data.facts import Facts
from fastgen.losses import distill
from fastgen.step import DTYPES

CPU = torch.device("cpu")
FACTS = Facts(10, 3, 12, 9, 0, 0, 2, True, (0.5, 0.4, 0.3), (0.25, 0.3, 0.2))
PRECISIONS = ("fp32", "bf16", "fp16")
LOOPS = {
    "bare": baselines.bare_loop,
    "bare fused sgd": lambda case: baselines.bare_loop(case, baselines.fused_sgd),
    "bare student": baselines.bare_student_loop,
    "timm": baselines.timm_loop,
    "timm student": baselines.timm_student_loop,
}
STUDENTS = ("bare student", "timm student")

needs_timm = pytest.mark.skipif(baselines.timm_version() is None, reason="needs timm")


def _named(names):
    return [pytest.param(name, marks=needs_timm if name.startswith("timm") else ()) for name in names]


def _case(precision="fp32", model="resnet8", facts=FACTS):
    return Case(model, 8, precision, facts, random_split(facts, 16), CPU)


def _loss(loop):
    return loop.loss().item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", _named(LOOPS))
def test_a_baseline_learns_its_batch(name, precision):
    loop = LOOPS[name](_case(precision))
    before = copy.deepcopy(loop.network)
    first = _loss(loop)
    for _ in range(6):
        assert loop.step() is None
    assert _loss(loop) < 0.6 * first
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), loop.network.parameters(), strict=True)]
    assert all(moved)
    assert loop.network.training
    assert loop.batch.images_NCHW.shape == (8, 3, 12, 9)
    assert loop.batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)


def test_the_compiled_loop_takes_the_same_steps():
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loop = baselines.compiled_bare_loop(_case())
    loop.step()
    loop.step()
    _assert_same_weights(loop.network, _after_two_steps_by_hand())
    # It was compiled, and once.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    torch.compiler.reset()


def _after_two_steps_by_hand():
    """Weights of the bare loop, with SGD written out."""
    case = _case()
    network = baselines.fresh_network(case, 0).train()
    images = case.split.images_NHWC[:8].transpose(0, 3, 1, 2) / 127.5 - 1
    images, labels = torch.from_numpy(images).float(), torch.from_numpy(case.split.labels[:8])
    momenta = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for _ in range(2):
        loss = nn.CrossEntropyLoss()(network(images), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(network.parameters(), gradients, momenta, strict=True):
                decayed = gradient + 1e-4 * parameter
                momentum.mul_(0.9).add_(decayed)
                parameter -= 0.1 * (decayed + 0.9 * momentum)
    return network


def _assert_same_weights(found, expected):
    torch.testing.assert_close(list(found.parameters()), list(expected.parameters()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, baselines.fused_sgd])
def test_the_bare_step_is_sgd_by_the_book(make):
    loop = baselines.bare_loop(_case(), make)
    loop.step()
    loop.step()
    _assert_same_weights(loop.network, _after_two_steps_by_hand())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", _named(LOOPS))
def test_precision_and_scaler_are_the_cases(name, precision, monkeypatch):
    scalers, dtypes = [], []

    class Seen(torch.amp.GradScaler):
        def scale(self, outputs):
            scalers.append(self.is_enabled())
            return super().scale(outputs)

    monkeypatch.setattr(torch.amp, "GradScaler", Seen)
    loop = LOOPS[name](_case(precision))
    loop.network.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    loop.step()
    assert dtypes == [DTYPES[precision]]
    assert any(scalers) == (precision == "fp16")


def test_settings_are_the_trainers():
    train = _case().settings("eager")
    assert (train.lr, train.weight_decay) == (baselines.LR, baselines.WEIGHT_DECAY)
    assert (train.momentum, train.nesterov) == (baselines.MOMENTUM, True)
    assert (STUDENT.teacher_weight, STUDENT.temperature) == (baselines.TEACHER_WEIGHT, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bare_students_loss_is_the_students(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = 3 * torch.randn(2, 16, 10, generator=generator, dtype=dtype)
    labels = torch.randint(0, 10, (16,), generator=generator)
    torch.testing.assert_close(
        baselines.student_loss(logits, teacher_logits, labels),
        distill(logits, labels, teacher_logits, baselines.TEACHER_WEIGHT),
    )


@pytest.fixture
def teachers(monkeypatch):
    """Teachers that were made in this test."""
    made, calibrate = [], baselines.calibrate

    def keep(model, images_NCHW):
        made.append(calibrate(model, images_NCHW))
        return made[-1]

    monkeypatch.setattr(baselines, "calibrate", keep)
    return made


@pytest.mark.parametrize("name", _named(STUDENTS))
def test_a_students_loss_is_of_its_own_and_its_teachers_logits(name, teachers):
    loop = LOOPS[name](_case())
    images, labels = loop.batch
    logits, (teacher,) = loop.network(images), teachers
    expected = distill(logits, labels, teacher(images), baselines.TEACHER_WEIGHT)
    torch.testing.assert_close(loop.loss(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", _named(STUDENTS))
def test_a_student_asks_its_teacher_at_every_step_and_leaves_it_as_it_is(name, teachers):
    loop, (teacher,) = LOOPS[name](_case("bf16")), teachers
    before = copy.deepcopy(teacher.state_dict())
    asked = []
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(output.requires_grad))
    loop.step()
    loop.step()
    assert asked == [False, False]
    assert not teacher.training
    assert sum(isinstance(module, nn.BatchNorm2d) for module in teacher.modules()) == 7
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert torch.isfinite(loop.loss())
    # What it says reaches the weights.
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    loop.step()
    assert not torch.isfinite(loop.loss())
    assert not any(torch.isfinite(parameter).all() for parameter in loop.network.parameters())


@needs_timm
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet8"])
def test_timms_network_is_the_same_function(name):
    case = _case(model=name, facts=replace(FACTS, height_px=33, width_px=32))
    ours, theirs = baselines.fresh_network(case, 3), baselines.timm_network(case, 3)
    assert type(theirs).__module__.startswith("fastgen." if name == "resnet8" else "timm.")
    images = baselines.held_batch(case).images_NCHW
    torch.testing.assert_close(theirs.train()(images), ours.train()(images))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in theirs.parameters() if p.ndim == 4)


@needs_timm
@pytest.mark.parametrize("loop_of", [baselines.timm_loop, baselines.timm_student_loop])
def test_timms_step_is_by_its_own_task_optimizer_and_scaler(loop_of, monkeypatch):
    import timm.optim
    import timm.task
    import timm.utils

    used = []

    def seen(module, name):
        original = getattr(module, name)

        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            used.append((name, made))
            return made

        monkeypatch.setattr(module, name, make)

    for module, name in (
        (timm.task, "ClassificationTask"), (timm.task, "LogitDistillationTask"),
        (timm.optim, "create_optimizer_v2"), (timm.utils, "NativeScaler"),
    ):  # fmt: skip
        seen(module, name)
    task = "ClassificationTask" if loop_of is baselines.timm_loop else "LogitDistillationTask"
    for precision in PRECISIONS:
        used.clear()
        loop = loop_of(_case(precision))
        scaler = ["NativeScaler"] if precision == "fp16" else []
        assert [name for name, _ in used] == [task, "create_optimizer_v2", *scaler]
    (_, made), (_, optimizer), _ = used
    assert made.trainable_module is loop.network
    assert isinstance(optimizer, torch.optim.SGD)
    groups = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert set(groups) == {0.0, baselines.WEIGHT_DECAY}
    assert all(group["nesterov"] and group["momentum"] == baselines.MOMENTUM for group in groups.values())
    assert {parameter.ndim for parameter in groups[0.0]["params"]} == {1}


@needs_timm
def test_a_cpu_runs_all_but_apex(monkeypatch):
    case = _case()
    assert baselines.missing(case) == {"apex": "not measured (no GPU)"}
    monkeypatch.setattr(baselines, "compiled", lambda function, shapes: function)
    steps = baselines.baselines(case)
    assert [*steps, "apex"] == sorted(baselines.BASELINES, key=[*steps, "apex"].index)
    for one in steps.values():
        assert one() is None


def test_absent_timm_is_told(monkeypatch):
    version = importlib.metadata.version

    def without_timm(name):
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_timm)
    monkeypatch.setattr(baselines, "compiled", lambda function, shapes: function)
    assert baselines.timm_version() is None
    told = baselines.missing(_case())
    assert told["timm"] == told["timm student"] == "not measured (timm is not installed)"
    assert {*baselines.baselines(_case())} == {*baselines.BASELINES} - {"timm", "timm student", "apex"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that puts modules on the path, for this test alone: install({"apex/__init__.py": text})."""

    def ours():
        return [name for name in sys.modules if name.split(".")[0] in ("timm", "apex", "amp_C")]

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        importlib.invalidate_caches()

    kept = {name: sys.modules.pop(name) for name in ours()}
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in ours():
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ({}, "cannot be used: No module named 'timm.task'"),
        ({"timm/task.py": "import timm_needs_it"}, "cannot be used: No module named 'timm_needs_it'"),
        ({"timm/task.py": "ClassificationTask = DistillationTeacher = 0"}, "has no LogitDistillationTask"),
    ],
)
def test_an_old_timm_is_told(install, tasks, why):
    metadata = "Metadata-Version: 2.1\nName: timm\nVersion: 0.9.2\n"
    install({"timm/__init__.py": "", "timm-0.9.2.dist-info/METADATA": metadata, **tasks})
    assert baselines.timm_version() == "0.9.2"
    told = baselines.missing(_case())
    assert told["timm"] == told["timm student"] == f"not measured (timm 0.9.2 {why})"


FUSED_SGD = "import torch\nclass FusedSGD(torch.optim.SGD):\n    pass\n"

NOT_NVIDIAS = "the package apex that is installed is not NVIDIA's, or was built without its extensions"


def _why_no_apex():
    # Nothing is put on a GPU by asking.
    return baselines.BASELINES["apex"].why_not(replace(_case(), device=torch.device("cuda")))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "apex is not installed"),
        ({"apex/__init__.py": "raise RuntimeError('the unrelated apex was imported')"}, NOT_NVIDIAS),
        ({"apex/__init__.py": "", "apex/optimizers.py": FUSED_SGD}, NOT_NVIDIAS),
        ({"apex/__init__.py": "", "amp_C.py": ""}, NOT_NVIDIAS),
        ({"apex/__init__.py": "", "apex/optimizers.py": "", "amp_C.py": ""}, NOT_NVIDIAS),
    ],
)
def test_another_apex_is_refused(install, files, why):
    if not files and importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed here")
    install(files)
    assert baselines.apex_sgd() is None
    assert _why_no_apex() == why
    with pytest.raises(ValueError, match="not here"):
        baselines.apex_step(_case())


def test_nvidias_apex_is_found_and_used(install, monkeypatch):
    install({"apex/__init__.py": "", "apex/optimizers.py": FUSED_SGD, "amp_C.py": ""})
    found = baselines.apex_sgd()
    assert found is not None
    assert found.__module__ == "apex.optimizers"
    assert _why_no_apex() is None
    steps = []
    monkeypatch.setattr(found, "step", lambda self: steps.append(self.defaults))
    baselines.apex_step(_case())()
    assert [(one["lr"], one["momentum"], one["nesterov"], one["weight_decay"]) for one in steps] == [
        (baselines.LR, baselines.MOMENTUM, True, baselines.WEIGHT_DECAY)
    ]
