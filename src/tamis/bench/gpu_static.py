"""Compile every Triton kernel for every GPU, on a machine that needs none, and judge the machine code.

The backend is called as for each architecture, on small CPU tensors; what it would have started is compiled instead,
and taken apart. A kernel fails if it spills registers, asks for more shared memory than there is, has its wgmma
instructions serialised by the assembler, or lacks the matrix instructions its precision promises. The one made for
sm_90 also fails if it multiplies by older instructions, or does not hand registers from warps that copy to others.
gpu_forms.py says which calls.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tamis.backends.triton import chips, launch
from tamis.bench import gpu_forms
from tamis.bench.record import commit

# Matrix instructions for 16-bit, int8, e4m3 and tf32 products. Hopper and Blackwell have their own for whole
# warpgroups, and the older ones for tiles of fewer than 64 rows.
_WARP = {"half": "HMMA.16816", "int8": "IMMA.16832", "fp8": "QMMA.16832", "tf32": "HMMA.1688.F32.TF32"}
_GROUP = {
    "sm_90": {"half": r"HGMMA\.(?!\S*TF32)", "int8": "IGMMA", "fp8": "QGMMA", "tf32": r"HGMMA\.\S*TF32"},
    "sm_100": {"half": "UTCHMMA", "int8": "UTCIMMA", "fp8": "UTCQMMA", "tf32": "UTCHMMA"},
}
_AMD = {
    "half": r"v_mfma_f32_\w*b?f16",
    "int8": "v_mfma_i32",
    "fp8": r"v_mfma_f32_\w*fp8_fp8",
    "tf32": r"v_mfma_f32_\w*f32",
}


@dataclass
class Row:
    """One kernel on one architecture."""

    target: str
    kernel: str
    what: str
    tile: str
    warps: int
    stages: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def compile_launch(item: launch.Launch, name: str) -> Any:
    """Triton's compiled kernel for an architecture."""
    import triton
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = chips.CHIPS[name].kind
    target = GPUTarget("hip", name, 64) if kind == "hip" else GPUTarget("cuda", int(name[3:]), 32)
    backend = make_backend(target)
    assert isinstance(backend, BaseBackend)
    specialize = triton.runtime.jit.native_specialize_impl
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = [*item.arguments]
    for index, parameter in enumerate(item.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = item.constants[parameter.name]
            continue
        value = values.pop(0)
        form, key = specialize(type(backend), value, False, not parameter.do_not_specialize, True)
        signature[parameter.name] = form
        if form == "constexpr":
            constants[parameter.name] = value if key is None else key
        elif isinstance(key, str):
            attributes[(index,)] = backend.parse_attr(key)
    form = GluonASTSource if item.kernel.is_gluon() else ASTSource
    source = form(item.kernel, signature, constants, attributes)
    with triton.knobs.compilation.scope(), triton.knobs.runtime.scope(), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.runtime.add_stages_inspection_hook = _keep_log
        made = triton.compile(source, target=target, options=item.options)
        if kind == "cuda" and not _has_log(made):  # Triton's cache had it from elsewhere
            triton.knobs.compilation.always_compile = True
            made = triton.compile(source, target=target, options=item.options)
    return made


def _has_log(made: Any) -> bool:
    return hasattr(made.metadata, "assembler_log")


def _keep_log(backend: Any = None, stages: dict[str, Any] | None = None, *others: Any) -> tuple[str, str]:
    """Have what the assembler says beside the rest that is known of a kernel, where Triton would print it.

    Newer versions of Triton also ask, without arguments, for a name of what is changed and its hash.
    """
    known = "the log is kept", "1"
    if stages is None:
        return known
    assemble = stages.get("cubin")
    if assemble is None:
        return known

    def run(code: Any, metadata: dict[str, Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            made = assemble(code, metadata)
        metadata["assembler_log"] = log.getvalue()
        return made

    stages["cubin"] = run
    return known


def judge(item: launch.Launch, name: str, what: str, kinds: set[str]) -> Row:
    """Compile one launch and look at what came out."""
    chip = chips.CHIPS[name]
    rows = _rows(item)
    tile = f"{rows} x {item.constants['TILE_K']}" if rows else ""
    edges = " (edges)" if item.constants.get("FLAG_ROWS", 0) else ""
    row = Row(name, item.kernel.fn.__name__, what + edges, tile, item.warps, item.stages)
    try:
        made = compile_launch(item, name)
    except Exception as error:
        row.faults.append(f"does not compile: {str(error).strip().splitlines()[-1][:200]}")
        return row
    row.shared = made.metadata.shared
    if row.shared > chip.shared:
        row.faults.append(f"{row.shared} bytes of shared memory, there are {chip.shared}")
    code = _amd(made, row) if chip.kind == "hip" else _nvidia(made, row)
    if row.spills:
        row.faults.append(f"{row.spills} bytes of spills")
    for kind, pattern in _patterns(item, name).items():
        if found := len(re.findall(rf"\b{pattern}", code)):
            row.instructions[kind] = found
    if row.kernel == "hopper_kernel":
        row.faults += [
            f"older matrix instructions: {old}" for old in ("HMMA", "IMMA") if re.search(rf"\b{old}\b", code)
        ]
        row.faults += [] if "USETMAXREG" in code else ["registers are not handed on"]
    if row.kernel in ("attend_kernel", "hopper_kernel"):
        if rows < 64 and name == "sm_90":
            kinds = {"half" if kind == "fp8" else kind for kind in kinds}  # which has e4m3 for warpgroups alone
        row.faults += [f"no {kind} matrix instructions" for kind in sorted(kinds - set(row.instructions))]
    return row


def _rows(item: launch.Launch) -> int:
    """Query rows of a tile, or of both tiles of the two warpgroups; 0 for other kernels."""
    if "SPLIT" in item.constants:
        return 64 if item.constants["SPLIT"] else 128
    return int(item.constants.get("TILE_Q", 0))


def _patterns(item: launch.Launch, name: str) -> dict[str, str]:
    if chips.CHIPS[name].kind == "hip":
        return _AMD
    return _GROUP[name] if name in _GROUP and _rows(item) >= 64 else _WARP


def _nvidia(made: Any, row: Row) -> str:
    """Registers and spills as the assembler told them, and the machine code."""
    import triton

    log = made.metadata.assembler_log
    row.registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    row.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    if re.search(r"C75(11|15|14|10)|wgmma.*serializ", log):
        row.faults.append("the assembler serialises wgmma")
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        return subprocess.run([disassembler, "-c", cubin.name], capture_output=True, text=True, check=True).stdout


def _amd(made: Any, row: Row) -> str:
    code: str = made.asm["amdgcn"]
    row.registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", code))
    # Scalar registers spill into vector ones, which costs no memory access; those that spill go to scratch memory.
    row.spills = sum(4 * int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    return code


def _all_of(name: str, dims: tuple[int, ...], whole: bool) -> list[Row]:
    calls = gpu_forms.calls(name, dims, whole=whole)
    return [judge(item, name, call.what, call.products) for call in calls for item in call.launches]


def architectures() -> list[str]:
    """All that tamis has settings for."""
    return [name for name, chip in chips.CHIPS.items() if chip.kind != "cpu"]


def result(rows: list[Row]) -> dict[str, Any]:
    """The rows as plain values, with the versions they belong to."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    return {**versions, "rows": [asdict(row) for row in rows]}


def run(
    names: list[str] | None = None, dims: tuple[int, ...] = gpu_forms.DIMS, workers: int = 2, *, whole: bool = False
) -> list[Row]:
    """Kernels of the architectures named, or of all: of the whole list of calls, or of a share of it."""
    names = names or architectures()
    if workers == 1:
        return [row for name in names for row in _all_of(name, dims, whole)]
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(_all_of, names, [dims] * len(names), [whole] * len(names))
        return [row for rows in done for row in rows]


def table(rows: list[Row]) -> str:
    """The rows as text."""
    columns = (
        f"{'target':8} {'kernel':18} {'call':24} {'warps':>5} {'stages':>6} {'regs':>5} {'spills':>6} {'shared':>7}"
    )
    head = f"{columns}  matrix instructions"
    lines = [head]
    for row in rows:
        found = " ".join(f"{kind}:{number}" for kind, number in row.instructions.items())
        fault = f"  FAILS: {'; '.join(row.faults)}" if row.faults else ""
        lines.append(
            f"{row.target:8} {row.kernel.removesuffix('_kernel'):18} {row.what:24} {row.warps:5} {row.stages:6} "
            f"{row.registers:5} {row.spills:6} {row.shared:7}  {found}{fault}"
        )
    lines.append(f"{len(rows)} kernels, {sum(bool(row.faults) for row in rows) or 'none'} fail")
    return "\n".join(lines)


def markdown(saved: dict[str, Any]) -> str:
    """The table of docs/performance-gpu.md from a saved result: causal attention, its first pass, by head dim."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    products: dict[tuple[str, str], str] = {}
    for row in saved["rows"]:
        gluon = row["kernel"] == "hopper_kernel"
        name = re.fullmatch(
            r"(full fp32|full|int8|fp8|packed) d=(\d+) causal" + (" lists" if gluon else ""), row["what"]
        )
        if name is None or row["kernel"] not in ("attend_kernel", "hopper_kernel"):
            continue
        place = row["target"], name[1] + (", Gluon" if gluon else "")
        if name[2] in cells.setdefault(place, {}):
            continue  # the second pass
        cells[place][name[2]] = f"{row['tile']}, {row['warps']}w: {row['registers']}, {row['shared'] / 1024:.0f} KB"
        products[place] = ", ".join(row["instructions"])
    lines = ["| | precision | d=64 | d=128 | d=256 | matrix products |", "|---|---|---|---|---|---|"]
    for (target, precision), by_dim in cells.items():
        shown = " | ".join(by_dim.get(str(dim), "-") for dim in gpu_forms.DIMS)
        lines.append(f"| {target} | {precision} | {shown} | {products[target, precision]} |")
    return "\n".join(lines)
