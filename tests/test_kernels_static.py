"""What the compiler makes of the kernels: is it within its budget, and is everything that is launched looked at?"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import yaml

from benchmarks import common, kernels_static
from benchmarks.kernels_cases import CASES, KERNELS, Case, Narrow
from benchmarks.kernels_sass import Figures, read_figures
from benchmarks.kernels_static import breaches, verdict
from fastgen.errors import MachineError, UserError, command

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# Few, so that it stays short: a row that is read, images that are gathered, a tile that is reduced.
COMPILED = ("tolerant_kernel", "views_kernel", "statistics_kernel")

CASE = Case("a_kernel", "fp32 C=100", lambda: None, Narrow(128, 1))
FIGURES = Figures(
    warps=1,
    registers=100,
    spill_bytes=0,
    shared_bytes=1024,
    instructions=1000,
    loop_instructions=200,
    loads={128: 2, 64: 1},
    stores={128: 1},
    shuffles=5,
    mufu=3,
    barriers=0,
)
WITHIN = {"registers": 105, "instructions": 1050, "loop_instructions": 210}
WORSE = {
    "registers": {"registers": 106},
    "spill_bytes": {"spill_bytes": 8},
    "instructions": {"instructions": 1051},
    "loop_instructions": {"loop_instructions": 211},
    "loads": {"loads": {128: 3, 64: 1}},
    "widest_load_bits": {"loads": {64: 1}},
}

# cuobjdump's form: an address, the instruction, its encoding, whose second half has a line of its own.
SASS = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function a_kernel:
  REG:62 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0

\tcode for sm_90a
\t\tFunction : a_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000e220000000800 */
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR10][R2.64] ;           /* 0x0000000a02049981 */
                                                                               /* 0x000ea2000c1e1d00 */
        /*0020*/                   LDG.E.U16.CONSTANT R4, desc[UR10][R2.64] ;  /* 0x0000000a02049981 */
        /*0030*/                   LDG.E R4, desc[UR10][R2.64+0x40] ;          /* 0x0000000a02049981 */
        /*0040*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;          /* 0x0000000a02049981 */
        /*0050*/              @UP0 MUFU.EX2 R22, R22 ;                         /* 0x0000001600167308 */
        /*0060*/               @P0 BRA 0x40 ;                                  /* 0x0000001600167308 */
        /*0070*/                   BRA.DIV UR4, 0xc0 ;                         /* 0x0000001600167308 */
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;               /* 0x0000001600167308 */
        /*0090*/                   STG.E.64 desc[UR10][R4.64], R16 ;           /* 0x0000001600167308 */
        /*00a0*/                   STG.E.U8 desc[UR10][R4.64], R16 ;           /* 0x0000001600167308 */
        /*00b0*/                   EXIT ;                                      /* 0x0000001600167308 */
        /*00c0*/                   REDUX.SUM UR4, R2 ;                         /* 0x0000001600167308 */
        /*00d0*/                   BRA 0x80 ;                                  /* 0x0000001600167308 */
        /*00e0*/                   BRA 0xe0;                                   /* 0xfffffffc00fc7947 */
        /*00f0*/                   NOP;                                        /* 0x0000000000007918 */
\t\t..........
"""


def _run(words, **environment):
    """The command in a process of its own, from the folder of this repository."""
    program = [sys.executable, "-m", "benchmarks.kernels_static", *words]
    env = {**os.environ, **environment}
    return subprocess.run(program, cwd=common.ROOT, env=env, capture_output=True, text=True, timeout=400)


