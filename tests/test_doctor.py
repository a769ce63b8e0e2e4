"""fastgen.doctor: right about this machine, and about packages that are missing, raise, die, hang or are others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgen.data import digits
from fastgen.doctor import advice, driver, machine, packages, torch_trials
from fastgen.doctor.__main__ import _end_by_signals, _ended, failures_of, main, progress_line
from fastgen.doctor.findings import Answer, Finding, Mark, Place
from fastgen.doctor.report import lines_of
from fastgen.doctor.runner import run_trials
from fastgen.doctor.trials import TRIALS
from fastgen.errors import UserError, command
from fastgen.extras import PACKAGES, SYSTEM_PACKAGES, install_line

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Not found, as if they were not installed: for importlib.util.find_spec, which others ask, as well.
BLOCKER = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name in {names!r} else found(name, path, target)
"""
# Longer than a process needs to start on a busy machine.
LIMIT_SECONDS = 15.0
QUICK = {"OMP_NUM_THREADS": "1"}


def trials(*names):
    return [trial for trial in TRIALS if trial.name in names]


def alive(pid):
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that processes import from before all others; fastgen is this checkout's."""
    folder = tmp_path / "modules"
    folder.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    return folder


def found(*names, limit=LIMIT_SECONDS, runs=Path("runs")):
    return {one.name: one.answer for one in run_trials(trials(*names), runs, limit, lambda done, now: None)}


def requirements(texts):
    """Requirements by name, without this project's own extras."""
    return {re.match(r"[\w-]+", text)[0]: text for text in texts if not text.startswith("fastgen[")}


def test_every_package_of_pyproject_is_known_with_its_requirement_and_extras():
    extras = {}
    for extra, texts in PROJECT["optional-dependencies"].items():
        for name, text in requirements(texts).items():
            extras.setdefault(name, {})[extra] = text
    core = requirements(PROJECT["dependencies"])
    # pillow is of the core, and the extra ffcv names it because ffcv does not.
    for name in core:
        extras.pop(name, None)
    assert {name: about.requirement for name, about in PACKAGES.items() if not about.extras} == core
    assert {name: set(about.extras) for name, about in PACKAGES.items() if about.extras} == {
        name: set(by_extra) for name, by_extra in extras.items()
    }
    for name, by_extra in extras.items():
        assert set(by_extra.values()) == {PACKAGES[name].requirement}


