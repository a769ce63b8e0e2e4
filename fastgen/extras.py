"""The packages that fastgen uses: what each is for, which extra brings it, and the line that installs it. No torch.

Lines name the package itself: the package index holds a project called `fastgen` that is not this one, so
`pip install 'fastgen[x]'` would fetch a stranger.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# Debian's names, the same as the Makefile's: for FFCV, the native decoder and torch.compile.
SYSTEM_PACKAGES = (
    "g++", "python3-dev", "pkg-config", "libopencv-dev", "libturbojpeg0-dev", "libjpeg-dev",
)  # fmt: skip
APT = "apt-get install -y --no-install-recommends"


@dataclass(frozen=True)
class Package:
    """A distribution of the package index.

    Attributes:
        requirement: as in pyproject.toml, such as `numpy>=2`.
        module: what is imported of it; empty: a tool, of which nothing is.
        purpose: what needs it.
        extras: of pyproject.toml that bring it; none: the core.
        install: words of each call of `pip install`; none: the requirement alone.
    """

    requirement: str
    module: str
    purpose: str
    extras: tuple[str, ...] = ()
    install: tuple[str, ...] = ()


# What opencv-python and pytorch_pfn_extras, which ffcv asks for, bring is of no use on a server: hence --no-deps.
_FFCV = (
    "--no-deps ffcv==1.0.2",
    "assertpy fastargs==1.2.0 numba opencv-python-headless pillow psutil terminaltables tqdm",
)
_LINT = "lint and types of fastgen's own code"
_TEST = "fastgen's own tests"

PACKAGES: dict[str, Package] = {
    "torch": Package("torch>=2.11", "torch", "everything"),
    "torchvision": Package("torchvision", "torchvision", "networks resnet18, resnet50, torchvision/NAME; downloads"),
    "numpy": Package("numpy>=2", "numpy", "everything"),
    "pillow": Package("pillow", "PIL", "pictures: data_prep, backend folder"),
    "simplejpeg": Package("simplejpeg", "simplejpeg", "pictures: tells damaged JPEGs from sound ones"),
    "pyyaml": Package("pyyaml", "yaml", "recipes"),
    "fastargs": Package("fastargs==1.2.0", "fastargs", "recipes"),
    "terminaltables": Package("terminaltables", "terminaltables", "fastargs, which does not ask for it"),
    "safetensors": Package("safetensors", "safetensors", "weights"),
    "rich": Package("rich", "rich", "progress and tables in the terminal"),
    "matplotlib": Package("matplotlib", "matplotlib", "figures"),
    "tensorboard": Package("tensorboard", "tensorboard", "the run's curves in TensorBoard"),
    "scikit-learn": Package(
        "scikit-learn", "sklearn", "data.dataset=digits, rcp/demo.yaml, fastgen.transfer", ("demo", "transfer")
    ),
    "ffcv": Package(
        "ffcv==1.0.2", "ffcv", "data.beton_decoder=ffcv, benchmarks (backend ffcv's native decoder does without)",
        ("ffcv",), _FFCV,
    ),
    "nvidia-dali-cuda120": Package("nvidia-dali-cuda120", "nvidia.dali", "data.backend=dali", ("dali",)),
    "nvidia-dali-cuda130": Package("nvidia-dali-cuda130", "nvidia.dali", "data.backend=dali", ("dali-cuda130",)),
    "onnx": Package("onnx", "onnx", "export to ONNX", ("export",)),
    "onnxruntime": Package("onnxruntime", "onnxruntime", "export to ONNX: running what was exported", ("export",)),
    "onnxscript": Package("onnxscript", "onnxscript", "export to ONNX", ("export",)),
    "timm": Package("timm", "timm", "networks timm/NAME, benchmarks", ("timm", "bench")),
    "submitit": Package("submitit", "submitit", "fastgen.sweep --slurm_minutes", ("slurm",)),
    "opencv-python-headless": Package(
        "opencv-python-headless", "cv2", "ffcv, without the windows of opencv-python", ("loaders-dev",)
    ),
    "pytest": Package("pytest", "", _TEST, ("dev",)),
    "pytest-timeout": Package("pytest-timeout", "", _TEST, ("dev",)),
    "playwright": Package("playwright", "", f"{_TEST} of the report in a browser", ("loaders-dev",)),
    "ruff": Package("ruff", "", _LINT, ("dev",)),
    "mypy": Package("mypy", "", _LINT, ("dev",)),
    "types-PyYAML": Package("types-PyYAML", "", _LINT, ("dev",)),
    "setuptools": Package("setuptools", "", "building FFCV and the C++ of torch", ("dev",)),
}  # fmt: skip


def install_line(name: str, installer: str = "pip install") -> str:
    """The line for a shell that installs a package.

    Args:
        name: a key of PACKAGES.
        installer: the words before the package.
    """
    calls = PACKAGES[name].install or (shlex.quote(PACKAGES[name].requirement),)
    return " && ".join(f"{installer} {words}" for words in calls)


def system_line(packages: tuple[str, ...] = SYSTEM_PACKAGES) -> str:
    """The line for a shell, as root, that installs packages of Debian's or Ubuntu's."""
    return f"{APT} {' '.join(packages)}"
