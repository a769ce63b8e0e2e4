"""Trials of packages: whether they import, and in a version that fastgen works with."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastgen.doctor.advice import install, installer
from fastgen.doctor.findings import Answer, Mark, Place
from fastgen.extras import PACKAGES

APEX_BUILD = (
    "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 {pip} --no-build-isolation ./apex"
)


def package(name: str, *modules: str) -> Callable[[Place], Answer]:
    """The trial that imports a package.

    Args:
        name: a key of `extras.PACKAGES`.
        modules: that fastgen imports of it, where its own name alone proves little.
    """

    def probe(place: Place) -> Answer:
        for module in (PACKAGES[name].module, *modules):
            importlib.import_module(module)
        return checked_version(name)

    return probe


def scikit_learn(place: Place) -> Answer:
    """scikit-learn: its classifiers, and its digits."""
    importlib.import_module("sklearn.linear_model")
    images = importlib.import_module("sklearn.datasets").load_digits().images
    return checked_version("scikit-learn", f"{len(images):,} digits are read")


def tool(name: str) -> Callable[[Place], Answer]:
    """The trial of a package that is not imported."""

    def probe(place: Place) -> Answer:
        found = installed_version(name)
        return Answer(Mark.OK, found) if found else Answer(Mark.MISSING, "not installed", install(name))

    return probe


def checked_version(name: str, about: str = "") -> Answer:
    """The answer of a package that works: its version, where that is one that fastgen works with.

    Args:
        name: a key of `extras.PACKAGES`.
        about: what else there is to say.
    """
    found = installed_version(name) or _told_by_module(PACKAGES[name].module.partition(".")[0])
    wanted = PACKAGES[name].requirement
    seen = f"{found}{', ' if about else ''}{about}"
    if not satisfies(found, wanted):
        return Answer(Mark.BROKEN, f"{found}, and fastgen needs {wanted}", install(name), {"version": found})
    return Answer(Mark.OK, seen, facts={"version": found})


def installed_version(name: str) -> str | None:
    """As its metadata says; None: it is not installed, or has no metadata."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _told_by_module(module: str) -> str:
    return str(getattr(sys.modules[module], "__version__", "of unknown version"))


def satisfies(found: str, requirement: str) -> bool:
    """Whether a version is one that a requirement such as `numpy>=2` or `ffcv==1.0.2` allows."""
    match = re.fullmatch(r"[\w-]+?(>=|==)([\d.]+)", requirement)
    if match is None or not found[:1].isdigit():
        return True
    have, want = _numbers(found), _numbers(match[2])
    return have >= want if match[1] == ">=" else have == want


def _numbers(text: str) -> tuple[int, ...]:
    """The release that a version begins with: (2, 14, 1) of 2.14.1+cu130."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def apex(place: Place) -> Answer:
    """NVIDIA's apex, told by what is in it from the unrelated project of that name on the package index.

    Only NVIDIA's has apex/optimizers/fused_sgd.py, and only one that was built with its extensions has amp_C.
    """
    build = APEX_BUILD.format(pip=installer())
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Answer(Mark.MISSING, "not installed", build)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        remove = installer().removesuffix("install") + "uninstall apex"
        text = "a package apex is installed that is not NVIDIA's, but a web toolkit of that name"
        return Answer(Mark.BROKEN, text, f"{remove} && {build}", {"nvidia": False})
    if importlib.util.find_spec("amp_C") is None:
        return Answer(Mark.BROKEN, "NVIDIA's, built without its extensions: FusedSGD is not in it", build)
    # Its extensions find torch's libraries only once torch is there.
    importlib.import_module("torch")
    importlib.import_module("amp_C")
    optimizers = importlib.import_module("apex.optimizers")
    if not hasattr(optimizers, "FusedSGD"):
        return Answer(Mark.BROKEN, "NVIDIA's, without FusedSGD", build)
    return Answer(Mark.OK, f"NVIDIA's, {installed_version('apex') or 'of unknown version'}, with FusedSGD")
