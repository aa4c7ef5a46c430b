"""Tile sizes per architecture: one table, found by compiling, smaller tiles first tried only where larger ones spill.

A program holds, per row of its tile, the output and a tile of scores in fp32 registers (65,536 per multiprocessor, 255
per thread at most), and `stages` tiles of key and value in shared memory. Large tiles read key and value less often;
four warps share a tile at less cost than eight, where the registers last. `tamis bench gpu-static --all` compiles every
line and fails if one spills or does not fit.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from tamis.backends.triton.chips import Chip


class Tiles(NamedTuple):
    """How one kernel is cut: rows and keys of a tile (at most a block of the mask), warps, and pipeline stages.

    registers: the most that a thread may have, where the assembler would otherwise spill although some are free.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def tiles(
    chip: Chip,
    kind: str,
    dim: int,
    value_dim: int,
    block_q: int,
    block_kv: int,
    q_len: int,
    *,
    regular: bool = True,
    window: bool = False,
    skips: bool = False,
) -> Tiles:
    """The tiles of a call.

    Args:
        kind: "fp32", "half" (16-bit products), "int8", "fp8", "packed", or "mend" for the second pass over edges.
        dim, value_dim: padded head dims.
        regular: whether what rows see are intervals, places in a tile fit 32 bits, and keys are loaded by 16 bytes;
            else addresses take registers.
        window: whether there is one, and with it a third run of blocks.
        skips: whether stage 2 may leave out a product.
    """
    if chip.kind == "cpu":
        return Tiles(16 if q_len <= 16 else 64, 64, 4, 1)
    wide = max(dim, value_dim)
    column = 0 if wide <= 64 else 1 if wide <= 128 else 2
    if kind == "mend":
        return _MEND[column]._replace(registers=255 if chip.kind == "cuda" else None)
    halved = block_q == 64 and q_len > 16
    rows, keys, warps, stages, registers = _line(chip, kind, column, halved, regular, window, skips)
    if chip.kind == "cuda" and (q_len <= 16 or not regular or kind == "fp32"):
        registers = 255
    if q_len <= 16:
        # Decoding: few rows, and the time is that of reading the keys.
        rows, warps = 16, 4 if wide <= 64 and regular else 8
    if block_q < rows:
        # A tile of half the rows has half the warps, where registers last for its channels.
        rows, warps = block_q, 4 if wide <= 64 else warps
    return Tiles(rows, min(keys, block_kv, 64 if kind == "packed" else 128), warps, stages, registers)


def _line(chip: Chip, kind: str, column: int, halved: bool, regular: bool, window: bool, skips: bool) -> Tiles:
    """A line of the tables: the first that is there for the chip or its family, and for what is special in a call."""
    family = _family(chip)
    if not regular:
        group = "fp32" if kind == "fp32" else "others"
        return _IRREGULAR.get((chip.name, group), _IRREGULAR["", group])[column]
    forms = {
        "stage 2": skips,
        "64 rows window": halved and window,
        "window": window,
        "64 rows": halved,
        "": True,
    }
    for form, name in itertools.product((form for form, here in forms.items() if here), (chip.name, family)):
        if (found := _SPECIAL.get((name, kind, form, column))) is not None:
            return found
    return _TABLE[family, kind][column]


def _family(chip: Chip) -> str:
    if chip.kind == "hip":
        return "cdna3"
    return {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "hopper"}.get(chip.name, "small")


# For head dims up to 64, 128 and 256. The same on all chips but those named, found with all kinds of mask at once.
_IRREGULAR = {
    ("", "fp32"): (Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
    ("", "others"): (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
    ("sm_120", "others"): (Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
    ("gfx942", "others"): (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 8, 1)),
}

# By chip or family, kind, what is special in a call, and place in a line below: where the usual tiles spill.
_SPECIAL = {
    ("sm_80", "half", "64 rows window", 0): Tiles(64, 64, 8, 3),
    ("sm_80", "int8", "window", 2): Tiles(32, 32, 8, 3),
    # Where a product may be left out, the output is not in tensor memory all the time.
    ("sm_100", "half", "stage 2", 1): Tiles(128, 32, 8, 3),
    ("sm_100", "half", "stage 2", 2): Tiles(64, 32, 8, 2),
    ("sm_100", "int8", "stage 2", 2): Tiles(64, 32, 8, 2),
    ("sm_120", "half", "", 2): Tiles(32, 32, 8, 2),
    ("sm_120", "half", "64 rows", 0): Tiles(64, 64, 8, 3),
    ("sm_120", "half", "64 rows window", 0): Tiles(64, 64, 8, 3),
    ("sm_120", "half", "window", 0): Tiles(128, 64, 8, 2),
    ("sm_120", "int8", "window", 0): Tiles(64, 64, 8, 3),
    ("sm_120", "packed", "window", 1): Tiles(64, 32, 8, 2),
    ("sm_120", "fp8", "64 rows", 0): Tiles(64, 64, 8, 3),
    ("small", "half", "window", 1): Tiles(64, 64, 8, 2),
    ("small", "int8", "window", 1): Tiles(64, 32, 8, 3),
    ("small", "packed", "64 rows window", 0): Tiles(64, 64, 4, 2, 255),
    ("small", "int8", "64 rows", 1): Tiles(64, 32, 8, 3),
}

# Next to never at work.
_MEND = (Tiles(16, 16, 4, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1))

# For head dims up to 64, 128 and 256.
_TABLE: dict[tuple[str, str], tuple[Tiles, Tiles, Tiles]] = {
    # sm_90 and sm_100: 227 KB of shared memory, from which the matrix units read both operands.
    ("hopper", "half"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    ("hopper", "int8"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    # The product with e4m3 values cannot add to the output in place: both take registers.
    ("hopper", "fp8"): (Tiles(128, 64, 8, 4), Tiles(128, 64, 8, 4), Tiles(64, 32, 8, 2)),
    ("hopper", "packed"): (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    # Products of fp32 are three of tf32: operands twice, in registers.
    ("hopper", "fp32"): (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 8, 1)),
    # sm_80: 163 KB; its matrix units read the registers, so that operands count there too.
    ("ampere", "half"): (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(32, 64, 8, 2)),
    ("ampere", "int8"): (Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 32, 8, 2)),
    ("ampere", "packed"): (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ("ampere", "fp32"): (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 8, 1)),
    # sm_86, sm_89, sm_120: 99 KB.
    ("small", "half"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 32, 4, 1)),
    ("small", "int8"): (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1)),
    ("small", "fp8"): (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(32, 32, 8, 2)),
    ("small", "packed"): (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 4, 1)),
    ("small", "fp32"): (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 8, 1)),
    # gfx942: 64 KB, 64 lanes a warp, 512 registers; key and value pass through them.
    ("cdna3", "half"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "int8"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "fp8"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    ("cdna3", "packed"): (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1)),
    ("cdna3", "fp32"): (Tiles(64, 32, 4, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
}
