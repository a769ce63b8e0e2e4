"""What the compiler makes of each kernel, without a GPU: registers, spills, instructions, widths of loads and stores.

python -m benchmarks.kernels_static [--kernels=tolerant_kernel,distill_kernel] [--write-budget] [--warps=1,2,4,8]

Every case of `benchmarks.kernels_cases` calls a kernel's own launcher; in place of the launch Triton compiles what it
was about to launch, for sm_90, and the cubin is read with Triton's own cuobjdump. The figures are held against
`kernels_budget.yaml`, version by version of Triton: another compiler makes other code. Instructions are counted as
they stand in the program, not as they are run: a loop counts once, and a path that is rarely taken counts in full.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, append_rows, facts_line, machine_facts
from benchmarks.kernels_cases import CASES, KERNELS, Case, by_kernel
from benchmarks.kernels_sass import Figures, read_figures
from fastgen.arguments import Arguments, at_least_one
from fastgen.errors import FastgenError, MachineError, UserError, command
from fastgen.tables import new_table, print_table

CPU = torch.device("cpu")
ARCHITECTURE = 90
BUDGET = ROOT / "benchmarks" / "kernels_budget.yaml"
INTERPRET = "TRITON_INTERPRET"
# These may grow by this much before it counts.
ALLOWED_GROWTH = 0.05
GROWING = ("registers", "instructions", "loop_instructions")
PLAIN_SECONDS = 15.0

BUDGET_HEADING = f"""\
# What the compiler made of each kernel for sm_{ARCHITECTURE}, by Triton's version: written by
# `python -m benchmarks.kernels_static --write-budget`, which without that argument refuses what is worse.
# warps: of a program; registers: of a thread; spill_bytes: of a thread; widest_load_bits, loads: of global memory,
# instructions (of them in loops: loop_instructions) and loads counted as they stand in the program.
"""


class OverBudget(FastgenError):
    """Code became worse than it was; told line by line before."""


class _NoDriver:
    """Stands for a GPU's driver: Triton asks it what to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


@contextmanager
def compiled_not_launched(name: str, warps: int | None) -> Iterator[dict[str, Any]]:
    """Within it nothing is launched, and the kernel of that name is compiled as its launch would have it.

    Args:
        name: of the kernel.
        warps: of a program, instead of what the launcher chooses.

    Yields:
        What was to be launched, by name; the compiled kernel, None for others.
    """
    import triton
    from triton.runtime.jit import JITFunction

    met: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= {} if warps is None else {"num_warps": warps}
        wanted = kernel.__name__ == name
        # What Triton calls a warm-up does all that a launch does, up to the launch.
        met[kernel.__name__] = launch(kernel, *arguments, grid=grid, warmup=True, **options) if wanted else None

    # Not put back: without a GPU there is no other, and this process launches nothing.
    triton.runtime.driver.set_active(_NoDriver())
    JITFunction.run = compile_only
    try:
        yield met
    finally:
        JITFunction.run = launch


def measure(case: Case, warps: int | None = None) -> Figures:
    """Compiles a case's kernel and reads the result.

    Raises:
        MachineError: the case launches no such kernel, or it does not compile.
    """
    from triton.errors import TritonError

    try:
        with compiled_not_launched(case.kernel, warps) as met:
            case.call()
    except TritonError as error:
        raise MachineError(f"{case.key}: does not compile: {error}") from error
    if case.kernel not in met:
        raise MachineError(f"{case.key}: its call launches {', '.join(met) or 'nothing'}")
    kernel = met[case.kernel]
    return read_figures(_disassemble(kernel.asm["cubin"]), kernel.metadata.num_warps)


