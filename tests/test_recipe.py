"""recipe.py and config.py: what is wrong is refused in one line that names the key; what is right arrives unchanged."""

import json
import os
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import yaml

from fastgen.config import SECTIONS
from fastgen.errors import UserError, command
from fastgen.recipe import dump, load_text, read_recipe

RECIPES = sorted((Path(__file__).parent.parent / "rcp").glob("*.yaml"))
KEYS = [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)]

TINY = """\
data:
  dataset: digits
model:
  name: resnet8
train:
  epochs: 1
"""


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the command as the shell would and gives its one line; checks that nothing else came of it."""
    from fastgen.train import main

    def run(words, text=TINY, cfg="recipe.yaml"):
        monkeypatch.chdir(tmp_path)
        Path("recipe.yaml").write_text(text)
        before = everything_below(tmp_path)
        code = command(main, [f"--cfg={cfg}", *words])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("fastgen: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert everything_below(tmp_path) == before
        return err

    return run


# Words of the command line -> what the line must say: the key, and what to do.
BAD_OVERRIDES = {
    "--train.epoch=3": ["'train.epoch'", "did you mean 'train.epochs'"],
    "--trian.epochs=3": ["'trian.epochs'", "did you mean 'train.epochs'"],
    "--epochs=3": ["'epochs'"],
    "--cgf=x.yaml": ["'cgf'", "did you mean 'cfg'"],
    "--train=3": ["'train'"],
    "--train.epochs.more=3": ["'train.epochs.more'"],
    "--=3": ["unknown key"],
    "train.epochs=3": ["'train.epochs=3'", "--section.key=value"],
    "-h3": ["'-h3'"],
    "--train.epochs=3.7": ["train.epochs", "expected an integer", "3.7"],
    "--train.epochs=true": ["train.epochs", "expected an integer", "true"],
    "--train.epochs=": ["train.epochs", "expected an integer", "null"],
    "--train.epochs": ["train.epochs", "no value"],
    "--train.epochs=[1, 2]": ["train.epochs", "expected an integer"],
    "--train.epochs=1_000": ["train.epochs", "expected an integer"],
    "--train.epochs=0": ["train.epochs = 0", "1 or more"],
    "--train.epochs=[1": ["train.epochs", "YAML"],
    "--train.lr=abc": ["train.lr", "expected a number", "abc"],
    "--train.lr=false": ["train.lr", "expected a number", "false"],
    "--train.lr=.nan": ["train.lr", "expected a number"],
    "--train.lr=1e999": ["train.lr", "expected a number"],
    "--train.lr=0": ["train.lr = 0", "above 0"],
    "--train.lr_milestones=0.5": ["train.lr_milestones", "expected a list"],
    "--train.lr_milestones=[0.5, [0.75]]": ["train.lr_milestones", "expected a list"],
    "--train.lr_milestones=[0.75, 0.5]": ["train.lr_milestones", "rising"],
    "--train.lr_milestones=[0.5, 1.0]": ["train.lr_milestones", "between 0 and 1"],
    "--train.nesterov=1": ["train.nesterov", "true or false"],
    "--train.nesterov=yes": ["train.nesterov", "true or false", "yes"],
    "--train.momentum=0": ["train.nesterov", "train.momentum"],
    "--train.momentum=1": ["train.momentum = 1"],
    "--train.batch_size=0": ["train.batch_size = 0"],
    "--train.weight_decay=-1e-4": ["train.weight_decay"],
    "--train.precision=fp8": ["train.precision", "fp32, bf16, fp16", "fp8"],
    "--train.engine=fast": ["train.engine", "eager, compile"],
    "--data.dataset=mnist": ["data.dataset", "cifar100, cifar10, digits"],
    "--data.backend=ffvc": ["data.backend", "resident"],
    "--data.train_limit=9": ["data.train_limit = 9", "at least 10"],
    "--data.val_limit=0": ["data.val_limit = 0"],
    "--data.holdout=5": ["data.holdout = 5"],
    "--data.train_limit=100000": ["data.train_limit = 100000", "smaller"],
    "--data.val_limit=400": ["data.val_limit = 400", "smaller"],
    "--data.holdout=1442": ["data.holdout = 1442", "smaller"],
    "--data.seed=-1": ["data.seed = -1"],
    "--run.seed=9223372036854775808": ["run.seed"],
    "--run.init_seed=-1": ["run.init_seed = -1"],
    "--run.save_minutes=-1": ["run.save_minutes"],
    "--run.log_every_steps=0": ["run.log_every_steps"],
    "--run.device=gpu": ["run.device", "auto, cpu, cuda"],
    "--gen.generations=-1": ["gen.generations = -1"],
    "--gen.k=1": ["gen.k = 1", "2 to 10"],
    "--gen.k=11": ["gen.k = 11", "2 to 10"],
    "--gen.confidence=0.19": ["gen.confidence = 0.19", "[0.2, 1]"],
    "--gen.confidence=1.1": ["gen.confidence = 1.1", "[0.2, 1]"],
    "--gen.teacher_weight=1.1": ["gen.teacher_weight = 1.1", "[0, 1]"],
    "--gen.teacher_weight=-0.1": ["gen.teacher_weight = -0.1", "[0, 1]"],
    "--gen.teacher_weight=[0.6, 0.6]": ["gen.teacher_weight", "2 values for 5 students"],
    "--gen.teacher_weight=[0.6, 0.6, 0.6, 0.6, 2]": ["gen.teacher_weight = 2", "[0, 1]"],
    "--gen.teacher_weight=[]": ["gen.teacher_weight", "0 values for 5 students"],
    "--gen.temperature=[1, 1]": ["gen.temperature", "2 values for 5 students"],
    "--gen.temperature=0": ["gen.temperature = 0", "above 0"],
    "--gen.only=6": ["gen.only = 6", "0 to 5"],
    "--gen.only=-1": ["gen.only = -1", "0 to 5"],
    "--gen.only=2 --gen.teacher=nowhere": ["gen.teacher = nowhere"],
    "--gen.teacher=runs/x": ["gen.teacher", "gen.only"],
    "--gen.only=0 --gen.teacher=runs/x": ["gen.teacher", "gen.only = 0"],
    "--gen.patriarch=cross_entropy": ["gen.patriarch", "gen.confidence", "0.6"],
    "--gen.patriarch=label_smoothnig": ["gen.patriarch", "tolerant"],
    "--gen.only=2": ["generation 2", "teacher"],
    "--train.epochs=2 --train.epochs=3": ["--train.epochs", "twice"],
    "--cfg=other.yaml": ["--cfg", "twice"],
    "--train.epochs=!!int abc": ["train.epochs"],
    "--model.name=resnet21": ["model.name", "resnet20"],
    "--model.name=ResNet20": ["model.name", "resnet20"],
    "--model.name=": ["model.name"],
}


def words_of(line):
    return [f"--{word}" for word in line[2:].split(" --")] if line.startswith("--") else [line]


@pytest.mark.parametrize("line", BAD_OVERRIDES)
def test_a_bad_override_is_one_line(refused, line):
    told = refused(words_of(line))
    for part in BAD_OVERRIDES[line]:
        assert part in told


BAD_FILES = {
    "empty": ("", ["recipe.yaml", "sections"]),
    "only a comment": ("# nothing\n", ["recipe.yaml", "sections"]),
    "a word": ("hello\n", ["recipe.yaml", "hello"]),
    "a list": ("- data\n- model\n", ["recipe.yaml", "mapping"]),
    "not YAML": ("data: [1,\n", ["recipe.yaml", "not valid YAML"]),
    "a tab": ("data:\n\tdataset: digits\n", ["recipe.yaml", "not valid YAML"]),
    "two documents": (TINY + "---\n" + TINY, ["recipe.yaml", "not valid YAML"]),
    "an object": (TINY + "run: !!python/object/apply:os.system ['touch ran']\n", ["recipe.yaml", "not valid YAML"]),
    "unknown section": (TINY + "trian:\n  lr: 0.1\n", ["'trian'", "did you mean 'train'"]),
    "number as section": (TINY + "7:\n  lr: 0.1\n", ["'7'"]),
    "unknown key": (TINY + "  epoch: 3\n", ["'train.epoch'", "did you mean 'train.epochs'"]),
    "key without section": (TINY + "lr: 0.1\n", ["'lr'"]),
    "dotted key": (TINY + "gen.k: 3\n", ["'gen.k'"]),
    "nested key": (TINY + "  lr: {initial: 0.1}\n", ["train.lr", "expected a number"]),
    "section is a number": (TINY.replace("model:\n  name: resnet8", "model: 3"), ["'model'"]),
    "section is empty": (TINY + "gen:\n", ["'gen'", "null"]),
    "section is a text of several lines": (TINY + "gen: |\n  first\n  second\n", ["'gen'"]),
    "duplicate key": (TINY + "  epochs: 2\n", ["line 7", "'epochs'", "twice"]),
    "duplicate section": (TINY + "train:\n  lr: 0.1\n", ["'train'", "twice"]),
    "missing dataset": (TINY.replace("dataset: digits", "augment: none"), ["data.dataset is missing"]),
    "missing model": (TINY.replace("name: resnet8", "downsample: pooled"), ["model.name is missing"]),
    "missing section": (TINY.replace("train:\n  epochs: 1\n", ""), ["train.epochs is missing"]),
    "null where a value is required": (TINY.replace("epochs: 1", "epochs:"), ["train.epochs", "null"]),
    "fraction of an epoch": (TINY.replace("epochs: 1", "epochs: 3.7"), ["train.epochs", "3.7"]),
    "true epochs": (TINY.replace("epochs: 1", "epochs: true"), ["train.epochs", "true"]),
    "epochs in quotes": (TINY.replace("epochs: 1", "epochs: '1'"), ["train.epochs", "expected an integer"]),
    "epochs of several lines": (TINY.replace("epochs: 1", "epochs: |\n    1\n    2"), ["train.epochs"]),
    "a number as folder": (TINY + "run:\n  dir: 7\n", ["run.dir", "text"]),
    "a nested list": (TINY + "gen:\n  teacher_weight: [[0.6]]\n", ["gen.teacher_weight"]),
    "a tag that does not fit": (TINY.replace("epochs: 1", "epochs: !!int abc"), ["recipe.yaml"]),
    "a very long number": (TINY + "  lr: 1" + 400 * "0" + "\n", ["train.lr"]),
    "an endless number": (TINY.replace("epochs: 1", "epochs: 1" + 5000 * "0"), ["recipe.yaml"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(refused, name):
    text, parts = BAD_FILES[name]
    told = refused([], text)
    for part in parts:
        assert part in told


@pytest.mark.parametrize(
    ("cfg", "part"), [("nowhere.yaml", "nowhere.yaml: there is no such recipe"), (".", "cannot be read"), ("", "")]
)
def test_a_recipe_that_is_not_there(refused, cfg, part):
    assert part in refused([], cfg=cfg)


def test_a_recipe_that_is_no_text(refused, tmp_path):
    (tmp_path / "image.yaml").write_bytes(bytes(range(128, 256)))
    assert "image.yaml: cannot be read as a recipe" in refused([], cfg="image.yaml")


def test_no_recipe_at_all():
    with pytest.raises(UserError, match="name one with --cfg"):
        read_recipe([])


@pytest.mark.parametrize("words", [["--train.epochs=3.7"], ["--gen.only=2"], ["--cfg"], ["hello\nworld"]])
def test_the_real_command_refuses_in_one_line(run_command, write_recipe, tmp_path, words):
    here = tmp_path / "here"
    here.mkdir()
    ended = run_command([f"--cfg={write_recipe()}", *words], folder=here)
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("fastgen: ")
    assert everything_below(here) == []


def test_help_names_every_key_and_ends_well(run_command):
    ended = run_command(["--help"])
    assert ended.code == 0
    assert ended.err == ""
    for section in SECTIONS.values():
        for f in fields(section):
            assert f.metadata["text"] in ended.out
    for key in KEYS:
        assert f"--{key}=" in ended.out
    assert "--train.epochs=an integer  (required)" in ended.out
    assert "--gen.teacher_weight=a number or a list of numbers  (default 0.6)" in ended.out


def typos(word):
    """Every word that one slip of the finger makes of this one."""
    for place in range(len(word)):
        yield word[:place] + word[place + 1 :]
        yield word[:place] + word[place] + word[place:]
        yield word[:place] + ("x" if word[place] != "x" else "y") + word[place + 1 :]
        yield word[:place] + word[place].upper() + word[place + 1 :]
        yield word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]


def misspelt(tree):
    """(what is wrong, what was meant, the tree with it) for every typo of every section and key."""
    for section, keys in tree.items():
        for typo in set(typos(section)) - set(tree) - set(SECTIONS):
            yield typo, section, {typo if name == section else name: content for name, content in tree.items()}
        known = {key.partition(".")[2] for key in KEYS if key.startswith(f"{section}.")}
        for key in keys:
            for typo in set(typos(key)) - known:
                renamed = {typo if name == key else name: value for name, value in keys.items()}
                yield f"{section}.{typo}", f"{section}.{key}", {**tree, section: renamed}


def plain_tree(path):
    """The recipe by PyYAML's own rules, to which 1e-4 is text."""
    tree, texts = yaml.safe_load(path.read_text()), {"1e-4": 1e-4, "1e-5": 1e-5}
    return {
        section: {key: texts.get(v, v) if isinstance(v, str) else v for key, v in keys.items()}
        for section, keys in tree.items()
    }


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(path):
    recipe = read_recipe([f"--cfg={path}"])
    assert recipe.run.dir == f"runs/{path.stem}-{recipe.short_hash}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_typo_in_a_recipe_is_refused(path):
    tree, count = plain_tree(path), 0
    for typo, meant, wrong in misspelt(tree):
        with pytest.raises(UserError) as caught:
            load_text(json.dumps(wrong), "wrong.yaml")  # JSON is YAML, and faster to write
        assert f"'{typo}'" in str(caught.value)
        # Of one or two letters a slip leaves too little to guess from.
        if len(meant.partition(".")[2] or meant) > 3:
            assert f"did you mean '{meant}'?" in str(caught.value)
        count += 1
    assert count > 100