def test_every_package_is_tried():
    others = {"nvidia-dali-cuda120", "nvidia-dali-cuda130", "opencv-python-headless"}
    tried = {trial.package for trial in TRIALS if trial.package}
    assert set(PACKAGES) - others == tried - others
    assert tried & others <= {"nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    assert len({trial.name for trial in TRIALS}) == len(TRIALS)


def test_system_packages_are_the_makefile_s():
    line = re.search(r"^SYSTEM_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert tuple(line.split()) == SYSTEM_PACKAGES


def test_no_line_installs_the_stranger_that_is_called_fastgen():
    for folder in ("fastgen", "benchmarks", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = [line for line in path.read_text().splitlines() if "pip install 'fastgen[x]'" not in line]
            assert not any("fastgen[" in line for line in lines), path
    assert install_line("scikit-learn") == "pip install scikit-learn"
    assert install_line("torch") == "pip install 'torch>=2.11'"
    assert install_line("ffcv").startswith("pip install --no-deps ffcv==1.0.2 && pip install ")


def test_digits_say_how_to_install_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install scikit-learn$"):
        digits.read_digits()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The command on this machine as it is: exit code, JSON."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "scratch").mkdir()
    env = {**os.environ, **QUICK, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "scratch"), "TRITON_INTERPRET": "1"}
    # Spares the compilation of small programs that only ask what the processor can.
    env["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    words = [sys.executable, "-m", "fastgen.doctor", "--json", f"--runs={folder / 'runs' / 'mine'}"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    told = json.loads(done.stdout)
    left = [path.name for path in folder.rglob("*") if path != folder / "scratch"]
    return SimpleNamespace(
        code=done.returncode, told=told, found={row["name"]: row for row in told["findings"]}, left=left
    )


def test_this_machine_trains_and_is_left_as_it_was(real):
    assert (real.code, real.told["ready"], real.told["failures"]) == (0, True, [])
    assert [row["name"] for row in real.told["findings"]] == [trial.name for trial in TRIALS]
    assert real.found["training"]["mark"] == "ok"
    assert "a patriarch and a student" in real.found["training"]["seen"]
    assert real.left == []


def test_packages_are_told_as_their_metadata_says(real):
    for trial in TRIALS:
        if not trial.package:
            continue
        row = real.found[trial.name]
        try:
            installed = version(trial.package)
        except PackageNotFoundError:
            assert (row["mark"], row["seen"]) == ("missing", "not installed")
            assert PACKAGES[trial.package].requirement in row["mend"]
            continue
        assert row["mark"] == "ok", row
        assert row["seen"].split(",")[0] == installed


def test_the_machine_is_told_as_the_system_says(real):
    assert real.found["cores"]["facts"]["cores"] == os.cpu_count()
    assert real.found["cores"]["facts"]["usable"] <= len(os.sched_getaffinity(0))
    assert 0 < real.found["memory"]["facts"]["usable_bytes"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert real.found["python"]["facts"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert real.found["runs"]["mark"] == "ok"
    for name in ("native", "compile", "gloo", "bf16", "fp16"):
        assert real.found[name]["mark"] == "ok", real.found[name]
    assert "TRITON_INTERPRET=1 is set" in real.found["triton"]["seen"]


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is an NVIDIA GPU")
def test_without_a_gpu_what_needs_one_is_not_used(real):
    for name in ("driver", "gpu", "graphs", "nccl"):
        assert real.found[name]["mark"] in ("not used", "missing"), real.found[name]
    assert "no NVIDIA driver" in real.found["driver"]["seen"]
    assert real.found["triton"]["facts"] == {"runs": False}


def test_a_package_that_raises_dies_or_hangs_is_one_line_and_the_others_go_on(here, tmp_path):
    (here / "submitit.py").write_text("raise RuntimeError('out\\nof order')")
    (here / "onnx.py").write_text("import os, signal, sys\nprint('the last word', flush=True)\nos.abort()")
    (here / "onnxruntime.py").write_text(
        "import pathlib, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    (here / "onnxscript.py").write_text("import sys\nsys.exit('no licence')")
    (here / "safetensors.py").write_text("import a_module_that_nobody_has")
    (here / "fastargs.py").write_text("import os\nos._exit(7)")
    (here / "tensorboard.py").write_text("import yaml.cyaml_of_old")
    names = (
        "pyyaml",
        "fastargs",
        "safetensors",
        "tensorboard",
        "submitit",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "ruff",
    )
    answers = found(*names, limit=12)
    assert {name for name, answer in answers.items() if answer.mark is Mark.OK} == {"pyyaml", "ruff"}
    assert {answer.mark for answer in answers.values()} == {Mark.OK, Mark.BROKEN}
    seen = {name: answer.seen for name, answer in answers.items()}
    assert seen["submitit"] == "raises RuntimeError: out"
    assert seen["onnx"] == "dies by SIGABRT: the last word"
    assert seen["onnxruntime"].startswith("hangs, or is slow: not done after 12 s")
    assert seen["onnxscript"] == "raises SystemExit: no licence"
    assert seen["safetensors"] == "raises ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    assert seen["fastargs"] == "ends its process with exit code 7"
    assert seen["tensorboard"] == "raises ModuleNotFoundError: No module named 'yaml.cyaml_of_old'"
    assert answers["submitit"].mend.endswith("install --force-reinstall --no-deps --no-cache-dir submitit")
    assert "--limit_seconds=60" in answers["onnxruntime"].mend
    assert not alive(int((tmp_path / "pid").read_text()))


def test_what_is_tried_after_torch_has_failed_is_not_told(here):
    """Although its process may be done with it before anyone looks."""
    (here / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    told = run_trials(
        trials("torch", "torchvision", "gpu", "bf16"), Path("runs"), 60, lambda done, now: time.sleep(1.5)
    )
    torch, *others = (one.answer for one in told)
    assert torch.seen == "raises ImportError: libtorch.so: cannot open shared object file"
    assert torch.mend.endswith(" install --force-reinstall --no-deps --no-cache-dir 'torch>=2.11'")
    assert {(answer.mark, answer.seen) for answer in others} == {(Mark.NOT_TRIED, "needs torch, which is broken")}


def test_an_old_version_is_told(here):
    (here / "fastargs.py").write_text("")
    about = here / "fastargs-1.1.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fastargs\nVersion: 1.1.4\n")
    answer = found("fastargs")["fastargs"]
    assert (answer.mark, answer.seen) == (Mark.BROKEN, "1.1.4, and fastgen needs fastargs==1.2.0")
    assert answer.mend.endswith(" install fastargs==1.2.0")


@pytest.mark.parametrize(
    ("version_found", "requirement", "good"),
    [
        ("2.14.1+cu130", "torch>=2.11", True),
        ("2.9.1", "torch>=2.11", False),
        ("2.11", "torch>=2.11", True),
        ("2", "numpy>=2", True),
        ("1.26.4", "numpy>=2", False),
        ("1.2.0", "fastargs==1.2.0", True),
        ("1.2.1", "fastargs==1.2.0", False),
        ("anything", "rich", True),
    ],
)
def test_versions_are_compared_by_number(version_found, requirement, good):
    assert packages.satisfies(version_found, requirement) is good


def test_without_ffcv_dali_scikit_learn_and_compilers_the_lines_install_them(here, monkeypatch):
    (here / "sitecustomize.py").write_text(BLOCKER.format(names=("ffcv", "nvidia.dali", "sklearn")))
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(advice.shutil, "which", lambda name: None)
    answers = found("torch", "ffcv", "dali", "scikit-learn", "native", "compile", limit=120)
    assert answers.pop("torch").mark is Mark.OK
    native, compiling = answers.pop("native"), answers.pop("compile")
    assert {answer.mark for answer in answers.values()} == {Mark.MISSING}
    pip = f"{advice.interpreter()} -m pip install"
    assert answers["scikit-learn"].mend == f"{pip} scikit-learn"
    assert answers["dali"].mend == f"{pip} nvidia-dali-cuda120"
    assert answers["ffcv"].mend.endswith(install_line("ffcv", pip))
    assert native.mark is compiling.mark is Mark.BROKEN
    assert "/nowhere/cc" in native.seen
    assert "/nowhere/c++" in compiling.seen
    assert "g++" in native.mend
    assert "g++" in compiling.mend


def test_ffcv_s_headers_come_before_ffcv_where_they_are_missing(monkeypatch):
    monkeypatch.setattr(advice, "_has_headers", lambda: False)
    monkeypatch.setattr(advice.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(advice.os, "geteuid", lambda: 1000)
    line = advice.install("ffcv")
    assert line.startswith("sudo apt-get update && sudo apt-get install -y --no-install-recommends g++ ")
    assert line.endswith(f" && {install_line('ffcv', advice.installer())}")
    monkeypatch.setattr(advice, "_has_headers", lambda: True)
    assert advice.install("ffcv") == install_line("ffcv", advice.installer())


def test_what_a_package_needs_and_lacks_is_in_the_line(here):
    (here / "sitecustomize.py").write_text(BLOCKER.format(names=("google.protobuf", "cv2", "yaml")))
    (here / "onnx.py").write_text("import google.protobuf")
    (here / "submitit.py").write_text("import cv2")
    (here / "onnxruntime.py").write_text("import yaml")
    answers = found("onnx", "submitit", "onnxruntime")
    pip = f"{advice.interpreter()} -m pip install"
    assert {name: (answer.seen, answer.mend) for name, answer in answers.items()} == {
        "onnx": ("raises ModuleNotFoundError: No module named 'google.protobuf'", f"{pip} onnx"),
        "submitit": ("needs opencv-python-headless, which is not installed", f"{pip} opencv-python-headless"),
        "onnxruntime": ("needs pyyaml, which is not installed", f"{pip} pyyaml"),
    }
    assert {answer.mark for answer in answers.values()} == {Mark.BROKEN}


def test_lines_are_for_the_environment_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advice.sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert advice.install("timm") == ".venv/bin/python -m pip install timm"
    monkeypatch.setattr(advice.sys, "executable", str(tmp_path / "python"))
    assert advice.install("timm") == f"{tmp_path}/python -m pip install timm"
    monkeypatch.setattr(advice.sys, "executable", "/opt/my python/bin/python")
    assert advice.install("timm") == "'/opt/my python/bin/python' -m pip install timm"
    assert advice.reinstall("torchvision").endswith(" install --upgrade 'torch>=2.11' torchvision")
    monkeypatch.setattr(advice, "find_spec", lambda name: None)
    monkeypatch.setattr(advice.shutil, "which", lambda name: "/bin/uv")
    assert advice.install("timm") == "uv pip install --python '/opt/my python/bin/python' timm"
    monkeypatch.setattr(advice.shutil, "which", lambda name: None)
    assert advice.install("timm").startswith("'/opt/my python/bin/python' -m ensurepip && ")
    assert advice.system("g++") == "install what Debian calls g++"


def test_without_torch_and_the_rest_the_command_still_tells_all(here, tmp_path, run_command):
    """Nothing but the standard library is needed to say what is missing."""
    blocked = ("torch", "rich", "yaml", "numpy", "PIL", "matplotlib", "fastargs", "sklearn", "nvidia")
    (here / "sitecustomize.py").write_text(BLOCKER.format(names=blocked))
    ended = run_command(["--require=cores,native,rich"], module="fastgen.doctor")
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("fastgen: nothing can be trained: torch is missing (not installed); ")
    assert last.endswith(
        "--require: rich is missing (not installed); --require: native is not tried (needs torch, which is missing)"
    )
    lines = ended.out.splitlines()
    (torch,) = [number for number, line in enumerate(lines) if re.match(r"  missing +torch ", line)]
    assert lines[torch + 1].strip() == f"-> {sys.executable} -m pip install 'torch>=2.11'"
    for name in ("training", "gpu", "ffcv", "compile", "timm"):
        assert any(re.match(rf"  not tried +{name} +needs torch, which is missing", line) for line in lines), name
    for name in ("rich", "pyyaml", "numpy", "pillow", "matplotlib", "fastargs", "scikit-learn", "dali"):
        assert any(re.match(rf"  missing +{name} +not installed", line) for line in lines), name
    assert any(re.match(r"  ok +cores ", line) for line in lines)
    assert "Training is possible" not in ended.out


def test_nohup_is_respected():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _end_by_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is _ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_was_started(here, tmp_path, number):
    (here / "torch.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    words = [sys.executable, "-m", "fastgen.doctor", "--json"]
    doctor = subprocess.Popen(
        words, cwd=tmp_path, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        doctor.send_signal(number)
        assert doctor.wait(60) == 128 + number
    finally:
        doctor.kill()
    assert not alive(int((tmp_path / "pid").read_text()))
    assert list(scratch.iterdir()) == []


def make_apex(folder, *files):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return folder


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, tmp_path / "runs")


def forget(name):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_the_unrelated_apex_is_told_from_nvidia_s(tmp_path, monkeypatch, place):
    """The files of either, as they are in the index's package and in NVIDIA's repository."""
    if importlib.util.find_spec("apex") is None:
        assert packages.apex(place).mark is Mark.MISSING
    monkeypatch.syspath_prepend(
        make_apex(tmp_path / "other", "apex/__init__.py", "apex/lib/libapex.py", "apex/ext/deform.py")
    )
    other = packages.apex(place)
    assert (other.mark, other.facts) == (Mark.BROKEN, {"nvidia": False})
    assert "not NVIDIA's" in other.seen
    assert "uninstall apex && git clone https://github.com/NVIDIA/apex" in other.mend
    assert "apex" not in sys.modules

    nvidia = make_apex(tmp_path / "nvidia", "apex/__init__.py", "apex/optimizers/fused_sgd.py")
    (nvidia / "apex/optimizers/__init__.py").write_text("class FusedSGD: pass")
    monkeypatch.syspath_prepend(nvidia)
    bare = packages.apex(place)
    assert (bare.mark, bare.seen) == (Mark.BROKEN, "NVIDIA's, built without its extensions: FusedSGD is not in it")
    make_apex(nvidia, "amp_C.py")
    try:
        assert packages.apex(place).mark is Mark.OK
    finally:
        forget("apex")
        forget("amp_C")


def write_files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_limits_of_control_groups_of_version_2(tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    write_files(tmp_path, proc__self__cgroup="0::/job/step\n")
    write_files(top / "job", **{"memory.max": "4294967296\n", "cpu.max": "max 100000\n"})
    write_files(top / "job/step", **{"memory.max": "max\n", "cpu.max": "150000 100000\n"})
    assert machine.memory_limit(tmp_path) == 4 << 30
    assert machine.cpu_quota(tmp_path) == 1.5
    write_files(top / "job/step", **{"memory.max": "1073741824\n"})
    write_files(top / "job", **{"cpu.max": "50000 100000\n"})
    assert machine.memory_limit(tmp_path) == 1 << 30
    assert machine.cpu_quota(tmp_path) == 0.5


def test_limits_of_control_groups_of_version_1(tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    write_files(tmp_path, proc__self__cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    # In a container the files of its own group are at the top, and the path of the host is not there.
    write_files(top / "memory", **{"memory.limit_in_bytes": "2147483648"})
    write_files(top / "cpu,cpuacct", **{"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"})
    assert machine.memory_limit(tmp_path) == 2 << 30
    assert machine.cpu_quota(tmp_path) == 2
    write_files(top / "memory", **{"memory.limit_in_bytes": "9223372036854771712"})
    write_files(top / "cpu,cpuacct", **{"cpu.cfs_quota_us": "-1"})
    assert machine.memory_limit(tmp_path) is None
    assert machine.cpu_quota(tmp_path) is None


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert machine.memory_limit(tmp_path) is None
    assert machine.cpu_quota(tmp_path) is None


def test_a_limit_is_told_beside_what_the_machine_has(monkeypatch, place):
    monkeypatch.setattr(machine, "memory_limit", lambda root: 1 << 30)
    monkeypatch.setattr(machine, "meminfo", lambda root: (8 << 30, 5 << 30))
    monkeypatch.setattr(machine, "cpu_quota", lambda root: 0.5)
    assert machine.memory(place).seen == "1.0 GiB by the limit of the control group, of 8.0, 1.0 free"
    assert machine.memory(place).facts == {"usable_bytes": 1 << 30}
    assert machine.cores(place).seen.startswith(f"0.5 of {os.cpu_count()}, by the limit of the control group")
    monkeypatch.setattr(machine, "memory_limit", lambda root: None)
    assert machine.memory(place).seen == "8.0 GiB, 5.0 free"


def test_a_folder_of_runs_that_is_full_or_not_to_be_written_to_is_told(tmp_path, monkeypatch):
    good = machine.runs(Place(tmp_path, tmp_path / "not" / "yet"))
    assert good.mark is Mark.OK
    assert list(tmp_path.iterdir()) == []
    # Nobody, root included, makes a folder there.
    bad = machine.runs(Place(tmp_path, Path("/proc/self")))
    assert bad.mark is Mark.BROKEN
    assert "--runs" in bad.mend
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50 << 20))
    full = machine.runs(Place(tmp_path, tmp_path))
    assert (full.mark, full.mend.split(",")[0]) == (Mark.BROKEN, "free some space")


NVML = """
#include <string.h>
struct memory { unsigned long long total, free, used; };
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "?"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "550.54.15", size); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **handle)
{ *handle = (void *)(0x100000000 + number); return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size)
{ strncpy(text, (unsigned long)handle & 1 ? "NVIDIA B" : "NVIDIA A", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory)
{ memory->total = 80ULL << 30; return (unsigned long)handle & 1 ? 3 : 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
"""


@pytest.fixture
def make_nvml(tmp_path, monkeypatch):
    """Function that puts a library in the place of NVML; `init` is what its first function gives."""

    def make(init):
        folder = tmp_path / "nvml"
        folder.mkdir()
        (folder / "nvml.c").write_text(NVML)
        library = str(folder / driver.LIBRARY)
        subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT={init}", "-o", library, folder / "nvml.c"], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))

    return make


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is an NVIDIA GPU")
class TestDriver:
    """On a machine without a driver, with a library that stands for one."""

    def test_an_old_driver_is_why_torch_sees_no_gpu(self, here, make_nvml):
        import torch

        make_nvml(0)
        answers = found("driver", "torch", "gpu", limit=120)
        assert answers["driver"].mark is Mark.OK
        assert answers["driver"].seen == "550.54.15, for CUDA up to 12.4: NVIDIA A (80 GiB), NVIDIA B"
        assert answers["gpu"].mark is Mark.BROKEN
        if torch.version.cuda is None:
            assert "torch is built for the CPU alone" in answers["gpu"].seen
        else:
            built = torch.version.cuda
            assert answers["gpu"].seen == f"torch is built for CUDA {built}, and driver 550.54.15 runs CUDA up to 12.4"
            assert answers["gpu"].mend == "update the driver, or install a torch that is built for CUDA 12"

    def test_a_library_without_a_driver_is_no_driver(self, here, make_nvml):
        make_nvml(9)
        answer = found("driver")["driver"]
        assert answer.mark in (Mark.NOT_USED, Mark.MISSING)
        assert answer.seen.startswith("no NVIDIA driver, and ")

    def test_a_driver_that_fails_is_told_with_its_reason(self, here, make_nvml):
        make_nvml(18)
        answer = found("driver")["driver"]
        assert (answer.mark, answer.seen) == (Mark.BROKEN, "nvmlInit_v2: Driver/library version mismatch")


A_DRIVER = driver.Driver("580.65", (13, 0), (driver.Gpu("NVIDIA A", 80 << 30, (9, 0)),))


@pytest.mark.parametrize(
    ("there", "built_for", "visible", "mark", "seen"),
    [
        (None, "13.0", None, Mark.NOT_USED, "no GPU: there is no NVIDIA driver"),
        (replace(A_DRIVER, gpus=()), "13.0", None, Mark.NOT_USED, "no GPU"),
        (A_DRIVER, None, None, Mark.BROKEN, "torch is built for the CPU alone, and there is NVIDIA A"),
        (A_DRIVER, "13.0", "", Mark.NOT_USED, "hidden by CUDA_VISIBLE_DEVICES="),
        (A_DRIVER, "14.1", None, Mark.BROKEN, "torch is built for CUDA 14.1, and driver 580.65 runs CUDA up to 13.0"),
        (A_DRIVER, "13.1", None, Mark.BROKEN, "torch sees none of the driver's: NVIDIA A"),
    ],
)
def test_why_torch_sees_no_gpu(monkeypatch, there, built_for, visible, mark, seen):
    monkeypatch.setattr(torch_trials, "read_driver", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answer = torch_trials._why_no_gpu(built_for)
    assert (answer.mark, answer.seen) == (mark, seen)
    assert bool(answer.mend) is (mark is Mark.BROKEN or visible is not None)


def test_gpus_without_a_driver_are_found_on_the_bus(tmp_path):
    devices = tmp_path / "sys/bus/pci/devices"
    for address, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030000"),
        ("0000:01:00.1", "0x10de", "0x040300"),
        ("0000:02:00.0", "0x10de", "0x030200"),
        ("0000:03:00.0", "0x1002", "0x030000"),
    ):
        write_files(devices / address, vendor=f"{vendor}\n", **{"class": f"{kind}\n"})
    assert list(driver.pci_cards(tmp_path)) == ["0000:01:00.0", "0000:02:00.0"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--require=gpu,fcv"], "'fcv' is nothing that is tried: did you mean 'ffcv'?"),
        (["--require="], "names nothing"),
        (["--limit_seconds=0"], "'0' is below 1"),
        (["--limit_seconds=soon"], "'soon' is no whole number"),
        (["--runs=FILE"], "is no folder, nor can it become one"),
        (["--runs=FILE/below"], "is no folder, nor can it become one"),
        (["--jsn"], "unrecognized arguments: --jsn"),
        (["ffcv"], "unrecognized arguments: ffcv"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(tmp_path, capsys, words, line):
    (tmp_path / "file").write_text("")
    assert command(main, [word.replace("FILE", str(tmp_path / "file")) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert line in told.err


def finding(name, mark, seen="seen", mend=""):
    return Finding(name, "Group", "its purpose", Answer(mark, seen, mend))


def test_what_makes_the_exit_code():
    good = [finding(name, Mark.OK) for name in ("python", "torch", "training")]
    others = [finding("ffcv", Mark.MISSING), finding("gpu", Mark.NOT_USED), finding("dali", Mark.OK)]
    assert failures_of([*good, *others], []) == []
    assert failures_of([*good, *others], ["dali"]) == []
    assert failures_of([*good, *others], ["dali", "gpu", "ffcv"]) == [
        "--require: ffcv is missing (seen)", "--require: gpu is not used (seen)",
    ]  # fmt: skip
    bad = [*good[:2], finding("training", Mark.BROKEN, "raises")]
    assert failures_of([*bad, *others], ["training"]) == ["nothing can be trained: training is broken (raises)"]


def test_progress_is_by_processes():
    sessions = {trial.session for trial in TRIALS}
    assert progress_line([], ["torch"], 1.0) == f"tried 0 of {len(TRIALS)}, 0.0 a second; now torch"
    first = [trial.name for trial in TRIALS if trial.session == "machine"]
    left = 3 * (len(sessions) - 1)
    line = f"tried {len(first)} of {len(TRIALS)}, {len(first) / 3:.1f} a second, about {left} s left; now torch, dali"
    assert progress_line(first, ["torch", "dali"], 3.0) == line
    # One trial of a process that is still at work is not yet counted.
    assert f"about {left} s left" in progress_line([*first, "torch"], ["gpu"], 3.0)


def test_lines_are_aligned_and_what_is_to_be_copied_is_whole():
    mend = "pip install " + "x" * 200
    findings = [finding("a", Mark.OK, "word " * 30), finding("longer", Mark.NOT_USED, "no", mend)]
    lines = list(lines_of(findings, 80, colours=False))
    assert lines[:2] == ["", "Group"]
    column = lines[2].index("word")
    assert column == lines[-2].index("no [its purpose]")
    assert lines[-1] == " " * column + "-> " + mend
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[2].startswith("  ok         a       word")
    coloured = next(line for line in lines_of(findings, 80, colours=True) if "longer" in line)
    assert re.sub(r"\033\[\d+m", "", coloured) == lines[-2]
