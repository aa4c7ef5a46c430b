"""The triton backend without a GPU and without its interpreter: refusals, settings, machine code, signatures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tamis
from tamis.backends.triton import chips, launch, prepare, settings
from tamis.bench import gpu_forms, gpu_static
from tamis.call import per_head


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("sm_80", {"precision": "fp8"}, "sm_89 or newer"),
        ("sm_100", {"precision": "int8"}, r"Triton 3\.9"),
        ("sm_90", {"dim": 300}, "head dims up to 256"),
    ],
)
def test_what_a_gpu_lacks(name: str, options: dict[str, Any], match: str) -> None:
    q = torch.randn(1, 2, 100, options.pop("dim", 64), dtype=torch.bfloat16)
    with chips.assume(name), launch.note() as launches, pytest.raises(tamis.UnsupportedError, match=match):
        tamis.attend(q, q, q, backend="triton", **options)
    assert not launches


@pytest.mark.parametrize("name", gpu_static.architectures())
def test_tiles_fit_blocks(name: str) -> None:
    chip = chips.CHIPS[name]
    for kind in ("half", "int8", "packed", "fp32", "mend", *(["fp8"] if chip.fp8 else [])):
        for dim in (16, 64, 128, 256):
            for block_q in (64, 128):
                for block_kv in (64, 128):
                    for q_len in (1, 16, 17, 5000):
                        for rest in itertools.product((True, False), repeat=3):
                            given = dict(zip(("regular", "window", "skips"), rest, strict=True))
                            cut = settings.tiles(chip, kind, dim, dim, block_q, block_kv, q_len, **given)
                            assert block_q % cut.rows == 0
                            assert block_kv % cut.keys == 0
                            assert cut.warps in (4, 8)


def signature(item: launch.Launch) -> Any:
    """All that decides which machine code runs."""
    forms = gpu_forms.forms(item)
    return item.kernel.fn.__name__, forms, sorted(item.constants.items()), item.warps, item.stages


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_lengths_compile_nothing_anew(precision: str) -> None:
    """Whatever the length: 1000 and 1024 differ in what divides them, 1 in being 1."""

    def launched(q_len: int, kv_len: int) -> list[Any]:
        q = torch.randn(1, 4, q_len, 64, dtype=torch.bfloat16)
        k = torch.randn(1, 2, kv_len, 64, dtype=torch.bfloat16)
        with chips.assume("sm_90"), launch.note() as launches:
            tamis.sparse_attention(q, k, k, is_causal=True, enable_gqa=True, precision=precision, backend="triton")
        return [signature(item) for item in launches]

    expected = launched(1000, 1000)
    for length in (333, 1024, 2047, 4608):
        assert launched(length, length) == expected
    # Rows of more than 256 scores are chosen from by more threads.
    longer = [(ours, theirs) for ours, theirs in zip(launched(20000, 20000), expected, strict=True) if ours != theirs]
    assert [ours[0] for ours, _ in longer] == ["choose_kernel"]


def attention(name: str, kind: str, dim: int) -> launch.Launch:
    """The first pass of a usual call."""
    launches = gpu_forms.attention(name, gpu_forms.usual(kind, dim))
    return next(item for item in launches if "FLAG_ROWS" in item.constants)


def gluon(kind: str, dim: int, **parts: str) -> launch.Launch:
    """The kernel made for sm_90 in a usual call but for the parts given."""
    launches = gpu_forms.gluon(gpu_forms.usual(kind, dim, gluon=True) | parts)
    return next(item for item in launches if "SPLIT" in item.constants)


@pytest.mark.parametrize(("name", "precision"), [("sm_80", "int8"), ("sm_90", "fp8"), ("gfx942", "full")])
def test_machine_code_is_judged(name: str, precision: str) -> None:
    """One kernel of each maker compiles, spills nothing and has its matrix instructions (`make gpu-static`: all)."""
    kinds = {"full": {"half"}, "int8": {"int8", "half"}, "fp8": {"int8", "fp8"}}[precision]
    row = gpu_static.judge(attention(name, precision, 64), name, "", kinds)
    assert row.faults == []
    assert row.registers > 0
    assert set(row.instructions) >= kinds


EVERYTHING = {"keys": "128 keys", "sight": "all masks", "stage 2": "stage 2"}


@pytest.mark.parametrize(
    ("kind", "dim", "parts"),
    [
        ("full", 256, {"dtype": "fp32", "scores": "vast softcap"}),
        ("full", 128, {"dtype": "fp32", "scores": "softcap"}),
        ("int8", 128, {"scores": "softcap"}),
    ],
    ids=str,
)
def test_masks_at_once_spill_nothing(kind: str, dim: int, parts: dict[str, str]) -> None:
    """Pieces of fp32 queries stay out of the registers until they are multiplied, and tiles are small."""
    row = gpu_forms.usual(kind, dim) | EVERYTHING | parts
    item = next(item for item in gpu_forms.attention("sm_90", row) if item.constants.get("FLAG_ROWS") == 0)
    assert gpu_static.judge(item, "sm_90", "", set()).faults == []


@pytest.mark.parametrize("dim", [64, 128])
def test_under_windows_products_are_not_serialised(dim: int) -> None:
    """In 8 bits on sm_90, where the run of whole blocks would go on with the sums of the edge before it."""
    item = next(
        item
        for item in gpu_forms.attention("sm_90", gpu_forms.usual("int8", dim) | {"sight": "causal window"})
        if item.constants.get("FLAG_ROWS") == 0
    )
    assert gpu_static.judge(item, "sm_90", "", {"int8", "half"}).faults == []


@pytest.mark.parametrize("rows", ["", "64 rows"])
@pytest.mark.parametrize("dim", gpu_forms.DIMS)
def test_products_may_be_left_out_on_sm_100(dim: int, rows: str) -> None:
    """There Triton 3.6 fails where a scalar that was reduced from a tile's rows decides about one, unless helped."""
    row = gpu_forms.usual("full", dim) | {"rows": rows, "stage 2": "stage 2"}
    item = next(item for item in gpu_forms.attention("sm_100", row) if item.constants.get("FLAG_ROWS") == 0)
    assert item.constants["TILE_Q"] >= 64
    assert gpu_static.judge(item, "sm_100", "", {"half"}).faults == []