@pytest.mark.parametrize("key", KEYS)
def test_every_typo_on_the_command_line_is_refused(key, write_recipe):
    cfg = f"--cfg={write_recipe()}"
    for typo in set(typos(key)) - set(KEYS):
        with pytest.raises(UserError):
            read_recipe([cfg, f"--{typo}=1"])


def test_the_environment_has_no_influence(write_recipe, monkeypatch):
    cfg = f"--cfg={write_recipe()}"
    before = read_recipe([cfg])
    for key in KEYS:
        for name in (key, key.upper(), key.replace(".", "_"), key.replace(".", "_").upper(), f"FASTGEN_{key.upper()}"):
            monkeypatch.setitem(os.environ, name, "7")
    monkeypatch.setitem(os.environ, "train.lr", "0.5")
    monkeypatch.setitem(os.environ, "train", "lr: 0.5")
    assert read_recipe([cfg]) == before


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("false", "train", "nesterov", False),
        ("true", "run", "deterministic", True),
        ("1e-4", "train", "weight_decay", 1e-4),
        ("5E-4", "train", "weight_decay", 5e-4),
        ("1.5e+1", "train", "lr", 15.0),
        (".5", "train", "lr", 0.5),
        ("2.", "train", "lr", 2.0),
        ("1", "train", "lr", 1.0),
        ("7", "run", "seed", 7),
        ("-0", "run", "seed", 0),
        ("9223372036854775807", "run", "seed", 2**63 - 1),
        ("[0.25]", "train", "lr_milestones", (0.25,)),
        ("[]", "train", "lr_milestones", ()),
        ("[0.5, 1, 1e-1, 0, 0.2]", "gen", "teacher_weight", (0.5, 1.0, 0.1, 0.0, 0.2)),
        ("null", "data", "train_limit", None),
        ("null", "data", "seed", 0),
    ],
)
def test_values_arrive_as_what_they_are(write_recipe, text, section, key, value):
    """From the file and from the command line alike."""
    path = write_recipe(gen__generations=5)
    from_line = getattr(getattr(read_recipe([f"--cfg={path}", f"--{section}.{key}={text}"]), section), key)
    tree = yaml.safe_load(path.read_text())
    tree.setdefault(section, {})[key] = "VALUE"
    path.write_text(yaml.safe_dump(tree).replace("VALUE", text))
    from_file = getattr(getattr(read_recipe([f"--cfg={path}"]), section), key)
    for found in (from_line, from_file):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "08", "-07"])
