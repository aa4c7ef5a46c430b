"""The kernel made for sm_90 without a GPU: which calls go to it, what it is handed, and the names of its language.

Its arithmetic and its barriers run in test_hopper.py; its machine code is judged in test_triton_static.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import block_mask
from torch import Tensor

import tamis
from tamis.backends.triton import chips, hopper, launch


def launched(name: str = "sm_90", q_len: int = 150, dim: int = 64, dtype: Any = torch.bfloat16, **options: Any) -> Any:
    """The kernels that a call would start, and its stats."""
    q = torch.randn(1, 4, q_len, dim, dtype=dtype)
    k = torch.randn(1, 2, 200, dim, dtype=dtype)
    if options.pop("packed", False):
        k = tamis.pack_kv(k, k)
    v = None if isinstance(k, tamis.PackedKV) else k
    with chips.assume(name), launch.note() as launches:
        stats = tamis.attend(q, k, v, backend="triton", **options).stats
    return [item.kernel.fn.__name__ for item in launches], stats


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_plain_calls_go_to_it(precision: str, causal: bool) -> None:
    names, stats = launched(precision=precision, causal=causal)
    assert "hopper_kernel" in names
    assert stats.kernel_reason is None
    mends = causal and precision != "fp8"
    assert names.count("attend_kernel") == names.count("sound_values_kernel") == int(mends)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "sm_80"}, "this GPU is sm_80"),
        ({"name": "sm_100"}, "this GPU is sm_100"),
        ({"q_len": 31}, "32 query rows or more"),
        ({"dtype": torch.float32}, "fp32 products"),
        ({"window": 50}, "windows"),
        ({"softcap": 20.0}, "softcap"),
        ({"sink_logits": torch.zeros(4)}, "sinks"),
        ({"scale": -1.0}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"attn_mask": torch.ones(150, 200, dtype=torch.bool)}, "masks"),
        ({"positions": (torch.arange(150), torch.arange(200)), "causal": True}, "positions"),
        ({"segments": (torch.zeros(150).long(), torch.zeros(200).long())}, "segments"),
        ({"packed": True, "precision": "int8"}, "PackedKV"),
        ({"dim": 256, "precision": "fp8"}, "256 channels in 'fp8'"),
    ],
    ids=str,
)
def test_others_do_not_and_say_why(options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAMIS_GPU_KERNEL", raising=False)
    names, stats = launched(**options)
    assert "hopper_kernel" not in names
    assert "attend_kernel" in names
    assert why in stats.kernel_reason
    monkeypatch.setenv("TAMIS_GPU_KERNEL", "gluon")
    with pytest.raises(tamis.UnsupportedError, match=r"TAMIS_GPU_KERNEL=gluon, and the Gluon kernel"):
        launched(**options)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIS_GPU_KERNEL", "triton")
    names, stats = launched()
    assert "hopper_kernel" not in names
    assert stats.kernel_reason == "TAMIS_GPU_KERNEL=triton"
    monkeypatch.setenv("TAMIS_GPU_KERNEL", "gluon")
    assert "hopper_kernel" in launched()[0]
    monkeypatch.setenv("TAMIS_GPU_KERNEL", "gloun")
    with pytest.raises(ValueError, match="auto, gluon, triton, got 'gloun'"):
        launched()


def test_other_backends_have_no_other_kernel() -> None:
    q = torch.randn(1, 1, 40, 8)
    stats = tamis.attend(q, q, q, backend="reference").stats
    assert stats is not None
    assert stats.kernel_reason is None


DIMS = (1, 40, 64, 80, 96, 128, 129, 192, 200, 256)


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_tiles_fit_shared_memory(precision: str) -> None:
    """Rings of two places at least, heads held whole, and nothing refused but wide values in e4m3."""
    for dim, value_dim, rows in itertools.product(DIMS, DIMS, (64, 128)):
        cut = hopper.cut(precision, dim, value_dim, rows)
        assert (cut is None) == (precision == "fp8" and value_dim > 192)
        if cut is None:
            continue
        assert cut.dim >= dim
        assert cut.value_dim >= value_dim
        bytes_of = (2, 2) if precision == "full" else (1, 2 if precision == "int8" else 1)
        rings = 2 if rows == 64 else 1
        ring = rings * cut.stages * cut.keys * (cut.dim * bytes_of[0] + cut.value_dim * bytes_of[1])
        assert 2 <= cut.stages <= 4
        assert ring + 128 * cut.dim * bytes_of[0] < chips.CHIPS["sm_90"].shared


def strided(x: Tensor, *shape: int, stride: tuple[int, ...]) -> Tensor:
    return x.as_strided(shape, stride)


def test_what_the_copy_engine_cannot_read_is_copied() -> None:
    base = torch.randn(4096).to(torch.bfloat16)
    readable = [
        strided(base, 2, 2, 5, 16, stride=(160, 16, 32, 1)),  # tokens before heads
        strided(base, 1, 2, 5, 20, stride=(7, 120, 24, 1)),  # strides of dims of one entry mean nothing
    ]
    for x in readable:
        assert hopper._aligned(x).data_ptr() == x.data_ptr()
    unreadable = [
        strided(base, 1, 2, 5, 20, stride=(7, 100, 20, 1)),  # rows of 40 bytes
        strided(base, 2, 2, 5, 16, stride=(0, 80, 16, 1)),  # expanded
        strided(base, 1, 2, 16, 5, stride=(160, 80, 1, 16)),  # transposed
        strided(base[1:], 1, 2, 5, 16, stride=(160, 80, 16, 1)),  # starts inside of 16 bytes
    ]
    for x in unreadable:
        copy = hopper._aligned(x)
        assert torch.equal(copy, x)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride(-1) == 1
        assert all(step > 0 and step * 2 % 16 == 0 for step in copy.stride()[:-1])


def test_sections_hold_whole_groups() -> None:
    """Heads that share keys are worked on together, and at most as many as the cache holds keys of."""
    k = torch.empty(2, 4, 32768, 128, dtype=torch.int8, device="meta")
    assert hopper._section(k, k, heads=16, batch=2) == 4 * 4  # 8 MB for a key head, 4 query heads each
    assert hopper._section(k[:, :, :100], k[:, :, :100], heads=16, batch=2) == 32
    longer = torch.empty(1, 4, 2**20, 128, dtype=torch.int8, device="meta")
    assert hopper._section(longer, longer, heads=16, batch=1) == 4


def test_lists_of_any_size() -> None:
    mask = block_mask((150, 200), heads=4)
    assert hopper.list_bits((None, None)) == 0
    assert hopper.list_bits((mask.kv_num_blocks, mask.kv_indices)) == 32
    large = torch.empty(2, 2**15, 2**8, 2**8, dtype=torch.int32, device="meta")
    assert hopper.list_bits((large[..., 0], large)) == 64


def test_vast_lists_of_wide_values_have_no_registers() -> None:
    """Of e4m3, over 128 channels, with a list for each warpgroup; all else takes lists of any size."""
    large = torch.empty(2, 2**15, 2**8, 2**8, dtype=torch.int32, device="meta")
    others = dict.fromkeys(("packed", "window", "irregular", "scores_changed"), False)
    for precision, dim, rows in itertools.product(("full", "int8", "fp8"), (64, 128, 129, 192), (64, 128)):
        for lists, vast in (((large[..., 0], large), True), ((large[0, :2, :2, 0], large[:1, :2, :2]), False)):
            why = hopper.reason("sm_90", precision, torch.bfloat16, (dim, dim), rows, lists, scale=1.0, **others)
            lacking = vast and precision == "fp8" and dim > 128 and rows == 64
            assert why == (
                f"the Gluon kernel has no registers for values of {dim} channels and lists of 2^31 entries in 'fp8'"
                if lacking
                else None
            )


def test_graphs_are_made_of_lists_of_unknown_size() -> None:
    """`torch.export` with a length that varies: the size of a list is then no number."""

    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            indices = torch.nonzero(x)
            others = dict.fromkeys(("packed", "window", "irregular", "scores_changed"), False)
            lists = indices[:, 0], indices
            why = hopper.reason("sm_90", "fp8", torch.bfloat16, (192, 192), 64, lists, scale=1.0, **others)
            return x + (1 if why is None else 2)

    length = torch.export.Dim("length", min=2, max=2**40)
    for strict in (False, True):
        program = torch.export.export(Asks(), (torch.ones(9),), dynamic_shapes=({0: length},), strict=strict).module()
        assert torch.equal(program(torch.ones(5)), torch.full((5,), 2.0))


def test_programs() -> None:
    assert hopper.programs(torch.device("cpu"), 7) == 7
    assert hopper.programs(torch.device("cpu"), 10**6) == 132


OLD: dict[str, Any] = {"tma": SimpleNamespace(async_copy_global_to_shared="copy")}
NEW: dict[str, Any] = {"tma": SimpleNamespace(async_load="load")}
SAME = {"mbarrier": "barriers", "warpgroup_mma": "mma", "warpgroup_mma_wait": "wait", "fence_async_shared": "fence"}


@pytest.mark.parametrize(("module", "name"), [(OLD, "copy"), (NEW, "load")], ids=["3.6", "3.9"])
def test_names_of_gluon_versions(module: dict[str, Any], name: str) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from tamis.backends.triton.kernels import gluon_api

    found = gluon_api.resolve(SimpleNamespace(**module, **SAME))
    assert found == {"load_tile": name, **SAME}
    with pytest.raises(ImportError, match="none of warpgroup_mma;"):
        gluon_api.resolve(SimpleNamespace(**module, mbarrier="barriers", fence_async_shared="fence"))