@pytest.mark.parametrize(("start", "stop", "copied"), [(0, 64, False), (1, 65, True), (0, 41, True), (0, 40, True)])
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_keys_and_values_are_loaded_by_16_bytes(precision: str, start: int, stop: int, copied: bool) -> None:
    """What can't be is copied into longer rows: 40 is a multiple of 8, and of strides Triton sees multiples of 16."""
    query, key, value = (torch.zeros(1, n, 250, stop, dtype=torch.bfloat16)[..., start:stop] for n in (4, 2, 2))
    with chips.assume("sm_80"), launch.note() as launches:
        tamis.attend(query, key, value, backend="triton", precision=precision)
    item = next(item for item in launches if "FLAG_ROWS" in item.constants)
    for given, x in zip((key, value), item.arguments[1:3], strict=True):
        assert x.data_ptr() % 16 == 0
        assert all(stride % 16 == 0 for stride in x.stride()[:3])
        assert x.shape[3] == 64
        if given is value or precision == "full":
            assert (x.data_ptr() != given.data_ptr()) == copied
    assert (item.constants["K_EVEN"], item.constants["V_EVEN"]) == (True, True)


def test_packing_wide_values_spills_nothing() -> None:
    """Where rows are no multiples of 16 bytes, four warps had too few registers on sm_120."""
    value = torch.zeros(1, 2, 250, 233, dtype=torch.bfloat16)
    with chips.assume("sm_120"), launch.note() as launches:
        prepare.pack_kv(value, value, value[:, :, 0].float(), torch.zeros(1, 250, dtype=torch.int64))
    item = next(item for item in launches if item.kernel.fn.__name__ == "value_int8_kernel")
    assert gpu_static.judge(item, "sm_120", "", set()).faults == []


def test_a_kernel_that_others_compiled_is_judged() -> None:
    """Triton's cache then has no log of the assembler; a process of its own would not find one either."""
    import triton

    item = gpu_forms.attention("sm_80", gpu_forms.usual("int8", 64))[0]
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_static, "_keep_log", lambda *_: None)
            patch.setattr(gpu_static, "_has_log", lambda made: True)
            assert not hasattr(gpu_static.compile_launch(item, "sm_80").metadata, "assembler_log")
    assert gpu_static.judge(item, "sm_80", "", set()).registers > 0


