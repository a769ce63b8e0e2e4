"""The decoder of .beton files in C (views.c): compiled on the machine that runs it, once, and kept in the user's cache.

Needs a C compiler and the headers of libjpeg-turbo, which FFCV needs as well. Compiled at run time rather than when
the package is installed, so that it uses the instructions of the processor it runs on, as torch.compile does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import threading
from functools import cache
from pathlib import Path

import numpy as np

from fastgen.data.decoder import Images, UInt8
from fastgen.errors import UserError

SOURCE = Path(__file__).with_name("views.c")
# No fused multiply-add: its use would depend on the processor, and with it the last bit of a pixel.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c11", "-shared", "-fPIC")
LIBRARIES = ("-ljpeg", "-lm")
COMPILE_SECONDS = 120


class NativeDecoder:
    """Decodes only what a crop needs and resamples by the triangle filter: Pillow's BILINEAR within one level of 255.

    Raises:
        UserError: there is no C compiler, or no header of libjpeg-turbo.
    """

    def __init__(self) -> None:
        self._library = load()
        self._local = threading.local()

    def __call__(self, images: Images, images_NHWC: UInt8) -> int:
        """See `decoder.Decoder`."""
        status = np.zeros(len(images.rows), np.int32)
        height, width = images_NHWC.shape[1:3]
        arrays = (
            images.content,
            images.begin,
            images.stored_bytes,
            images.modes,
            images.stored_sizes,
            images.rows,
            images_NHWC,
        )
        addresses = [array.ctypes.data for array in arrays]
        # ctypes lets other threads run meanwhile.
        self._library.fastgen_execute(len(status), *addresses, height, width, self._scratch(), status.ctypes.data)
        failed = np.flatnonzero(status)
        return int(failed[0]) if len(failed) else -1

    def _scratch(self) -> int:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = _Scratch(self._library)
        address: int = self._local.scratch.address
        return address


class _Scratch:
    """Memory of one thread, freed with it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.address = library.fastgen_scratch_new()
        if not self.address:
            raise MemoryError("no memory for the decoder")
        self._free = library.fastgen_scratch_free

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._free(self.address)


@cache
def load() -> ctypes.CDLL:
    """The compiled library, compiled first where the cache does not hold it.

    Raises:
        UserError: it cannot be compiled here.
    """
    try:
        library = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        # Not to be written to, or mounted so that nothing in it may be run.
        raise UserError(
            f"data.beton_decoder = native: its compiled code cannot be kept in {_cache_folder()} ({error}): "
            "name another folder with the environment variable XDG_CACHE_HOME"
        ) from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.fastgen_scratch_new.restype = pointer
    library.fastgen_scratch_free.argtypes = [pointer]
    library.fastgen_scratch_free.restype = None
    library.fastgen_execute.argtypes = [number, *[pointer] * 7, number, number, pointer, pointer]
    library.fastgen_execute.restype = None
    return library


def _compiled() -> Path:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (*FLAGS, *LIBRARIES, _run([*compiler, "--version"]), _processor()):
        key.update(part.encode())
    folder = _cache_folder()
    library = folder / f"views-{key.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{library.name}.{os.getpid()}"
        _run([*compiler, *FLAGS, "-o", str(partial), str(SOURCE), *LIBRARIES])
        # Several processes may do this at once: each renames a whole file of the same content.
        partial.replace(library)
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fastgen"


def _processor() -> str:
    """Its instruction sets: a home folder may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"data.beton_decoder = native needs a C compiler ({error}): {_ADVICE}") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise UserError(f"data.beton_decoder = native: views.c does not compile ({errors[0].strip()}): {_ADVICE}")
    return done.stdout


_ADVICE = "install gcc and libjpeg-turbo's headers (Debian: gcc libjpeg-dev), or set data.beton_decoder=ffcv"
