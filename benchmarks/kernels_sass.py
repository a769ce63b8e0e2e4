"""Reads what cuobjdump prints of a cubin: registers, spills, instructions, loops, widths of loads and stores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fastgen.errors import MachineError


@dataclass(frozen=True)
class Figures:
    """What stands in a cubin. Loads and stores are of global memory: how many instructions of each width in bits."""

    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loop_instructions: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    shuffles: int
    mufu: int
    barriers: int

    @property
    def budget(self) -> dict[str, int]:
        """What the budget keeps."""
        return {
            "warps": self.warps,
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "widest_load_bits": max(self.loads, default=0),
            "loads": sum(self.loads.values()),
            "instructions": self.instructions,
            "loop_instructions": self.loop_instructions,
        }


RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# An address, perhaps a predicate, the operation, its operands; the instruction's encoding that follows is left out.
INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+)?\s*([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;", re.MULTILINE
)
TARGET = re.compile(r"0x([0-9a-f]+)$")
GLOBAL_LOADS, GLOBAL_STORES = ("LDG", "LDGSTS"), ("STG",)
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


class Instruction(NamedTuple):
    """A line of SASS.

    Attributes:
        name: of the operation, without its suffixes.
        suffixes: such as E and 128.
        target: address of a branch's target, else None.
        goes_on: whether the next instruction may follow it.
    """

    address: int
    name: str
    suffixes: tuple[str, ...]
    target: int | None
    goes_on: bool


def read_figures(text: str, warps: int) -> Figures:
    """Figures of what `cuobjdump -res-usage -sass` printed.

    Raises:
        MachineError: there is no program in the text.
    """
    found = [[int(number) for number in numbers] for numbers in RESOURCES.findall(text)]
    program = read_program(text)
    if not found or not program:
        raise MachineError(f"cuobjdump printed no program: {text[:200]!r}")
    registers, stack, shared, local = (max(column) for column in zip(*found, strict=True))
    names = Counter(instruction.name for instruction in program)
    return Figures(
        warps=warps,
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=shared,
        instructions=len(program),
        loop_instructions=len(loops(program)),
        loads=_by_width(program, GLOBAL_LOADS),
        stores=_by_width(program, GLOBAL_STORES),
        shuffles=names["SHFL"] + names["REDUX"],
        mufu=names["MUFU"],
        barriers=names["BAR"],
    )


def read_program(text: str) -> list[Instruction]:
    """Instructions, without what only fills up the end: NOPs and a branch to itself."""
    program = []
    for digits, predicate, operation, operands in INSTRUCTION.findall(text):
        name, *suffixes = operation.split(".")
        found = TARGET.search(operands) if name == "BRA" else None
        address, target = int(digits, 16), int(found[1], 16) if found else None
        # A branch may also have its condition among the operands.
        ends = name in ("EXIT", "RET") or (name == "BRA" and not operands.count(","))
        if name != "NOP" and target != address:
            program.append(Instruction(address, name, tuple(suffixes), target, bool(predicate) or not ends))
    return program


def loops(program: Sequence[Instruction]) -> set[int]:
    """Addresses of what stands in loops: from a branch's target to the branch, where the one leads to the other.

    Seldom taken paths stand behind the end and branch back, too: they are no loops.
    """
    after = {one.address: other.address for one, other in pairwise(program) if one.goes_on}
    targets = {one.address: one.target for one in program if one.target is not None}
    inside: set[int] = set()
    for source, target in targets.items():
        if target <= source and source in _reachable(target, after, targets):
            inside |= {one.address for one in program if target <= one.address <= source}
    return inside


def _reachable(start: int, after: Mapping[int, int], targets: Mapping[int, int]) -> set[int]:
    met, ahead = set(), [start]
    while ahead:
        address = ahead.pop()
        if address not in met:
            met.add(address)
            ahead += [following[address] for following in (after, targets) if address in following]
    return met


def _by_width(program: Sequence[Instruction], names: Sequence[str]) -> dict[int, int]:
    """How many there are of each width in bits, widest first."""
    counts: Counter[int] = Counter()
    for instruction in program:
        if instruction.name in names:
            counts[next((WIDTHS[suffix] for suffix in instruction.suffixes if suffix in WIDTHS), 32)] += 1
    return dict(sorted(counts.items(), reverse=True))
