"""README.md and docs/ are true: every command is run or read, every link leads somewhere, every module is in the map.

How each command is run stands in COMMANDS; a command that is not there fails, and so does a row that no page needs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from docs_book import PAGES, ROOT, anchors_of, commands_in, links_of, split
from docs_workshop import CIFAR, PHOTOGRAPHS, Copied, Parsed, Planned, Run, Workshop, in_a_copy

from fastgen import reference
from fastgen.errors import command as ended_as
from fastgen.recipe import read_recipe

TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
ALL = "\n".join(TEXTS.values())
PURE = (
    "config",
    "networks",
    "rules",
    "laws",
    "plan",
    "recipe",
    "schedule",
    "philox",
    "crops",
    "selection",
    "views",
    "errors",
    "stop",
    "reference",
)
TRAIN = "python -m fastgen.train --cfg"
R20, FIT, R18, PHOTO = (f"{TRAIN} rcp/{name}.yaml --data.root=DIR" for name in (
    "c100_r20_gen", "c100_fit", "r18_gen", "photo_trial"
))  # fmt: skip
TRIAL = f"{TRAIN} RECIPE"
STORED = f"{TRIAL} --teacher.labels=store"
OTHER = f"{TRIAL} --gen.temperature=2.0"
MANIFEST, BETON = "python -m data_prep.manifest --source=DIR/", "python -m data_prep.beton --source=DIR/"
TRAIN_MANIFEST = f"{MANIFEST}train --out=DIR/train.manifest"
VAL_MANIFEST = f"{MANIFEST}val --out=DIR/val.manifest --classes-from=DIR/train.manifest"
TRAIN_BETON = f"{BETON}train --out=DIR/train.beton"
VAL_BETON = f"{BETON}val --out=DIR/val.beton --classes-from=DIR/train.beton"
TOLERANT = f"{FIT} --gen.generations=3 --run.dir=runs/tol"
PLAIN_WORDS = "--gen.patriarch=cross_entropy --gen.confidence=1.0 --gen.teacher_weight=0.0"
PLAIN = f"{FIT} --gen.generations=3 --run.dir=runs/plain {PLAIN_WORDS}"
TENTH = (
    "--data.train_limit=5000 --train.epochs=20 --gen.generations=2 --train.precision=bf16 --run.eval_every_epochs=2 "
)
FIRST = f"{PHOTO} --run.dir=runs/first"
HELD_OUT = f"{TRIAL} --data.holdout=5000"
REPEAT = "python -m fastgen.repeat --cfg rcp/{}.yaml --data.root=DIR {}--seeds=0,1,2"
SWEEP = "python -m fastgen.sweep --cfg {} --data.holdout=5000 "
EXPORT = "python -m fastgen.export RUN"

# What makes trainings on 600 random images in CIFAR-100's files, and on 20 photographs, short.
FEW = "--train.epochs=1 --train.batch_size=100 --data.train_limit=200 --data.val_limit=100"
ONE_EPOCH = f"{FEW} --gen.generations=1 --model.name=resnet8"
SMALL_PHOTOGRAPHS = (
    "--train.epochs=1 --train.batch_size=10 --train.warmup_epochs=0 --data.resolution_px=32 "
    "--data.eval_resolution_px=32 --run.device=cpu"
)
FEW_HELD_OUT = {"--data.holdout=5000": "--data.holdout=100"}
TENTHS = {"--data.train_limit=5000": "--data.train_limit=500"}
# Sweeps and repeats train in processes of their own, which know CIFAR-100's true files alone.
DIGITS = {"rcp/c100_r20_gen.yaml --data.root=DIR": "tiny.yaml"}
DIGITS_HELD_OUT = DIGITS | FEW_HELD_OUT

MEASURES = "measures for minutes; tests/test_benchmark*.py and those named after it run it small"
INSTALLS = "installs packages"
SLURM = "needs Slurm, or two machines with eight GPUs each"

COMMANDS = {
    # make
    "make demo": Parsed("a minute of training; tests/test_recipes_run.py trains the recipe"),
    "make test": Parsed("this is a part of it"),
    "make env": Parsed(INSTALLS),
    "make lock": Parsed(INSTALLS),
    "make loaders": Parsed(INSTALLS),
    "make soak": Parsed("half an hour; tests/test_soak.py runs a part"),
    "make soak SOAK=--share=0.1": Parsed("minutes; tests/test_soak.py runs a part"),
    **{
        f"python -m pip install -e '.[{name}]'": Parsed(INSTALLS)
        for name in ("timm", "transfer", "dali", "slurm", "export")
    },
    # training
    TRIAL: Run("--run.dir=runs/base", says="results.json"),
    OTHER: Run("--run.dir=runs/other"),
    R20: Run(ONE_EPOCH, CIFAR, says="results.json"),
    f"{TRIAL} --run.dry=true": Run(says="teacher_weight 0.6"),
    f"{TRIAL} --gen.only=3 --gen.teacher_weight=0.7": Run(after=(TRIAL,), says="generation 2"),
    f"{TRIAL} --gen.only=3 --gen.teacher=RUN": Run(after=(TRIAL,)),
    HELD_OUT: Run("--run.dir=runs/held_out", instead=FEW_HELD_OUT, says="100 holdout images"),
    f"{TRIAL} --data.download=true": Run("--run.dry=true"),
    f"{TRIAL} --run.stop_after_minutes=M": Run("--run.seed=7", says="results.json"),
    f"{TRIAL} --train.precision=bf16 --train.engine=compile": Planned(why="compiles for a minute: test_engines.py"),
    f"{TRIAL} --train.kernels=triton --train.batchnorm=triton": Planned(why="an NVIDIA GPU"),
    f"{TRIAL} --teacher.labels=table": Run("--run.seed=8", says="labels"),
    f"{TRIAL} --teacher.engine=fused": Run(),
    f"{TRIAL} --data.root=DIR": Run(places=CIFAR, after=(TRIAL,)),
    f"{TRIAL} --gen.student_confidence=0.8": Run(),
    f"{TRIAL} --gen.ensemble_teachers=2": Planned(why="as those beside it"),
    f"{TRIAL} --gen.confidence=1.0": Planned(why="a part of the next three"),
    **{
        f"{TRIAL} --gen.patriarch={words}": Planned("--gen.confidence=1.0", why="as those beside it")
        for words in (
            "label_smoothing --gen.smoothing=0.1", "confidence_penalty --gen.entropy_weight=0.1",
            "soteacher --gen.lipschitz_weight=1e-5 --gen.consistency_weight=1.0",
        )
    },
    f"{TRIAL} --gen.k=10 --gen.k_mass=0.95": Run(),
    # repeats and sweeps
    REPEAT.format("c100_r20_gen", ""): Run(
        "--gen.generations=0", instead={**DIGITS, "0,1,2": "0,1"}, says="2 repeats"
    ),
    REPEAT.format("c100_r20_gen", TENTH): Planned(
        places=CIFAR, instead=TENTHS, why="an hour and a half: the line above runs"
    ),
    f"{REPEAT.format('c100_r20_gen', TENTH)} {PLAIN_WORDS}": Planned(
        places=CIFAR, instead=TENTHS, why="as the line above"
    ),
    REPEAT.format("c100_fit", "--gen.generations=3 "): Planned(FEW, CIFAR, why="three trainings as above"),
    **{
        f"{REPEAT.format('c100_fit', '--gen.generations=3 ')} "
        f"--gen.patriarch=cross_entropy --gen.confidence=1.0 --gen.teacher_weight={weight}": Planned(
            FEW, CIFAR, why="three trainings as above"
        )
        for weight in ("0.5", "0.0")
    },
    f"{FIT} --run.seed=0 --run.dir=runs/ensemble-0 --gen.ensemble_teachers=2": Planned(FEW, CIFAR, why="as above"),
    f"{FIT} --run.seed=0 --run.dir=runs/smoothing-0 --gen.generations=1 --gen.confidence=1.0 "
    "--gen.patriarch=label_smoothing --gen.smoothing=0.1": Planned(FEW, CIFAR, why="as above"),
    SWEEP.format("rcp/c100_r20_gen.yaml --data.root=DIR")
    + "--grid gen.teacher_weight=0.5,0.6,0.7 --grid gen.confidence=0.6,1.0 --seeds 3": Planned(
        instead=DIGITS_HELD_OUT, why="66 trainings: tests/test_sweep.py", says="6 cells x 3 seeds"
    ),
    SWEEP.format("rcp/c100_r20_gen.yaml --data.root=DIR") + "--grid gen.teacher_weight=0.5,0.7 --run.dry=true": Run(
        instead=DIGITS_HELD_OUT, says="2 cells"
    ),
    SWEEP.format("rcp/c100_r20_gen.yaml --data.root=DIR") + "--grid gen.teacher_weight=0.5,0.7 --report": Run(
        instead=DIGITS_HELD_OUT, says="2 cells"
    ),
    SWEEP.format("RECIPE") + "--gen.only=3 --gen.teacher=RUN --grid gen.teacher_weight=0.5,0.7": Run(
        places={"RUN": "runs/held_out"}, instead=FEW_HELD_OUT, after=(HELD_OUT,), says="sweep.csv"
    ),
    SWEEP.format("RECIPE") + "--grid gen.teacher_weight=0.5,0.7 --slurm_minutes=120 --slurm_more account=NAME": Planned(
        instead=FEW_HELD_OUT, why=SLURM
    ),
    # several processes
    f"{TRAIN} rcp/demo.yaml --dist.processes=2": Planned(why="tests/test_launch.py starts several processes"),
    f"python -m torch.distributed.run --nproc_per_node=8 -m {R18.removeprefix('python -m ')}": Parsed(SLURM),
    "python -m torch.distributed.run --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 "
    f"-m {R18.removeprefix('python -m ')}": Parsed(SLURM),
    "sbatch rcp/r18_gen.sbatch --data.root=DIR": Parsed(SLURM),
    # photographs
    TRAIN_MANIFEST: Run(places=PHOTOGRAPHS),
    VAL_MANIFEST: Run(places=PHOTOGRAPHS, after=(TRAIN_MANIFEST,)),
    TRAIN_BETON: Run(places=PHOTOGRAPHS),
    VAL_BETON: Run(places=PHOTOGRAPHS, after=(TRAIN_BETON,)),
    "python -m data_prep.verify DIR/train.beton": Run(places=PHOTOGRAPHS, after=(TRAIN_BETON,)),
    FIRST: Run(f"{SMALL_PHOTOGRAPHS} --gen.generations=0", PHOTOGRAPHS, after=(VAL_MANIFEST,)),
    PHOTO: Run(f"{SMALL_PHOTOGRAPHS} --gen.generations=0", PHOTOGRAPHS, after=(VAL_MANIFEST,)),
    f"{PHOTO} --data.backend=dali --gen.generations=0 --run.seed=1 --run.log_every_steps=1": Planned(
        SMALL_PHOTOGRAPHS, PHOTOGRAPHS, after=(VAL_MANIFEST,), why="as the next but one"
    ),
    R18: Run(
        f"{SMALL_PHOTOGRAPHS} --gen.generations=0 --train.precision=fp32", PHOTOGRAPHS, after=(VAL_BETON,),
        library="ffcv",
    ),
    f"{R18} --data.backend=dali": Run(
        f"{SMALL_PHOTOGRAPHS} --gen.generations=0 --train.precision=fp32", PHOTOGRAPHS, after=(VAL_MANIFEST,),
        library="nvidia.dali",
    ),
    f"{R18} --model.name=timm/resnet18 --run.dry=true": Run(places=PHOTOGRAPHS, after=(VAL_BETON,), library="timm"),
    # results
    FIT: Planned(FEW, CIFAR, why="as the tolerant one below"),
    f"{FIT} --gen.generations=0 --gen.patriarch=cross_entropy --gen.confidence=1.0": Run(FEW, CIFAR),
    f"{R20} --train.epochs=3 --gen.generations=2 --train.precision=bf16": Planned(
        "--data.train_limit=200", CIFAR, why="as the shorter one above"
    ),
    TOLERANT: Run(f"{FEW} --model.name=resnet8", CIFAR),
    PLAIN: Run(f"{FEW} --model.name=resnet8", CIFAR),
    # labels
    STORED: Run("--run.dir=runs/stored"),
    f"{STORED} --gen.only=3 --gen.teacher_weight=0.7": Run(after=(STORED,)),
    "python -m fastgen.stored_labels runs/nodes": Run(after=(STORED,), says="store"),
    "python -m fastgen.stored_labels runs/nodes --check": Run(after=(STORED,), says="nothing is damaged"),
    "python -m fastgen.stored_labels runs/nodes --remove=stale": Run(after=(STORED,), says="nothing is stale"),
    # what came of it
    "python -m fastgen.evaluate RUN": Run(after=(TRIAL,), says="ensemble of 4"),
    "python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE": Run(after=(TRIAL,)),
    "python -m fastgen.evaluate RUN --analyse": Run(after=(TRIAL,), says="analysis.json"),
    "python -m fastgen.evaluate RUN --analyse --against OTHER_RUN": Run(after=(TRIAL, OTHER), says="analysis.json"),
    "python -m fastgen.transfer RUN --to FOLDER --baseline PLAIN_RUN": Run(
        "--limit=100 --folds=2", {"FOLDER": "digits"}, after=(TRIAL, OTHER), says="McNemar"
    ),
    "python -m fastgen.transfer WEIGHTS.safetensors --cfg RECIPE --to FOLDER": Run(
        "--limit=100 --folds=2 --out=runs", {"FOLDER": "digits"}, after=(TRIAL,)
    ),
    "python -m fastgen.transfer runs/tol --to IMAGEWOOF --baseline runs/plain": Run(
        "--folds=2", after=(TOLERANT, PLAIN)
    ),
    "python -m fastgen.report runs/first": Run(after=(FIRST,)),
    "python -m fastgen.report RUN": Run(after=(TRIAL,)),
    "python -m fastgen.report RUN OTHER_RUN": Run("--to=beside", after=(TRIAL, OTHER)),
    "python -m fastgen.report runs": Run(places={"runs": "runs/base"}, after=(TRIAL,)),
    "python -m fastgen.report RUN OTHER_RUN --to FOLDER --title 'Teacher weights'": Run(after=(TRIAL, OTHER)),
    "python -m fastgen.report runs --baseline runs/asis-0": Run(
        instead={"runs --baseline runs/asis-0": "runs/base runs/other --to=against --baseline runs/base"},
        after=(TRIAL, OTHER),
    ),
    f"{EXPORT} --generation 1 --to FOLDER": Run(places={"FOLDER": "exported"}, after=(TRIAL,)),
    f"{EXPORT} --ensemble --to FOLDER --format onnx,safetensors --input pixels": Run(
        places={"FOLDER": "ensemble"}, after=(TRIAL,), library="onnx"
    ),
    "python -m fastgen.doctor": Run(),
    "python -m fastgen.doctor --json": Parsed("half a minute of work again; tests/test_doctor.py reads its JSON"),
    "python -m fastgen.doctor --require gpu,ffcv,dali": Parsed("exit code 1 where one of these is missing"),
    "python -m fastgen.reference": Run("--to=recipe.md"),
    # guides with code
    f"{TRAIN} rcp/demo.yaml --model.name=chain6": Copied("--train.epochs=1 --data.train_limit=200 --gen.generations=1"),
    f"{TRAIN} rcp/demo.yaml --gen.patriarch=focal --gen.focusing=2.0 --gen.confidence=1.0": Copied(
        "--train.epochs=1 --data.train_limit=200 --gen.generations=1"
    ),
    # benchmarks
    **{
        f"python -m benchmarks{words}": Parsed(MEASURES)
        for words in (
            "", ".rerun", ".rerun --data.root=DIR --rounds=12", ".scaling", ".generation",
            ".generation --process --cfg RECIPE", ".generation --images_from=DIR --rounds=8",
            ".step --images_from=DIR --rounds=14", ".ceilings --rounds=10",
            ".side_by_side --networks=1,2 --by=processes",
            ".feed --cfg rcp/c100_r20_gen.yaml --data.root=DIR --train.precision=bf16", ".loaders --images_from=DIR",
            ".teacher --precision=bf16 --rounds=12 --images_from=DIR", ".opcount", ".gpu_check",
            ".queue --minutes=8 --data.root=DIR", ".gpu_check --device=cpu --only=engines",
        )
    },
    # Last, as others read what it removes.
    "python -m fastgen.stored_labels runs/nodes --remove=KEY": Run(
        after=(f"{STORED} --gen.only=3 --gen.teacher_weight=0.7", "python -m fastgen.stored_labels runs/nodes --check"),
        says="removed",
    ),
}  # fmt: skip
ON_PAGES = {page: tuple(commands_in(text)) for page, text in TEXTS.items()}


def of_kind(*kinds):
    return [command for command, way in COMMANDS.items() if type(way) in kinds]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """One for all commands."""
    return Workshop(tmp_path_factory.mktemp("workshop"), COMMANDS)


# Commands.


def test_the_table_has_all_commands_and_no_others():
    there = {command for commands in ON_PAGES.values() for command in commands}
    assert sorted(there - {*COMMANDS}) == [], "say in COMMANDS how these are run"
    assert sorted({*COMMANDS} - there) == [], "no page has these any more"


@pytest.mark.parametrize("command", of_kind(Run, Planned), ids=str)
def test_a_command_runs(command, workshop):
    way = COMMANDS[command]
    if way.library:
        pytest.importorskip(way.library)
    ended = workshop.run(command)
    assert ended.code == 0, ended.out
    # Tables break their lines.
    assert way.says in " ".join(ended.out.split())
    assert isinstance(way, Planned) <= bool(getattr(way, "why", ""))


@pytest.mark.parametrize("command", [c for c in of_kind(Parsed) if c.startswith("python -m ") and " pip " not in c])
def test_a_command_that_is_not_run_is_read(command, workshop):
    words = workshop.words(command, COMMANDS[command])
    if words[0] == "torch.distributed.run":
        at = words.index("-m")
        assert workshop.call([*words[:at], "-m", "nothing"], parse=True).code == 0
        words = words[at + 1 :]
        assert words[0] == "fastgen.train"
    else:
        ended = workshop.call(words, parse=True)
        assert ended.code == 0, ended.out
    if "--cfg" in words:
        read_recipe(settings_in(words, workshop))


def settings_in(words, workshop):
    """The recipe's words of a command line, whose file is found from here."""
    at = words.index("--cfg")
    return [f"--cfg={workshop.folder / words[at + 1]}", *(w for w in words if re.match(r"--\w+\.\w+=", w))]