@needs_triton
def test_budget_holds_from_an_interpreted_process(tmp_path):
    words = [f"--kernels={','.join(COMPILED)}", f"--results={tmp_path / 'rows.csv'}"]
    done = _run(words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = common.read_rows(tmp_path / "rows.csv")
    assert [f"{row['kernel']} {row['case']}" for row in rows] == [c.key for c in CASES if c.kernel in COMPILED]
    assert {row["spill_bytes"] for row in rows} == {"0"}
    assert {row["triton"] for row in rows} == {version("triton")}
    wide = next(row for row in rows if row["case"] == "bf16 C=1000 K=5")
    assert wide["loads"] == f"{4 // int(wide['warps'])}x128+1x64"


def test_every_case_has_a_budget_that_itself_breaks_nothing():
    budgets = kernels_static.read_budget(kernels_static.BUDGET)
    assert budgets
    for of_version in budgets.values():
        assert set(of_version) == {case.key for case in CASES}
        assert not any(entry["spill_bytes"] for entry in of_version.values())


def test_every_kernel_has_a_case():
    assert _kernels() == set(KERNELS)


def _kernels():
    """Names of the @triton.jit functions of fastgen.kernels that no other of them calls, or that are launched."""
    jitted, called, launched = set(), set(), set()
    for path in (common.ROOT / "fastgen" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add(node.name)
                called |= {ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return (jitted - called) | (jitted & launched)


def test_cases_have_names_of_their_own():
    assert len({case.key for case in CASES}) == len(CASES)


def test_figures_of_a_program():
    assert read_figures(SASS, 4) == Figures(
        warps=4,
        registers=62,
        spill_bytes=24,
        shared_bytes=1024,
        instructions=14,
        loop_instructions=3,
        loads={128: 1, 32: 1, 16: 1},
        stores={64: 1, 8: 1},
        shuffles=2,
        mufu=1,
        barriers=1,
    )


def test_text_without_a_program_is_told():
    with pytest.raises(MachineError, match="no program"):
        read_figures("cuobjdump info: no device code", 4)


def test_what_is_within_the_budget_passes():
    budget = FIGURES.budget
    assert budget == {
        "warps": 1, "registers": 100, "spill_bytes": 0, "widest_load_bits": 128, "loads": 3,
        "instructions": 1000, "loop_instructions": 200,
    }  # fmt: skip
    assert breaches(CASE, FIGURES, budget) == []
    assert breaches(CASE, replace(FIGURES, **WITHIN), budget) == []
    assert verdict(FIGURES, budget) == "met"
    assert verdict(replace(FIGURES, registers=80), budget) == "improved"
    assert breaches(CASE, replace(FIGURES, registers=80, loads={128: 1}), budget) == []


@pytest.mark.parametrize("name", WORSE)
def test_a_breach_is_one_line_that_names_it(name):
    lines = breaches(CASE, replace(FIGURES, **WORSE[name]), FIGURES.budget)
    assert sum(f"a_kernel fp32 C=100: {name} " in line for line in lines) == 1
    # A spill also breaks what must hold without any budget.
    assert len(lines) == 1 + (name == "spill_bytes")


def test_without_a_budget_spills_and_narrow_loads_are_told():
    assert breaches(CASE, replace(FIGURES, registers=255, instructions=9999), None) == []
    assert verdict(FIGURES, None) == "no budget"
    (line,) = breaches(CASE, replace(FIGURES, spill_bytes=8), None)
    assert "8 bytes of registers are spilled" in line
    (line,) = breaches(CASE, replace(FIGURES, loads={64: 1, 16: 32}), None)
    assert "33 global loads narrower than 128 bits, may be 1 (1x64+32x16)" in line
    assert breaches(replace(CASE, narrow=None), replace(FIGURES, loads={16: 32}), None) == []


def test_a_case_without_an_entry_and_another_number_of_warps_are_told():
    (line,) = breaches(CASE, FIGURES, {})
    assert "no budget" in line
    (line,) = breaches(CASE, replace(FIGURES, warps=2, registers=200), FIGURES.budget)
    assert "2 warps, budget 1" in line


def test_an_unknown_version_is_one_line_and_a_breach_an_error(capsys):
    kernels_static._judge([CASE], {CASE.key: FIGURES}, None, "9.9.9")
    assert "no budget for Triton 9.9.9" in capsys.readouterr().out
    with pytest.raises(kernels_static.OverBudget, match="1 figures of 1 cases"):
        kernels_static._judge([CASE], {CASE.key: FIGURES}, {CASE.key: {**FIGURES.budget, "registers": 50}}, "3.8.0")
    out = capsys.readouterr().out
    assert "WORSE" in out
    assert out.endswith("a_kernel fp32 C=100: registers 100, budget 50\n")


def test_budget_is_written_version_by_version(tmp_path):
    path = tmp_path / "budget.yaml"
    kernels_static.write_budget(path, "3.8.0", {"a": FIGURES, "b": FIGURES}, whole=True)
    kernels_static.write_budget(path, "3.9", {"a": FIGURES}, whole=True)
    kernels_static.write_budget(path, "3.8.0", {"a": replace(FIGURES, registers=7)}, whole=False)
    budgets = kernels_static.read_budget(path)
    assert budgets["3.9"] == {"a": FIGURES.budget}
    assert budgets["3.8.0"] == {"a": {**FIGURES.budget, "registers": 7}, "b": FIGURES.budget}
    kernels_static.write_budget(path, "3.8.0", {"b": FIGURES}, whole=True)
    assert set(kernels_static.read_budget(path)["3.8.0"]) == {"b"}
    assert kernels_static.read_budget(tmp_path / "none.yaml") == {}


@pytest.mark.parametrize("text", ["- 1", "'3.8.0': [1]", "'3.8.0': {a: {registers: many}}", "["])
def test_a_broken_budget_is_told(text, tmp_path):
    (tmp_path / "budget.yaml").write_text(text)
    with pytest.raises(UserError, match=r"budget\.yaml: is no budget"):
        kernels_static.read_budget(tmp_path / "budget.yaml")


def test_the_committed_budget_reads_as_yaml_with_text_for_versions():
    assert all(isinstance(key, str) for key in yaml.safe_load(kernels_static.BUDGET.read_text()))


@pytest.mark.parametrize("word", ["--kernels=no_kernel", "--warps=3", "--warps=x", "--wrong=1"])
def test_a_wrong_argument_is_one_line(word, capsys):
    assert command(kernels_static.main, [word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