def test_a_leading_zero_makes_no_octal_number(write_recipe, text):
    """Refused or decimal: 010 must not become 8, as it does in YAML 1.1, and 08 must not end in a traceback."""
    words = [f"--cfg={write_recipe()}", f"--gen.generations={text}"]
    if text == "-07":
        with pytest.raises(UserError, match=r"gen\.generations"):
            read_recipe(words)
        return
    try:
        found = read_recipe(words).gen.generations
    except UserError as refusal:
        found = str(refusal)
    assert found == int(text) or "gen.generations" in str(found)


@pytest.mark.parametrize("text", ["0123", "1e5", "true", "a b", "a: b", "[x]", "~x", "#x"])
def test_text_on_the_command_line_is_taken_as_it_stands(write_recipe, text):
    assert read_recipe([f"--cfg={write_recipe()}", f"--data.root={text}"]).data.root == text


def test_overrides_win_over_the_file(write_recipe):
    cfg = f"--cfg={write_recipe(train__lr=0.3, gen__teacher_weight=0.2, run__seed=4)}"
    recipe = read_recipe([cfg, "--train.lr=0.7", "--gen.teacher_weight", "0.4", "--run.seed=0"])
    assert (recipe.train.lr, recipe.gen.teacher_weight, recipe.run.seed) == (0.7, 0.4, 0)
    assert recipe.train.epochs == 1