def test_a_word_that_is_wrong_would_be_told(workshop):
    assert workshop.call(["benchmarks.step", "--round=3"], parse=True).code == 2
    assert workshop.call(["fastgen.train", "--cfg", "tiny.yaml", "--gen.pupils=3"]).code == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_a_target(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for extra in re.findall(r"'\.\[([\w,-]+)\]'", ALL) for name in extra.split(",")}
    assert named
    assert named <= {*extras}
    # The package index holds another project of this name.
    assert not re.search(r"pip install\s+'?fastgen", ALL)


def test_the_job_of_slurm_is_a_script_and_its_words_are_settings(workshop):
    [command] = [c for c in COMMANDS if c.startswith("sbatch ")]
    _, script, *words = command.split()
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    recipe = re.search(r"--cfg (\S+)", (ROOT / script).read_text().split("srun")[-1])
    assert recipe is not None
    read_recipe([f"--cfg={ROOT / recipe[1]}", *words])


# Code.


@pytest.mark.parametrize("name", ["add-a-network", "add-a-loss"])
def test_a_guide_s_code_works(name, tmp_path):
    page = ROOT / "docs" / "guides" / f"{name}.md"
    shutil.copytree(ROOT / "fastgen", tmp_path / "fastgen", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rcp").symlink_to(ROOT / "rcp")
    checks = apply_code(split(TEXTS[page])[1], tmp_path)
    [command] = [c for c in ON_PAGES[page] if isinstance(COMMANDS[c], Copied)]
    words = [*command.split()[3:], *COMMANDS[command].more.split(), "--run.device=cpu"]
    code = "\n".join([*checks, "import sys, fastgen.train as train", f"train.main({words!r})", "print(train.__file__)"])
    ended = in_a_copy(tmp_path, ["-c", code])
    assert ended.code == 0, ended.out
    assert str(tmp_path) in ended.out
    assert (tmp_path / "runs").is_dir()


def apply_code(blocks, folder):
    """Writes a page's files, applies its changes, and gives its checks."""
    checks, changed = [], 0
    for kind, lines in blocks:
        text = "\n".join(lines) + "\n"
        if kind == "diff":
            subprocess.run(["git", "apply", "-p0", "-"], cwd=folder, input=text, text=True, check=True)
            changed += 1
        elif kind == "python" and lines[0] == "# check":
            checks.append(text)
        elif kind == "python":
            path = folder / lines[0].removeprefix("# ")
            assert not path.exists()
            path.write_text(text.split("\n", 1)[1])
    assert changed
    return checks


# Pages.


def test_every_link_leads_somewhere():
    wrong = []
    assert sum(len(links_of(text)) for text in TEXTS.values()) > 70
    for page, text in TEXTS.items():
        for path, anchor in links_of(text):
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
                wrong.append(f"{page.name}: {path}#{anchor}")
    assert wrong == []


def test_every_page_is_found_from_the_readme():
    linked = {(ROOT / path).resolve() for path, _ in links_of(TEXTS[ROOT / "README.md"]) if path}
    assert {*PAGES} - {ROOT / "README.md"} <= linked


def test_every_path_that_is_named_exists():
    quoted = re.findall(r"`((?:fastgen|benchmarks|data_prep|rcp|tests|docs)/[\w./-]*)`", ALL)
    assert len(quoted) > 150
    assert [path for path in {*quoted} if not (ROOT / path).exists()] == []


def test_every_setting_that_is_named_exists():
    from fastgen.recipe import _read_override

    named = re.findall(r"`((?:run|data|model|train|gen|teacher|dist)\.\w+)=([^`\s]+)", ALL)
    assert len(named) > 20
    for key, value in named:
        _read_override(key, value)


def test_the_readme_is_at_most_two_screens():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 100


def test_every_module_is_in_the_map():
    mapped = re.findall(
        r"^\| `((?:fastgen|benchmarks|data_prep)/[\w/]+\.py)` \| \S", TEXTS[ROOT / "docs/architecture.md"], re.M
    )
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("fastgen", "benchmarks", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
    }
    # A package's own module is one where there is code in it.
    plain = {path for path in modules if path.endswith("__init__.py") and "def " not in (ROOT / path).read_text()}
    assert len(mapped) == len({*mapped})
    assert modules - plain <= {*mapped} <= modules


def test_every_recipe_is_listed():
    for recipe in (ROOT / "rcp").glob("*.yaml"):
        assert f"rcp/{recipe.name}" in TEXTS[ROOT / "docs" / "guides" / "train.md"]


# The reference.


def test_the_recipe_reference_is_not_stale(tmp_path, capsys):
    assert ended_as(reference.main, ["--check"]) == 0
    old = tmp_path / "recipe.md"
    old.write_text(reference.page_text().replace("a straight line", "a crooked line"))
    assert ended_as(reference.main, ["--check", f"--to={old}"]) == 1
    assert capsys.readouterr().err == f"fastgen: {old} is stale: write it anew with python -m fastgen.reference\n"
    assert ended_as(reference.main, [f"--to={old}"]) == 0
    assert ended_as(reference.main, ["--check", f"--to={old}"]) == 0
    assert ended_as(reference.main, [f"--to={tmp_path}/nowhere/recipe.md"]) == 2


def test_the_reference_has_every_setting_and_the_rules_that_refuse():
    page = reference.page_text()
    from fastgen.config import SECTIONS

    for name, section in SECTIONS.items():
        for key in section.__dataclass_fields__:
            assert page.count(f"\n| `{name}.{key}` | ") == 1
    lines = list(reference.rule_lines())
    assert "`train.epochs`: give 1 or more" in lines
    assert "`data.val_limit`: give at least the number of classes, one image for each class" in lines
    assert "`data.crop_aspect`: give two numbers from 0 to 20, the second not below the first" in lines
    assert (
        "`gen.smoothing` has no say with gen.patriarch = ...: leave it out, or set gen.patriarch=label_smoothing"
        in lines
    )
    # Every call that refuses gives a line at least, and each line stands in a section.
    source = (ROOT / "fastgen" / "rules.py").read_text()
    assert len(lines) >= len(re.findall(r"^ +_require\(", source, re.M))
    assert all(f"- {line}" in page for line in lines)


# Imports.


def imported_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_fastgen_imports_nothing_heavy():
    assert imported_by("import fastgen") & {"torch", "numpy", "ffcv", "triton", "nvidia.dali", "fastargs"} == set()


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_no_torch(module):
    assert "torch" not in imported_by(f"import fastgen.{module}")


def test_the_command_imports_no_optional_library():
    optional = {"ffcv", "numba", "nvidia.dali", "triton", "sklearn", "tensorboard", "torchvision", "apex", "PIL"}
    assert imported_by("import fastgen.train") & optional == set()
