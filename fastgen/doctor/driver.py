"""NVIDIA's driver and GPUs, asked through its own library (NVML) by ctypes. No torch.

Source of names and numbers: NVIDIA, "NVML API Reference".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgen.doctor.findings import Answer, Mark, Place

LIBRARY = "libnvidia-ml.so.1"
TEXT_BYTES = 96
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")


# nvmlReturn_t
NOT_SUPPORTED, DRIVER_NOT_LOADED = 3, 9


class NvmlError(Exception):
    """NVML refuses; the text says why."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class _Memory(ctypes.Structure):
    """nvmlMemory_t: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells it.

    Attributes:
        memory_bytes: None: it has none of its own.
        capability: major and minor number.
    """

    name: str
    memory_bytes: int | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        cuda: the newest version of CUDA that it runs, major and minor.
    """

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def read_driver() -> Driver | None:
    """Asks the driver; None: there is none, or no library of it.

    Raises:
        NvmlError: there is one, and it does not work.
    """
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    try:
        _ask(nvml, "nvmlInit_v2")
    except NvmlError as error:
        if error.code == DRIVER_NOT_LOADED:
            return None
        raise
    try:
        version = _text(nvml, "nvmlSystemGetDriverVersion")
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        _ask(nvml, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        _ask(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = tuple(_gpu(nvml, number) for number in range(count.value))
    finally:
        nvml.nvmlShutdown()
    return Driver(version, (cuda.value // 1000, cuda.value % 1000 // 10), gpus)


def _gpu(nvml: ctypes.CDLL, number: int) -> Gpu:
    handle = ctypes.c_void_p()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _ask(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(handle))
    _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(_text(nvml, "nvmlDeviceGetName", handle), _memory(nvml, handle), (major.value, minor.value))


def _memory(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> int | None:
    memory = _Memory()
    try:
        _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    except NvmlError as error:
        if error.code == NOT_SUPPORTED:
            return None
        raise
    return memory.total


def _text(nvml: ctypes.CDLL, function: str, *before: object) -> str:
    buffer = ctypes.create_string_buffer(TEXT_BYTES)
    _ask(nvml, function, *before, buffer, ctypes.c_uint(TEXT_BYTES))
    return buffer.value.decode()


def _ask(nvml: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(nvml, function)(*arguments)
    if code:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise NvmlError(f"{function}: {(nvml.nvmlErrorString(code) or b'no reason').decode()}", code)


def driver(place: Place) -> Answer:
    """NVIDIA's driver: its version, and what it sees."""
    try:
        found = read_driver()
    except NvmlError as error:
        return Answer(Mark.BROKEN, str(error), "install the driver anew, or restart after its update")
    if found is None:
        return _without_library()
    gpus = ", ".join(map(_shown, found.gpus))
    seen = f"{found.version}, for CUDA up to {found.cuda[0]}.{found.cuda[1]}: {gpus or 'no GPU'}"
    facts = {"version": found.version, "cuda": list(found.cuda), "gpus": [gpu.name for gpu in found.gpus]}
    return Answer(Mark.OK if found.gpus else Mark.NOT_USED, seen, facts=facts)


def _shown(gpu: Gpu) -> str:
    return gpu.name if gpu.memory_bytes is None else f"{gpu.name} ({gpu.memory_bytes / (1 << 30):.0f} GiB)"


def _without_library() -> Answer:
    if os.path.exists("/proc/driver/nvidia/version"):
        text = f"NVIDIA's driver runs, and its library {LIBRARY} is not to be found"
        mend = "in a container, start it with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Answer(Mark.BROKEN, text, mend)
    cards = list(pci_cards(Path("/")))
    if cards:
        text = f"no NVIDIA driver, and {len(cards)} GPU{'s' * (len(cards) > 1)} of NVIDIA on the PCI bus"
        return Answer(
            Mark.MISSING,
            text,
            "install NVIDIA's driver (https://www.nvidia.com/drivers); in a container, start it with --gpus all",
        )
    return Answer(Mark.NOT_USED, "no NVIDIA driver, and no GPU of NVIDIA on the PCI bus")


def pci_cards(root: Path) -> Iterator[str]:
    """Addresses of NVIDIA's GPUs on the PCI bus."""
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            # It has just been taken out.
            continue
        if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASSES):
            yield device.name
