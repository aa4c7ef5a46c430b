"""The Triton backend: one set of kernels for every GPU, compiled where they run, with nothing to build.

    prepare.py  reads query once, key and value twice: means, similarities, 8-bit copies
    lists.py    block means -> lists of blocks
    engine.py   attention over the lists, from operands.py;  hopper.py  the same where sm_90 has a kernel of its own
    kernels/    what those start;  settings.py, chips.py  what differs between GPUs;  launch.py  how kernels are started

Precision "full" multiplies in the inputs' dtype (fp32 by three products of tf32), "int8" has int8 scores and 16-bit
values, "fp8" int8 scores and e4m3 values; sums are fp32. Stage 2 skips whole tiles: up to 128 query rows by 64 keys.
Triton needs a C compiler and Python's headers the first time a kernel starts. Its interpreter (`TRITON_INTERPRET=1`) is
refused outside of the tests, which mend it: as it comes, it rounds bf16 wrongly. Lists of blocks are not read before
they are used: one that is out of order or range gives a wrong output, and never an access outside of the tensors.

`TAMIS_GPU_KERNEL`, for tests: "triton" never takes the kernel made for sm_90, "gluon" refuses calls that it does not
take, "auto" (the default) takes it where it can; stats say why not.
"""

from __future__ import annotations

import torch

from tamis.backends.triton import chips, hopper
from tamis.backends.triton.engine import attend
from tamis.backends.triton.lists import predict, select
from tamis.backends.triton.prepare import key_mean, pack_kv, room, summarize
from tamis.call import Call
from tamis.stats import Formats

__all__ = [
    "MIXES",
    "NAME",
    "attend",
    "formats",
    "kernel_reason",
    "key_mean",
    "pack_kv",
    "predict",
    "reasons",
    "room",
    "select",
    "summarize",
]
__all__ += ["target"]

NAME = "triton"
MIXES = False
_MAX_HEAD_DIM = 256


def reasons(call: Call) -> list[str]:
    """Why this backend can't serve the call; empty if it can."""
    device = call.query.device
    why = chips.missing(device.type, device.index or 0)
    if why is not None:
        return [why]
    found = []
    if max(call.query.shape[3], call.value_dim) > _MAX_HEAD_DIM:
        found.append(f"it takes head dims up to {_MAX_HEAD_DIM}")
    if (lack := lacks(call.precision, device.type, device.index or 0)) is not None:
        found.append(lack)
    if not found and _insists() and (why := _general(call)) is not None:
        found.append(f"TAMIS_GPU_KERNEL=gluon, and {why}")
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def lacks(precision: str, kind: str, index: int) -> str | None:
    """Why a device on which nothing is missing can't run a precision, or None."""
    device = torch.device(kind, index)
    chip, name = chips.of(device), chips.name_of(device)
    if precision == "fp8" and chip.fp8 is None:
        return f"precision 'fp8' needs sm_89 or newer, and this GPU is {name}: use precision='int8'"
    if precision != "full" and not chip.int8 and (chips.triton_version() or (0, 0)) < (3, 9):
        return f"precision {precision!r} needs Triton 3.9 or newer on {name}: use precision='full'"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _insists() -> bool:
    return hopper.wanted() == "gluon"


def kernel_reason(call: Call) -> tuple[str | None, str | None]:
    """Why a call runs on the kernel for all GPUs, with few query rows and with many; None: on the one for its own."""
    why = _general(call)
    return (why or hopper.few_rows(1), why)


def _general(call: Call) -> str | None:
    device = call.query.device
    masked = call.q_bounds is not None or call.visible is not None or call.attn_mask is not None
    return hopper.reason(
        _chip_name(device.type, device.index or 0),
        call.precision,
        call.query.dtype,
        (call.query.shape[3], call.value_dim),
        call.block_size[0],
        (call.kv_num_blocks, call.kv_indices),
        packed=call.key is None,
        window=call.window is not None,
        irregular=masked,
        scores_changed=call.softcap is not None or call.sink_logits is not None,
        scale=call.scale,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chip_name(kind: str, index: int) -> str:
    return chips.of(torch.device(kind, index)).name


def target(device: torch.device) -> str | None:
    """The architecture in use."""
    return chips.of(device).name


def formats(precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
    """Number formats of the two products."""
    name = str(dtype).removeprefix("torch.")
    if precision == "full":
        both = (name, name)
    elif precision == "fp8":
        both = ("int8", str(chips.of(device).fp8).removeprefix("torch."))
    else:
        both = ("int8", "bfloat16 x int8" if packed else "float16" if dtype == torch.float16 else "bfloat16")
    return Formats(both, both)