def measure_all(cases: Sequence[Case], warps: int | None = None) -> dict[str, Figures]:
    """Figures by case; says on standard error how far it is."""
    live = sys.stderr.isatty()
    started = told = time.monotonic()
    measured: dict[str, Figures] = {}
    for case in cases:
        measured[case.key] = measure(case, warps)
        now = time.monotonic()
        if live or now - told >= PLAIN_SECONDS:
            told = now
            pace = len(measured) / (now - started)
            left = (len(cases) - len(measured)) / pace
            text = f"compiled {len(measured)} of {len(cases)}, {pace:.1f} a second, {left:.0f} s left"
            print(f"\r\033[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    return measured


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise MachineError(f"cuobjdump failed: {done.stderr}")
    return done.stdout


def breaches(case: Case, figures: Figures, budget: Mapping[str, int] | None) -> list[str]:
    """A line for each thing that is worse than the budget allows, or that must hold with any version.

    Args:
        case: its invariants are checked, too.
        figures: as measured.
        budget: None where this version of Triton has none; empty where the case has none.
    """
    lines = _broken_invariants(case, figures)
    if budget is None:
        return lines
    if not budget:
        return [*lines, f"{case.key}: has no budget yet; --write-budget adds it"]
    now = figures.budget
    if now["warps"] != budget["warps"]:
        told = f"{now['warps']} warps, budget {budget['warps']}: not comparable; --write-budget takes it over"
        return [*lines, f"{case.key}: {told}"]
    worse = {name: now[name] > (1 + ALLOWED_GROWTH) * budget[name] for name in GROWING}
    worse |= {name: now[name] > budget[name] for name in ("spill_bytes", "loads")}
    worse["widest_load_bits"] = now["widest_load_bits"] < budget["widest_load_bits"]
    return lines + [f"{case.key}: {name} {now[name]}, budget {budget[name]}" for name in now if worse.get(name)]


def _broken_invariants(case: Case, figures: Figures) -> list[str]:
    lines = []
    if figures.spill_bytes:
        lines.append(f"{case.key}: {figures.spill_bytes} bytes of registers are spilled, may be 0")
    if case.narrow is not None:
        found = sum(count for bits, count in figures.loads.items() if bits < case.narrow.below_bits)
        if found > case.narrow.loads:
            what = f"global loads narrower than {case.narrow.below_bits} bits"
            lines.append(f"{case.key}: {found} {what}, may be {case.narrow.loads} ({_words(figures.loads)})")
    return lines


def verdict(figures: Figures, budget: Mapping[str, int] | None) -> str:
    """Of figures without a breach."""
    if budget is None:
        return "no budget"
    now = figures.budget
    less = any(now[name] < (1 - ALLOWED_GROWTH) * budget[name] for name in (*GROWING, "loads"))
    return "improved" if less else "met"


def read_budget(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Budgets by version of Triton and by case; none where there is no file.

    Raises:
        UserError: the file is no such list.
    """
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text()) or {}
        return {
            version_: {key: {name: int(value) for name, value in entry.items()} for key, entry in entries.items()}
            for version_, entries in tree.items()
        }
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no budget: {error}") from None


def write_budget(path: Path, version_: str, measured: Mapping[str, Figures], *, whole: bool) -> None:
    """Writes the entries of a version.

    Args:
        path: of the budget, whose other versions are kept.
        version_: of Triton.
        measured: figures by case.
        whole: these are all cases there are: entries of others are dropped.
    """
    tree = read_budget(path)
    kept = {} if whole else tree.get(version_, {})
    tree[version_] = kept | {key: figures.budget for key, figures in measured.items()}
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=200)
    path.write_text(BUDGET_HEADING + text)


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    triton_version = _triton_version()
    if INTERPRET in os.environ:
        _run_without_interpreter(words)
        return
    print(f"{facts_line(CPU)}, triton {triton_version}")
    chosen = [case for case in CASES if case.kernel in arguments.kernels]
    if arguments.warps:
        _explore(chosen, arguments.warps, triton_version, arguments.results)
        return
    measured = measure_all(chosen)
    append_rows(arguments.results, _rows(chosen, measured, triton_version))
    if arguments.write_budget:
        write_budget(arguments.budget, triton_version, measured, whole=len(chosen) == len(CASES))
    _judge(chosen, measured, read_budget(arguments.budget).get(triton_version), triton_version)


def _run_without_interpreter(words: Sequence[str]) -> None:
    """Interpreted kernels cannot be compiled, and Triton reads the variable when it is imported.

    Raises:
        SystemExit: the other process ended with an error, which it told.
    """
    others = {name: value for name, value in os.environ.items() if name != INTERPRET}
    others["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [others.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels_static", *words], env=others)
    if done.returncode:
        raise SystemExit(done.returncode)


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        raise MachineError("not measured: Triton is not installed here") from None


def _judge(
    chosen: Sequence[Case],
    measured: Mapping[str, Figures],
    budgets: Mapping[str, Mapping[str, int]] | None,
    triton_version: str,
) -> None:
    """Prints the figures with a verdict on each.

    Raises:
        OverBudget: something is worse; told line by line before.
    """
    told: list[str] = []
    for kernel, cases in by_kernel(chosen).items():
        table = _table(kernel, "verdict")
        for case in cases:
            figures = measured[case.key]
            budget = None if budgets is None else budgets.get(case.key, {})
            lines = breaches(case, figures, budget)
            told += lines
            table.add_row(case.shape, *_cells(figures), "WORSE" if lines else verdict(figures, budget))
        print_table(table)
    if budgets is None:
        print(f"no budget for Triton {triton_version}: only spills and the stated widths of loads were checked")
    for line in told:
        print(line)
    if told:
        raise OverBudget(f"{len(told)} figures of {len(chosen)} cases are worse than they may be")


def _explore(chosen: Sequence[Case], warps: Sequence[int], triton_version: str, results: Path) -> None:
    """What other numbers of warps would make of the cases at ImageNet's width; nothing is held against a budget."""
    wide = [case for case in chosen if " C=1000 " in case.shape]
    measured = {count: measure_all(wide, count) for count in warps}
    for kernel, cases in by_kernel(wide).items():
        table = _table(kernel, "all")
        for case in cases:
            for figures in (measured[count][case.key] for count in warps):
                table.add_row(case.shape, *_cells(figures), str(figures.warps * figures.instructions))
        print_table(table)
    for figures_of_one in measured.values():
        append_rows(results, _rows(wide, figures_of_one, triton_version))


def _table(kernel: str, last: str) -> Table:
    title = f"{kernel}, sm_{ARCHITECTURE}; loops: instructions in them; global loads and stores as number x bits"
    headings = ("warps", "regs", "spill", "instr.", "loops", "loads", "stores", "shfl", "MUFU", "bar.")
    table = new_table(title, ("case", *headings, last), ("case", "verdict"))
    table.padding = (0, 1, 0, 0)
    return table


def _cells(figures: Figures) -> list[str]:
    first = (figures.warps, figures.registers, figures.spill_bytes, figures.instructions, figures.loop_instructions)
    last = (figures.shuffles, figures.mufu, figures.barriers)
    return [*map(str, first), _words(figures.loads), _words(figures.stores), *map(str, last)]


def _words(counts: Mapping[int, int]) -> str:
    return "+".join(f"{count}x{bits}" for bits, count in counts.items())


def _rows(cases: Sequence[Case], measured: Mapping[str, Figures], triton_version: str) -> list[dict[str, Any]]:
    shared = {**machine_facts(CPU), "triton": triton_version, "architecture": f"sm_{ARCHITECTURE}"}
    return [{**shared, "kernel": case.kernel, "case": case.shape, **_columns(measured[case.key])} for case in cases]


def _columns(figures: Figures) -> dict[str, Any]:
    return {**vars(figures), "loads": _words(figures.loads), "stores": _words(figures.stores)}


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.kernels_static", "Reads what the compiler makes of each kernel; needs no GPU.")
    parser.add_argument("--kernels", type=_names, default=KERNELS, metavar="NAMES", help=f"some of {','.join(KERNELS)}")
    parser.add_argument("--write-budget", action="store_true", help="take over what was found as the budget")
    parser.add_argument("--warps", type=_powers, metavar="COUNTS", help="such as 1,2,4,8: instead, try these at C=1000")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels_static.csv", metavar="FILE")
    return parser.parse_args(words)


def _names(text: str) -> tuple[str, ...]:
    unknown = sorted(set(text.split(",")) - set(KERNELS))
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]}, there are {', '.join(KERNELS)}")
    return tuple(text.split(","))


def _powers(text: str) -> tuple[int, ...]:
    counts = tuple(at_least_one(word) for word in text.split(","))
    if any(count not in (1, 2, 4, 8, 16, 32) for count in counts):
        raise argparse.ArgumentTypeError(f"'{text}' are not all powers of two up to 32")
    return counts


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
