"""Lines that mend what is missing, for the very interpreter and system that run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder

from fastgen.extras import PACKAGES, SYSTEM_PACKAGES, install_line, system_line


def install(name: str) -> str:
    """The line that installs a package of `extras.PACKAGES` into this environment."""
    return _with_headers(name, install_line(name, installer()))


def reinstall(name: str) -> str:
    """The line that installs a package anew, and nothing that it needs."""
    if name == "torchvision":
        # Each of its versions fits one of torch's.
        return f"{installer()} --upgrade {shlex.quote(PACKAGES['torch'].requirement)} torchvision"
    words = shlex.quote(PACKAGES[name].requirement)
    # Of what was compiled here once, pip keeps a copy, which may be what does not fit.
    return _with_headers(name, f"{installer()} --force-reinstall --no-deps --no-cache-dir {words}")


def _with_headers(name: str, line: str) -> str:
    """FFCV is compiled as it is installed; where what it is compiled with is missing, that comes first."""
    return line if name != "ffcv" or _has_headers() else f"{system()} && {line}"


def _has_headers() -> bool:
    """Whether FFCV's setup finds a compiler, OpenCV and libjpeg-turbo."""
    if not (shutil.which("g++") and shutil.which("pkg-config")):
        return False
    done = subprocess.run(["pkg-config", "--exists", "opencv4", "libturbojpeg"], capture_output=True)
    return done.returncode == 0


def installer() -> str:
    """The words before a package, by what this environment is managed with."""
    python = shlex.quote(interpreter())
    if has_pip():
        return f"{python} -m pip install"
    if shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m ensurepip && {python} -m pip install"


def has_pip() -> bool:
    """Whether this environment has pip."""
    # Not importlib.util's: setuptools listens there, and warns when somebody has imported distutils before.
    return PathFinder.find_spec("pip") is not None


def interpreter() -> str:
    """Path of this Python, as short as it can be from here."""
    short = os.path.relpath(sys.executable)
    # One without a folder would be looked for on PATH.
    return sys.executable if short.startswith(os.pardir) or os.sep not in short else short


def system(*packages: str) -> str:
    """The line that installs packages of the system; none given: all that fastgen can use."""
    line = system_line(packages or SYSTEM_PACKAGES)
    if not shutil.which("apt-get"):
        return f"install what Debian calls {' '.join(packages or SYSTEM_PACKAGES)}"
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get update && {sudo}{line}"


def package_of(module: str) -> str | None:
    """The package that an imported name belongs to, where fastgen knows it."""
    return next((name for name, package in PACKAGES.items() if module and package.module == module), None)
