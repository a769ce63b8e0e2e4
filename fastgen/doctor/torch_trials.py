"""Trials of torch: the GPU, precisions, compiling, graphs, and processes that train together."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastgen.doctor import advice
from fastgen.doctor.driver import NvmlError, read_driver
from fastgen.doctor.findings import Answer, Mark, Place
from fastgen.doctor.packages import checked_version
from fastgen.processor import cpu_flags

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A processor that has one of these computes in the format; others convert to fp32 and back.
NATIVE_FLAGS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
# From this compute capability on, GPUs multiply matrices in the format by tensor cores.
TENSOR_CORES = {"bf16": (8, 0), "fp16": (7, 0)}
NO_GPU = "no GPU"
GATHER_SECONDS = 60


def torch_itself(place: Place) -> Answer:
    """torch: whether it imports and computes."""
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    product = torch.ones(8, 8) @ torch.ones(8, 8)
    if float(product.sum()) != 8**3:
        return Answer(Mark.BROKEN, f"{torch.__version__}: computes wrongly", advice.install("torch"))
    return checked_version("torch", f"{built}, threads: {torch.get_num_threads()}")


def gpu(place: Place) -> Answer:
    """GPUs: whether torch computes on each."""
    import torch

    if not torch.cuda.is_available():
        return _why_no_gpu(torch.version.cuda)
    for number in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=torch.device("cuda", number))
        if float((ones @ ones).sum()) != 64**3:
            return Answer(Mark.BROKEN, f"GPU {number} computes wrongly", "try another one with CUDA_VISIBLE_DEVICES")
    return Answer(Mark.OK, *_gpus_of(torch))


def _gpus_of(torch: Any) -> tuple[str, str, dict[str, Any]]:
    about = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    texts = [f"{one.name} ({one.total_memory / (1 << 30):.0f} GiB, sm_{one.major}{one.minor})" for one in about]
    facts = [{"name": one.name, "bytes": one.total_memory, "capability": [one.major, one.minor]} for one in about]
    return ", ".join(texts), "", {"gpus": facts}


def _why_no_gpu(built_for: str | None) -> Answer:
    """Why torch sees none: there is none, or something stands between."""
    try:
        driver = read_driver()
    except NvmlError as error:
        return Answer(
            Mark.BROKEN, f"torch sees none: {error}", "install NVIDIA's driver anew, or restart after its update"
        )
    if driver is None or not driver.gpus:
        return Answer(Mark.NOT_USED, "no GPU: there is no NVIDIA driver" if driver is None else NO_GPU)
    if built_for is None:
        text = f"torch is built for the CPU alone, and there is {driver.gpus[0].name}"
        # The package index holds the build for CUDA; that for the CPU alone came from elsewhere.
        return Answer(Mark.BROKEN, text, f"{advice.install('torch')} --force-reinstall torchvision")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        text = f"hidden by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        return Answer(Mark.NOT_USED, text, "unset CUDA_VISIBLE_DEVICES")
    # A driver runs what is built for a later minor version.
    if driver.cuda[0] < int(built_for.partition(".")[0]):
        text = (
            f"torch is built for CUDA {built_for}, and driver {driver.version} runs CUDA up to {_dotted(driver.cuda)}"
        )
        return Answer(
            Mark.BROKEN, text, f"update the driver, or install a torch that is built for CUDA {driver.cuda[0]}"
        )
    return Answer(
        Mark.BROKEN, f"torch sees none of the driver's: {driver.gpus[0].name}", "run nvidia-smi, and see its errors"
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def bf16(place: Place) -> Answer:
    """Training in bf16."""
    return _precision("bf16")


def fp16(place: Place) -> Answer:
    """Training in fp16."""
    return _precision("fp16")


def _precision(name: str) -> Answer:
    """Whether a step of autocast gives finite gradients here, and whether the hardware computes in the format."""
    import torch

    device = _device(torch)
    layer = torch.nn.Conv2d(3, 8, 3).to(device)
    with torch.autocast(device.type, dtype=getattr(torch, DTYPES[name])):
        loss = layer(torch.ones(2, 3, 8, 8, device=device)).float().mean()
    (gradient,) = torch.autograd.grad(loss, [layer.weight])
    if not bool(torch.isfinite(gradient).all()):
        return Answer(Mark.BROKEN, f"a convolution on {device.type} gives gradients that are not finite")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        native, how = capability >= TENSOR_CORES[name], "tensor cores"
    else:
        flags = sorted(NATIVE_FLAGS[name] & cpu_flags())
        native, how = bool(flags), f"the processor's {', '.join(flags)}"
    seen = f"native: {how}" if native else f"works, but this {_kind(device)} computes it by way of fp32"
    return Answer(Mark.OK, seen, facts={"native": native})


def _device(torch: Any) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"


def compiling(place: Place) -> Answer:
    """torch.compile: compiles a small function and runs it."""
    # No pool of processes, which would outlive the trial; and no headers compiled beforehand, which one kernel
    # does not pay for.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.scratch / "inductor")
    import torch

    from fastgen.compiling import compiled

    def small(x: Tensor) -> Tensor:
        return (x.sin() * x.cos()).relu().sum()

    device = _device(torch)
    values = torch.linspace(0, 1, 64, device=device)
    try:
        found = compiled(small, 1)(values)
    except torch._dynamo.exc.TorchDynamoException as error:
        return Answer(Mark.BROKEN, _told(error), advice.system("g++", "python3-dev"))
    if not torch.allclose(found, small(values), atol=1e-4):
        return Answer(Mark.BROKEN, "what is compiled gives another result")
    return Answer(Mark.OK, f"compiles for {device.type}")


def _told(error: Exception) -> str:
    """The line of torch's that says what happened, which is not its first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower() or "compiler" in line.lower()), lines[0])