def test_an_override_back_to_the_default_wins_too(write_recipe):
    cfg = f"--cfg={write_recipe(data__train_limit=100, run__dir='x', data__seed=3)}"
    recipe = read_recipe([cfg, "--data.train_limit=null", "--run.dir=null", "--data.seed="])
    assert recipe.data.train_limit is None
    assert recipe.run.dir.startswith("runs/tiny-")
    assert recipe.data.seed == 0


def test_defaults_are_the_papers(write_recipe):
    recipe = read_recipe([f"--cfg={write_recipe(gen__generations=..., train__batch_size=...)}"])
    train, gen = recipe.train, recipe.gen
    assert (train.batch_size, train.lr, train.lr_milestones, train.lr_factor) == (128, 0.1, (0.5, 0.75), 0.1)
    assert (train.momentum, train.nesterov, train.weight_decay) == (0.9, True, 1e-4)
    assert (gen.generations, gen.k, gen.confidence, gen.teacher_weight) == (5, 5, 0.6, 0.6)
    assert recipe.eta == pytest.approx(4 / 7, abs=1e-14)


def test_a_recipe_cannot_be_changed(write_recipe):
    recipe = read_recipe([f"--cfg={write_recipe()}"])
    with pytest.raises(FrozenInstanceError):
        recipe.train.lr = 1.0


