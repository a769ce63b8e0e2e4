"""Lines that mend what is missing, for the very interpreter and system that run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.util import find_spec

from fastgen.extras import PACKAGES, SYSTEM_PACKAGES, install_line, system_line


def install(name: str) -> str:
    """The line that installs a package of `extras.PACKAGES` into this environment."""
    return install_line(name, installer())


def installer() -> str:
    """The words before a package, by what this environment is managed with."""
    python = shlex.quote(interpreter())
    if find_spec("pip") is not None:
        return f"{python} -m pip install"
    if shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m ensurepip && {python} -m pip install"


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
    return next((name for name, package in PACKAGES.items() if package.module == module), None)