def test_the_kernel_made_for_hopper_is_judged() -> None:
    """Warps of copies hand their registers on, products are those of warpgroups; with larger tiles it spills."""
    row = gpu_static.judge(gluon("fp8", 64), "sm_90", "", {"int8", "fp8"})
    assert row.faults == []
    assert row.tile == "128 x 64"
    assert set(row.instructions) == {"int8", "fp8"}
    wide = gluon("fp8", 192, sight="plain", lists="no lists")
    mutant = wide._replace(constants=wide.constants | {"DV": 256, "VALUE_DIM": 256})
    assert "bytes of spills" in " ".join(gpu_static.judge(mutant, "sm_90", "", {"int8", "fp8"}).faults)


def test_older_instructions_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the judge wants of the kernel made for sm_90, shown machine code that has none of it."""
    item = gluon("int8", 64, sight="plain", lists="no lists")
    monkeypatch.setattr(
        gpu_static, "compile_launch", lambda item, name: SimpleNamespace(metadata=SimpleNamespace(shared=0))
    )
    monkeypatch.setattr(gpu_static, "_nvidia", lambda made, row: "IGMMA.64x64x32 ; HMMA.16816.F32.BF16 ;")
    faults = gpu_static.judge(item, "sm_90", "", {"int8", "half"}).faults
    assert faults == ["older matrix instructions: HMMA", "registers are not handed on", "no half matrix instructions"]


def test_the_judge_finds_faults() -> None:
    """Tiles that spill, memory that does not fit, products that are not there, and code that is none."""
    item = attention("sm_90", "full", 256)
    large = item._replace(constants=item.constants | {"TILE_Q": 128, "TILE_K": 64}, warps=4, stages=4)
    faults = " ".join(gpu_static.judge(large, "sm_90", "", {"fp8"}).faults)
    assert "bytes of spills" in faults
    assert "bytes of shared memory" in faults
    assert "no fp8 matrix instructions" in faults
    broken = item._replace(constants=item.constants | {"TILE_Q": 3})
    assert "does not compile" in gpu_static.judge(broken, "sm_90", "", set()).faults[0]


def test_the_table_shows_everything() -> None:
    row = gpu_static.Row("sm_90", "attend_kernel", "int8 d=64 causal", "128 x 64", 4, 3, 200, 0, 1024, {"int8": 8}, [])
    shown = gpu_static.table([row, dataclasses.replace(row, faults=["spills"])])
    assert "int8:8" in shown
    assert shown.count("FAILS") == 1


def test_the_page_shows_the_committed_result() -> None:
    """What docs/performance-gpu.md says of the machine code is what was saved, and nothing there had a fault."""
    root = Path(__file__).parents[1]
    saved = json.loads((root / "benchmarks" / "results" / "gpu-static.json").read_text(encoding="utf-8"))
    assert gpu_static.markdown(saved) in (root / "docs" / "performance-gpu.md").read_text(encoding="utf-8")
    assert [row for row in saved["rows"] if row["faults"]] == []
    assert {row["target"] for row in saved["rows"]} == set(gpu_static.architectures())


def test_settings_reach_a_device_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host waits for the device, and forbids capturing a graph."""
    query = torch.randn(1, 4, 256, 64, dtype=torch.bfloat16)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made on the host and would be copied")

    with chips.assume("sm_90"), launch.note() as launches:
        tamis.sparse_attention(query, query, query, is_causal=True, backend="triton")
        monkeypatch.setattr(torch, "tensor", refuse)
        monkeypatch.setattr(torch, "as_tensor", refuse)
        tamis.sparse_attention(query, query, query, is_causal=True, backend="triton")
    assert len(launches) > 4
    monkeypatch.undo()
    meta = torch.device("meta")  # as a GPU: values go there once
    assert per_head([1.0, 2.0], 2, "cdf", meta) is per_head((1.0, 2.0), 2, "cdf", meta)
    assert per_head([1.0, 3.0], 2, "cdf", meta) is not per_head((1.0, 2.0), 2, "cdf", meta)


def test_newer_versions_ask_the_hook_for_its_name() -> None:
    """Without arguments, for a key and a hash; and again with the stages."""
    asked = gpu_static._keep_log()
    assert len(asked) == 2
    assert gpu_static._keep_log(None, {}) == asked
