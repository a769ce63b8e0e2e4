"""Reads a recipe: YAML file and command line, strictly, into `config.Recipe`.

fastargs holds the declaration of all settings, prints the help and collects the values. Reading
is done here because fastargs on its own drops keys that it does not know, lets environment
variables win over the command line, reads 'false' as True and exits with 0 on an error.
"""

from __future__ import annotations

import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import fastargs
import yaml
from fastargs.validation import Checker

from fastgen.config import SECTIONS, Recipe, with_seeds
from fastgen.errors import UserError

# Settings that `gen.only` narrows to the one generation when they stand on the command line.
PER_STUDENT = ("teacher_weight", "temperature", "student_confidence", "student_k")


@dataclass(frozen=True)
class CommandLine:
    """The words of the command line: the recipe file, and overrides as raw text.

    Attributes:
        cfg: path of the recipe file.
        overrides: `section.key` -> the text behind the equals sign.
    """

    cfg: Path
    overrides: Mapping[str, str]


class _StrictLoader(yaml.SafeLoader):
    """YAML with unique keys, `true`/`false` as the only booleans, and 1e-4 a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=deep))
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: the key '{key}' stands twice: keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # PyYAML's own reads 010 as eight.
        return int(self.construct_scalar(node))


class _StrictDumper(yaml.SafeDumper):
    """Quotes what `_StrictLoader` would not read back as text."""

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", "tf"),
    ("tag:yaml.org,2002:null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


class _Shown(Checker):
    """Passes every value through to fastargs; shows the type in its help."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def check(self, value: Any) -> Any:
        return value

    def help(self) -> str:
        return type_text(self.hint)


def read_recipe(words: Sequence[str], *, command: str = "python -m fastgen.train") -> Recipe:
    """Reads `--cfg FILE` and `--section.key=value` overrides into a recipe with its seeds and folders filled in.

    Args:
        words: the command line without the program's name.
        command: how the command is called, for the help.

    Raises:
        UserError: anything that is wrong with the words, the file or the values.
        SystemExit: with 0, after `--help` was printed.
    """
    if "--help" in words or "-h" in words:
        print(help_text(command))
        raise SystemExit(0)
    line = parse_words(words)
    from_file = _read_file(line.cfg)
    overrides = {key: _read_override(key, text) for key, text in line.overrides.items()}
    _require_seed_is_heard(line.cfg, from_file, overrides)
    values = {**from_file, **overrides}
    recipe = with_seeds(_narrow_to_one_generation(_build(values), from_file, overrides))
    return _with_folders(recipe, line.cfg.stem)


