"""Tile sizes per architecture: one table, each line with the fact that decides it.

A program holds, per row of its tile, DV fp32 of output and TILE_K fp32 of scores in registers, and keeps `stages` tiles
of key and value in shared memory. Rows are bounded by registers (65,536 per multiprocessor, 255 per thread), stages by
shared memory. `tamis bench gpu-static` compiles all of them and fails if one spills or does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

from tamis.backends.triton.chips import Chip


class Tiles(NamedTuple):
    """How one kernel is cut: rows and keys of a tile (at most a block of the mask), warps, and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(chip: Chip, kind: str, dim: int, value_dim: int, block_q: int, block_kv: int, q_len: int) -> Tiles:
    """The tiles of a call.

    Args:
        kind: "fp32", "half" (16-bit products), "int8", "fp8" or "packed".
        dim, value_dim: padded head dims.
    """
    if kind == "mend":
        return Tiles(16, 32, 4, 1)  # next to never at work
    if chip.kind == "cpu":
        return Tiles(16 if q_len <= 16 else 64, 64, 4, 1)
    wide = max(dim, value_dim)
    rows, keys, warps, stages = _TABLE[(_family(chip), kind)][0 if wide <= 64 else 1 if wide <= 128 else 2]
    if q_len <= 16:
        # Decoding: few rows, and the time is that of reading the keys.
        rows, warps = 16, 4
    rows, keys = min(rows, block_q), min(keys, block_kv if kind != "packed" else 64)
    return Tiles(rows, keys, min(warps, max(4, rows // 16)), stages)


def _family(chip: Chip) -> str:
    if chip.kind == "hip":
        return "cdna3"
    return {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "hopper"}.get(chip.name, "small")


# Head dims up to 64, 128, 256.
_TABLE: dict[tuple[str, str], tuple[Tiles, Tiles, Tiles]] = {
    # 163 KB of shared memory; mma.sync keeps both operands in registers too.
    ("ampere", "half"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    ("ampere", "int8"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    ("ampere", "packed"): (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    ("ampere", "fp32"): (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1)),
    # 99 KB: sm_86, sm_89 and sm_120.
    ("small", "half"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1)),
    ("small", "int8"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1)),
    ("small", "fp8"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    ("small", "packed"): (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1)),
    ("small", "fp32"): (Tiles(64, 64, 4, 1), Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1)),
    # 227 KB; wgmma takes its operands from shared memory, by warpgroups of 4 warps and 64 rows.
    ("hopper", "half"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    ("hopper", "int8"): (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    ("hopper", "fp8"): (Tiles(128, 64, 4, 4), Tiles(128, 64, 8, 4), Tiles(128, 64, 8, 3)),
    ("hopper", "packed"): (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    ("hopper", "fp32"): (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 1)),
    # 64 KB of LDS, 64 lanes a warp; keys and values go through registers.
    ("cdna3", "half"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "int8"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "fp8"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "packed"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "fp32"): (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
}
