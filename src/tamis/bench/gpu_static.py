"""Compile every Triton kernel for every GPU, on a machine that needs none, and judge the machine code.

The backend is called as for each architecture, on small CPU tensors; what it would have started is compiled instead,
and taken apart. A kernel fails if it spills registers, asks for more shared memory than there is, has its wgmma
instructions serialised by the assembler, or lacks the matrix instructions its precision promises. The one made for
sm_90 also fails if it multiplies by older instructions, or does not hand registers from warps that copy to others.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tamis
from tamis.backends.triton import chips, hopper, launch
from tamis.bench.record import commit

DIMS = (64, 128, 256)
GLUON_DIMS = (64, 128, 192, 256)  # 96 is padded to 128
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


def calls(name: str, dims: tuple[int, ...] = DIMS) -> Iterator[tuple[str, set[str], list[launch.Launch]]]:
    """What is compiled for an architecture: a description, the kinds of product it must hold, and the launches."""
    chip = chips.CHIPS[name]
    precisions = ["full", *(["int8"] if chip.int8 else []), *(["fp8"] if chip.fp8 and chip.int8 else [])]
    for dim in dims:
        for precision in precisions:
            second = "half" if precision != "fp8" else "fp8"
            kinds = {second} if precision == "full" else {"int8", second}
            for extra in ("plain" if precision == "full" else "stage 2", "causal", "masks"):
                options = _options(extra)
                yield f"{precision} d={dim} {extra}", kinds, _noted(name, dim, torch.bfloat16, precision, **options)
        yield f"full fp32 d={dim}", {"tf32"}, _noted(name, dim, torch.float32, "full", causal=True)
    for dim in dims:
        for precision in precisions:
            yield f"predict {precision} d={dim}", {"tf32"}, _predicted(name, dim, precision)
    for kv_blocks in (257, 2049):  # more threads for a row of scores, and one that does not stay in registers
        yield f"predict {kv_blocks} blocks", {"tf32"}, _predicted(name, dims[0], "full", 64 * kv_blocks)
    if name == "sm_90":
        yield from _gluon_calls(GLUON_DIMS if dims == DIMS else dims)


def _gluon_calls(dims: tuple[int, ...]) -> Iterator[tuple[str, set[str], list[launch.Launch]]]:
    """The kernel made for sm_90 in every form: head dims, precisions, and all that is compiled in."""
    for dim in dims:
        for precision, kinds in (("full", {"half"}), ("int8", {"int8", "half"}), ("fp8", {"int8", "fp8"})):
            for block_q in (128, 64):
                if hopper.cut(precision, dim, dim, block_q) is None:
                    continue
                for number in range(8):
                    causal, lists, stage2 = bool(number & 1), bool(number & 2), bool(number & 4)
                    words = [("causal", causal), ("lists", lists), ("stage 2", stage2), ("64 rows", block_q == 64)]
                    what = " ".join([precision, f"d={dim}", *(word for word, there in words if there)])
                    if block_q == 128 or (lists and stage2):  # blocks of 64 rows come with lists
                        yield what, kinds, [gluon(dim, precision, block_q, causal=causal, lists=lists, stage2=stage2)]


def gluon(dim: int, precision: str, block_q: int = 128, *, causal: bool, lists: bool, stage2: bool) -> launch.Launch:
    """What a call starts of the kernel made for sm_90."""
    query, key, value = _inputs(dim, torch.bfloat16)
    blocks = torch.ones(1, 4, 256 // block_q, 4, dtype=torch.bool)
    mask = tamis.BlockMask.from_dense(blocks, (block_q, 64), (256, 256)) if lists else None
    threshold = 5.0 if stage2 else None
    with _kernel("gluon"), chips.assume("sm_90"), launch.note() as launches:
        tamis.attend(
            query, key, value, mask, backend="triton", precision=precision, causal=causal, pv_threshold=threshold
        )
    return next(item for item in launches if item.kernel.fn.__name__ == "hopper_kernel")


@contextlib.contextmanager
def _kernel(name: str) -> Iterator[None]:
    before = os.environ.get("TAMIS_GPU_KERNEL")
    os.environ["TAMIS_GPU_KERNEL"] = name
    try:
        yield
    finally:
        del os.environ["TAMIS_GPU_KERNEL"]
        if before is not None:
            os.environ["TAMIS_GPU_KERNEL"] = before


def _options(extra: str) -> dict[str, Any]:
    """The arguments of `attend` that make another kernel of it."""
    if extra == "masks":
        places = torch.arange(256)
        return {
            "causal": True,
            "window": 100,
            "positions": (places, places),
            "segments": (places // 100, places // 100),
            "attn_mask": torch.zeros(256, 256),
            "softcap": 30.0,
            "sink_logits": torch.zeros(4),
        }
    return {"causal": extra != "plain"} | ({"pv_threshold": 5.0} if extra == "stage 2" else {})


def _inputs(dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(1, 4, 256, dim, dtype=dtype),
        torch.randn(1, 2, 256, dim, dtype=dtype),
        torch.randn(1, 2, 256, dim, dtype=dtype),
    )


def _noted(name: str, dim: int, dtype: torch.dtype, precision: str, **options: Any) -> list[launch.Launch]:
    query, key, value = _inputs(dim, dtype)
    mask = tamis.BlockMask.from_dense(torch.ones(1, 4, 2, 4, dtype=torch.bool), seq_lens=(256, 256))
    with _kernel("triton"), chips.assume(name), launch.note() as launches:
        tamis.attend(query, key, value, mask, backend="triton", precision=precision, **options)
    return launches


def attention(name: str, dim: int, dtype: torch.dtype, precision: str = "full", **options: Any) -> launch.Launch:
    """The first pass of attention itself, by the kernel for all GPUs, among what a call would start."""
    return next(item for item in _noted(name, dim, dtype, precision, **options) if "FLAG_ROWS" in item.constants)


def _predicted(name: str, dim: int, precision: str, kv_len: int = 256) -> list[launch.Launch]:
    """What sparse_attention starts before attention, by cdf and topk at once: blocks chosen, inputs rounded."""
    query, key, value = _inputs(dim, torch.bfloat16)
    if kv_len != 256:
        key = value = torch.zeros(1, 1, kv_len, dim, dtype=torch.bfloat16)
    with _kernel("triton"), chips.assume(name), launch.note() as launches:
        tamis.sparse_attention(
            *(query, key, value),
            enable_gqa=True,
            predictor=tamis.Sparge(cdf=0.9, topk=0.5),
            precision=precision,
            backend="triton",
        )
    return [item for item in launches if item.kernel.fn.__name__ != "attend_kernel"]


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
    options = {"num_warps": item.warps, "num_stages": item.stages}
    return triton.compile(source, target=target, options=options)


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
    code = _amd(made, row) if chip.kind == "hip" else _nvidia(made, row, name)
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


def _nvidia(made: Any, row: Row, name: str) -> str:
    """Registers and spills as the assembler tells them, and the machine code."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    architecture = re.search(r"\.target\s+(\w+)", made.asm["ptx"])
    assert architecture is not None
    assembler = get_ptxas(int(name[3:])).path  # newer Tritons have a newer one for more of them
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(made.asm["ptx"])
        command = [assembler, "-v", f"--gpu-name={architecture[1]}", str(ptx), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = subprocess.run([str(tools / "nvdisasm"), str(cubin)], capture_output=True, text=True, check=True).stdout
    row.registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    row.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    if re.search(r"C75(11|15|14|10)|wgmma.*serializ", log):
        row.faults.append("the assembler serialises wgmma")
    return code


def _amd(made: Any, row: Row) -> str:
    code: str = made.asm["amdgcn"]
    row.registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", code))
    # Scalar registers spill into vector ones, which costs no memory access; those that spill go to scratch memory.
    row.spills = sum(4 * int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    return code


def _all_of(name: str, dims: tuple[int, ...]) -> list[Row]:
    rows, done = [], set()
    for what, kinds, launches in calls(name, dims):
        for item in launches:
            key = (item.kernel.fn.__name__, str(sorted(item.constants.items())), item.warps, forms(item))
            if key not in done:
                done.add(key)
                rows.append(judge(item, name, what, kinds))
    return rows


def forms(item: launch.Launch) -> str:
    """Types of the arguments as Triton specialises on them: some also on being 1, or a multiple of 16."""
    import triton
    from triton.backends.compiler import BaseBackend

    specialize = triton.runtime.jit.native_specialize_impl
    parameters = [parameter for parameter in item.kernel.params if not parameter.is_constexpr]
    return str(
        [
            specialize(BaseBackend, value, False, not parameter.do_not_specialize, True)
            for value, parameter in zip(item.arguments, parameters, strict=True)
        ]
    )


def architectures() -> list[str]:
    """All that tamis has settings for."""
    return [name for name, chip in chips.CHIPS.items() if chip.kind != "cpu"]


def result(rows: list[Row]) -> dict[str, Any]:
    """The rows as plain values, with the versions they belong to."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    return {**versions, "rows": [asdict(row) for row in rows]}


def run(names: list[str] | None = None, dims: tuple[int, ...] = DIMS, workers: int = 2) -> list[Row]:
    """All kernels of the architectures named, or of all."""
    names = names or architectures()
    if workers == 1:
        return [row for name in names for row in _all_of(name, dims)]
    with ProcessPoolExecutor(workers) as pool:
        return [row for rows in pool.map(_all_of, names, [dims] * len(names)) for row in rows]


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
        name = re.fullmatch(r"(full fp32|full|int8|fp8) d=(\d+)( causal)?( lists)?", row["what"])
        gluon = row["kernel"] == "hopper_kernel"
        if name is None or row["kernel"] not in ("attend_kernel", "hopper_kernel"):
            continue
        if bool(name[4]) != gluon or (name[3] is None and name[1] != "full fp32"):
            continue
        place = row["target"], name[1] + (", Gluon" if gluon else "")
        if name[2] in cells.setdefault(place, {}):
            continue  # the second pass
        cells[place][name[2]] = f"{row['tile']}, {row['warps']}w: {row['registers']}, {row['shared'] / 1024:.0f} KB"
        products[place] = ", ".join(row["instructions"])
    lines = ["| | precision | d=64 | d=128 | d=256 | matrix products |", "|---|---|---|---|---|---|"]
    for (target, precision), by_dim in cells.items():
        shown = " | ".join(by_dim.get(str(dim), "-") for dim in DIMS)
        lines.append(f"| {target} | {precision} | {shown} | {products[target, precision]} |")
    return "\n".join(lines)