ODD_NAMES = ["089", "010", "1e5", "12e4567", "null", "true", "no", "~", " x ", "a: b", "# x", "2026-11-21", "é", "a'b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_dump_and_load_give_an_equal_recipe(write_recipe, name):
    """The resolved recipe in the run folder is read back at every resume."""
    words = ["--run.seed=9223372036854775807", "--train.lr=1e-7", "--gen.teacher_weight=[0.1, 0.30000000000000004]"]
    recipe = read_recipe([f"--cfg={write_recipe(gen__generations=2)}", *words])
    recipe = replace(recipe, run=replace(recipe.run, dir=name), data=replace(recipe.data, root=name))
    assert load_text(dump(recipe), "dump") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_dump_of_every_recipe_is_that_recipe(path):
    recipe = read_recipe([f"--cfg={path}"])
    assert load_text(dump(recipe), "dump") == recipe
    assert list(yaml.safe_load(dump(recipe))) == list(SECTIONS)


def test_two_recipes_in_one_process_are_independent(write_recipe):
    one = f"--cfg={write_recipe(train__lr=0.3, data__train_limit=100)}"
    first = read_recipe([one, "--gen.teacher_weight=0.1", "--train.nesterov=false"])
    second = read_recipe([f"--cfg={write_recipe(name='other.yaml')}"])
    assert (second.train.lr, second.data.train_limit, second.gen.teacher_weight) == (0.1, None, 0.6)
    assert second.train.nesterov
    assert read_recipe([one, "--gen.teacher_weight=0.1", "--train.nesterov=false"]) == first


def test_the_default_folder_tells_recipes_apart(write_recipe):
    cfg = f"--cfg={write_recipe()}"
    plain = read_recipe([cfg]).run
    assert plain.nodes == "runs/nodes"
    assert read_recipe([cfg, "--run.save_minutes=1", "--data.root=x"]).run.dir == plain.dir
    for word in ("--train.lr=0.2", "--gen.generations=2", "--run.seed=1", "--data.val_limit=50", "--gen.only=0"):
        assert read_recipe([cfg, word]).run.dir != plain.dir
    named = read_recipe([cfg, "--run.dir=there/mine"]).run
    assert (named.dir, named.nodes) == ("there/mine", "there/nodes")