def parse_words(words: Sequence[str]) -> CommandLine:
    """Splits the command line; knows nothing of types yet."""
    given: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise UserError(f"'{word}' is not understood: settings are given as --section.key=value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = _next_word(rest, key)
        if key in given:
            raise UserError(f"--{key} is given twice: keep one")
        given[key] = text
    cfg = given.pop("cfg", None)
    if cfg is None:
        raise UserError("no recipe: name one with --cfg, for example --cfg rcp/demo.yaml (--help lists all settings)")
    for key in given:
        _hint_of(key)
    return CommandLine(Path(cfg), given)


def help_text(command: str) -> str:
    """All settings with type, default and meaning, printed from fastargs' declaration."""
    declared = _declare()
    lines = [f"usage: {command} --cfg RECIPE.yaml [--section.key=value ...]", ""]
    for section, paths in declared.sections_to_entries.items():
        lines.append(declared.sections[section].desc)
        for path in paths:
            param = declared.entries[path]
            default = "required" if param.required else f"default {value_text(param.default)}"
            lines.append(f"  --{'.'.join(path)}={param.checker.help()}  ({default})")
            lines.append(f"        {param.desc}")
        lines.append("")
    return "\n".join(lines)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal recipe."""
    return yaml.dump(recipe.as_dict(), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def load_text(text: str, name: str) -> Recipe:
    """Reads a recipe from YAML text; `name` stands for the file in error lines."""
    return with_seeds(_build(_read_yaml(text, name)))


def _declare() -> fastargs.Config:
    config = fastargs.Config()
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        params = {
            f.name: fastargs.Param(
                _Shown(hints[f.name]), f.metadata["text"], default=_default(f), required=f.metadata["required"]
            )
            for f in fields(section)
        }
        fastargs.Section(name, section.__doc__, config_descriptor=config).params(**params)
    return config


def _default(f: Field[Any]) -> Any:
    return None if f.default is MISSING else f.default


def _build(values: Mapping[str, Any]) -> Recipe:
    declared = _declare()
    missing = [
        ".".join(path)
        for path, param in declared.entries.items()
        if param.required and values.get(".".join(path)) is None
    ]
    if missing:
        raise UserError(f"{missing[0]} is missing: set it in the recipe or with --{missing[0]}=...")
    declared.collect(dict(values))
    sections = {
        name: section(**{f.name: declared[f"{name}.{f.name}"] for f in fields(section)})
        for name, section in SECTIONS.items()
    }
    return Recipe(**sections)


def _narrow_to_one_generation(recipe: Recipe, from_file: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """With gen.only = g >= 1, a single number on the command line holds for student g alone.

    The other students keep what the recipe file says, so that their nodes, and with them the
    teacher, are those of the process that the file describes.
    """
    only = recipe.gen.only
    if not only:
        return recipe
    narrowed: dict[str, Any] = {}
    for name in PER_STUDENT:
        value = overrides.get(f"gen.{name}")
        if not isinstance(value, (int, float)):
            continue
        base = from_file.get(f"gen.{name}", _default(_field_of(f"gen.{name}")))
        base = recipe.gen.k if base is None else base
        students = list(base) if isinstance(base, tuple) else [base] * recipe.gen.generations
        if len(students) == recipe.gen.generations:
            students[only - 1] = value
            narrowed[name] = tuple(students)
    return replace(recipe, gen=replace(recipe.gen, **narrowed)) if narrowed else recipe


def _require_seed_is_heard(cfg: Path, from_file: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """In a run's own recipe.yaml all seeds are filled in, and `run.seed` decides nothing any more."""
    asked, seeds = overrides.get("run.seed"), ("run.init_seed", "data.seed")
    filled = [key for key in seeds if from_file.get(key) is not None and key not in overrides]
    if asked is None or asked == from_file.get("run.seed", 0) or len(filled) < len(seeds):
        return
    raise UserError(
        f"--run.seed={asked} has no say: {cfg} sets {' and '.join(filled)}, which it is the default of: give "
        f"{' '.join(f'--{key}={asked}' for key in filled)} too"
    )


def _with_folders(recipe: Recipe, name: str) -> Recipe:
    run_dir = recipe.run.dir or f"runs/{name}-{recipe.short_hash}"
    nodes = recipe.run.nodes or str(Path(run_dir).parent / "nodes")
    return replace(recipe, run=replace(recipe.run, dir=run_dir, nodes=nodes))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    return _read_yaml(text, str(path))


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        return dict(_flatten(_parse_yaml(text)))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise UserError(f"is not valid YAML: {' '.join(str(error).split())}") from None


def _flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"a recipe is a mapping of the sections {', '.join(SECTIONS)}, not {value_text(tree)}")
    for section, content in tree.items():
        if section not in SECTIONS:
            raise UserError(f"unknown section '{section}'{_nearest(str(section), list(SECTIONS))}")
        if not isinstance(content, dict):
            raise UserError(f"section '{section}' must hold 'key: value' lines, not {value_text(content)}")
        for key, value in content.items():
            path = f"{section}.{key}"
            yield path, _coerce(value, _hint_of(path), path)


def _read_override(path: str, text: str) -> Any:
    hint = _hint_of(path)
    if _takes_text(hint):
        # A path or a name is taken as it stands: 0123 is a folder's name, not a number.
        return None if text in ("", "null") else text
    try:
        value = _parse_yaml(text)
    except UserError as error:
        raise UserError(f"--{path}={text}: {error}") from None
    return _coerce(value, hint, path)


def _next_word(rest: Iterator[str], key: str) -> str:
    text = next(rest, None)
    if text is None or text.startswith("--"):
        raise UserError(f"--{key} has no value: give --{key}=VALUE")
    return text


def _all_paths() -> list[str]:
    return [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)]


def _field_of(path: str) -> Field[Any]:
    name, _, key = path.partition(".")
    return next(f for f in fields(SECTIONS[name]) if f.name == key)


def _hint_of(path: str) -> Any:
    if path not in _all_paths():
        raise UserError(f"unknown key '{path}'{_nearest(path, ['cfg', *_all_paths()])}")
    name, _, key = path.partition(".")
    return typing.get_type_hints(SECTIONS[name])[key]


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f": did you mean '{found[0]}'?" if found else f": known are {', '.join(known)}"


def _takes_text(hint: Any) -> bool:
    return hint is str or str in typing.get_args(hint)


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """Checks a value that YAML gave against a type hint; turns int into float and list into tuple."""
    for option in _options(hint):
        matched, result = _match(value, option)
        if matched:
            return result
    raise UserError(f"{path}: expected {type_text(hint)}, found {value_text(value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint) and isinstance(value, str), value
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            return False, None
        matches = [_match(entry, item) for entry in value]
        return all(ok for ok, _ in matches), tuple(result for _, result in matches)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max, float(value) if abs(value) <= sys.float_info.max else None
    # bool is an int to Python; a recipe that says `epochs: true` is wrong all the same.
    return type(value) is hint, value


def type_text(hint: Any) -> str:
    """What a setting's type hint asks for, in words."""
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of numbers"
    if isinstance(hint, types.UnionType):
        return " or ".join(type_text(option) for option in typing.get_args(hint))
    return names[hint]


def value_text(value: Any) -> str:
    """A setting's value as a recipe has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return f"'{value}'" if isinstance(value, str) and not value else str(value)
