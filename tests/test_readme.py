"""The README's map and links are true, and the package imports nothing that it need not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
)


def mapped_modules() -> set[str]:
    return set(re.findall(r"^\| `((?:fastgen|benchmarks|data_prep)/[\w/]+\.py)` \|", README, re.MULTILINE))


def test_every_module_is_in_the_map():
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("fastgen", "benchmarks", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
    }
    modules -= {f"{package}/__init__.py" for package in ("fastgen", "fastgen/kernels", "benchmarks", "data_prep")}
    assert modules == mapped_modules()


def test_every_path_in_the_readme_exists():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    quoted = re.findall(r"`((?:fastgen|benchmarks|rcp|tests)/[\w./]*)`", README)
    assert len(linked) > 5
    assert len(quoted) > 30
    missing = [path for path in {*linked, *quoted} if not (ROOT / path).exists()]
    assert missing == []


def test_every_recipe_is_listed():
    for recipe in (ROOT / "rcp").glob("*.yaml"):
        assert f"rcp/{recipe.name}" in README


def test_make_knows_the_readme_s_commands():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make (\w+)", README, re.MULTILINE)) <= targets


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