def triton(place: Place) -> Answer:
    """Triton: whether kernels compile to NVIDIA's machine code, and run where there is a GPU."""
    wish = os.environ.pop("TRITON_INTERPRET", "0")
    os.environ["TRITON_CACHE_DIR"] = str(place.scratch / "triton")
    import torch

    installed = importlib.import_module("triton")
    from fastgen.doctor.kernel import compile_doubled, double

    size = compile_doubled()
    seen = f"{installed.__version__}, a kernel compiles ({size:,} bytes for sm_90)"
    if wish not in ("", "0"):
        seen += f"; TRITON_INTERPRET={wish} is set: kernels are interpreted on the CPU, thousands of times slower"
    if not torch.cuda.is_available():
        return Answer(Mark.OK, f"{seen}; there is no GPU to run it", facts={"runs": False})
    if double(torch.ones(64, device="cuda")).tolist() != [2.0] * 64:
        return Answer(Mark.BROKEN, f"{seen}, and gives another result on the GPU")
    return Answer(Mark.OK, f"{seen}, and runs", facts={"runs": True})


def graphs(place: Place) -> Answer:
    """CUDA graphs: captures one and runs it again."""
    import torch

    if not torch.cuda.is_available():
        return Answer(Mark.NOT_USED, NO_GPU)
    value = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value += 1
    for _ in range(3):
        graph.replay()
    if value.tolist() != [3.0] * 8:
        return Answer(Mark.BROKEN, "a graph gives another result than its operators")
    return Answer(Mark.OK, "captures and replays")


def nccl(place: Place) -> Answer:
    """NCCL: sums over one process a GPU."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return Answer(Mark.NOT_USED, NO_GPU)
    if not dist.is_nccl_available():
        return Answer(Mark.BROKEN, "this torch is built without it", advice.install("torch"))
    dist.init_process_group("nccl", init_method=f"file://{place.scratch / 'nccl'}", rank=0, world_size=1)
    ones = torch.ones(8, device="cuda")
    dist.all_reduce(ones)
    found = ones.tolist()
    dist.destroy_process_group()
    if found != [1.0] * 8:
        return Answer(Mark.BROKEN, "sums wrongly")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return Answer(Mark.OK, f"{version}, tried on one GPU of {torch.cuda.device_count()}")


def gloo(place: Place) -> Answer:
    """Gloo: two processes find each other over a file, and sum over the network."""
    import torch.distributed as dist

    if not dist.is_gloo_available():
        return Answer(Mark.BROKEN, "this torch is built without it", advice.install("torch"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _sum_of_two(place, 1)
            code = 0
        finally:
            os._exit(code)
    found = _sum_of_two(place, 0)
    _, status = os.waitpid(child, 0)
    if found != [3.0] * 8 or status:
        return Answer(Mark.BROKEN, f"the sum over two processes is {found[0]:g}, not 3")
    return Answer(Mark.OK, "two processes sum")


def _sum_of_two(place: Place, rank: int) -> list[float]:
    """Sums 1 of the first and 2 of the second process."""
    import torch
    import torch.distributed as dist

    place_of_meeting = f"file://{place.scratch / 'gloo'}"
    dist.init_process_group(
        "gloo", init_method=place_of_meeting, rank=rank, world_size=2, timeout=timedelta(seconds=GATHER_SECONDS)
    )
    values = torch.full((8,), float(rank + 1))
    dist.all_reduce(values)
    dist.destroy_process_group()
    found: list[float] = values.tolist()
    return found
