"""The native CPU backend, as `tamis.backends.base` wants it."""

from __future__ import annotations

import torch

from tamis.backends.cpu import native
from tamis.backends.cpu.attention import attend, pack_kv
from tamis.backends.cpu.library import available_targets, built_targets, force_target, missing, target
from tamis.backends.cpu.prediction import key_mean, predict, select, summarize
from tamis.backends.cpu.record import AttendRecord, PredictRecord
from tamis.call import Call
from tamis.stats import Formats

__all__ = [
    "MIXES",
    "NAME",
    "AttendRecord",
    "PredictRecord",
    "attend",
    "available_targets",
    "built_targets",
    "force_target",
    "formats",
    "key_mean",
    "missing",
    "pack_kv",
    "predict",
    "reasons",
    "select",
    "summarize",
    "target",
]

NAME = "cpu"
MIXES = True


def formats(precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
    """Number formats of the two products."""
    few = ("int8", "uint8 x int8") if precision == "int8" else ("float32", "float32")
    if target() != "amx" or not (dtype == torch.bfloat16 or precision == "int8"):
        return Formats(few, few)
    return Formats(few, ("int8" if precision == "int8" else "bfloat16", "bfloat16"))


def reasons(call: Call) -> list[str]:
    """Why this backend can't serve the call; empty if it can."""
    found = []
    why = missing()
    if why is not None:
        return [why]
    tensors = (call.query, call.key, call.value, call.attn_mask, call.kv_num_blocks, *call.packed)
    if any(t is not None and t.device.type != "cpu" for t in tensors):
        found.append("it runs on CPU tensors")
    if call.query.dtype not in native.DTYPES:
        found.append(f"it takes float32, bfloat16 and float16, not {call.query.dtype}")
    if call.precision not in ("full", "int8"):
        found.append(f"it has precision 'full' and 'int8', not {call.precision!r}")
    return found
