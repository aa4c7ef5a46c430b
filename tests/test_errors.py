"""Bad input: the type of the error, and that the message names the argument, so that nobody has to read our code."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import Engine, engines
from samples import block_mask, qkv
from torch import Tensor

import tamis


def attend(**changes: Any) -> Callable[[], Any]:
    """A call of attend that would be fine without the changes."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=130)
    return lambda: tamis.attend(**({"query": q, "key": k, "value": v} | changes))


def predict(predictor: Any = None, **changes: Any) -> Callable[[], Any]:
    q, k, _ = qkv(heads=4, kv_heads=2, q_len=70, kv_len=130)
    return lambda: (predictor or tamis.Sparge())(**({"query": q, "key": k} | changes))


def sparse(**changes: Any) -> Callable[[], Any]:
    q, k, v = qkv(q_len=70)
    return lambda: tamis.sparse_attention(**({"query": q, "key": k, "value": v} | changes))


def positions(q: Any, kv: Any) -> tuple[Any, Any]:
    return (q, kv)


MASK = block_mask((70, 130))
META = torch.randn(1, 2, 130, 32, device="meta")
META_MASK = tamis.BlockMask(MASK.kv_num_blocks.to("meta"), MASK.kv_indices.to("meta"), MASK.block_size, MASK.seq_lens)

VALUE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "heads that do not divide": (
        attend(key=torch.randn(1, 3, 130, 32), value=torch.randn(1, 3, 130, 32)),
        r"key has 3 heads.*query 4",
    ),
    "more key heads than query heads": (
        attend(key=torch.randn(1, 8, 130, 32), value=torch.randn(1, 8, 130, 32)),
        r"key has 8 heads.*query 4",
    ),
    "head_dim": (attend(key=torch.randn(1, 2, 130, 16)), r"head_dim 16.*query 32"),
    "value length": (attend(value=torch.randn(1, 2, 129, 32)), r"value.*129.*130"),
    "value heads": (attend(value=torch.randn(1, 1, 130, 32)), "value"),
    "batch": (attend(key=torch.randn(3, 2, 130, 32), value=torch.randn(3, 2, 130, 32)), "key.*batch 3"),
    "value batch": (attend(value=torch.randn(3, 2, 130, 32)), "value.*batch 3"),
    "devices": (attend(key=META, value=META), "key is on meta"),
    "value device": (attend(value=META), "value is on meta"),
    "number of dims": (attend(key=torch.randn(2, 130, 32)), "key"),
    "one dim": (attend(query=torch.randn(32)), "query"),
    "mask of another length": (attend(block_mask=block_mask((70, 200))), r"block_mask.*\(70, 200\).*\(70, 130\)"),
    "mask of another q_len": (attend(block_mask=block_mask((300, 130))), "block_mask"),
    "mask of another batch": (attend(block_mask=block_mask((70, 130), batch=2)), "block_mask.*batch"),
    "mask with key heads": (attend(block_mask=block_mask((70, 130), heads=2)), "block_mask.*heads"),
    "attn_mask that does not broadcast": (attend(attn_mask=torch.ones(70, 129, dtype=torch.bool)), r"attn_mask.*129"),
    "attn_mask with too many dims": (attend(attn_mask=torch.ones(1, 1, 1, 70, 130, dtype=torch.bool)), "attn_mask"),
    "attn_mask device": (attend(attn_mask=torch.ones(70, 130, dtype=torch.bool, device="meta")), "attn_mask.*meta"),
    "window 0": (attend(window=0), "window"),
    "negative window": (attend(window=-3), "window"),
    "scale nan": (attend(scale=float("nan")), "scale"),
    "scale inf": (attend(scale=float("inf")), "scale"),
    "softcap 0": (attend(softcap=0.0), "softcap"),
    "negative softcap": (attend(softcap=-1.0), "softcap"),
    "sinks of key heads": (attend(sink_logits=torch.randn(2)), r"sink_logits.*4"),
    "sinks with dims": (attend(sink_logits=torch.randn(1, 4)), "sink_logits"),
    "precision": (attend(precision="int4"), "precision.*int4"),
    "backend": (attend(backend="cuda"), "backend.*cuda"),
    "pv_threshold 0": (attend(pv_threshold=0.0), "pv_threshold"),
    "pv_threshold per key head": (attend(pv_threshold=[1.0, 1.0]), "pv_threshold"),
    "compensate": (attend(compensate="magic"), "compensate.*magic"),
    "position length": (attend(positions=positions(torch.arange(71), torch.arange(130))), r"positions.*70"),
    "segment batch": (attend(segments=positions(torch.zeros(3, 70).long(), torch.zeros(3, 130).long())), "segments"),
    "positions on another device": (
        attend(positions=positions(torch.arange(70, device="meta"), torch.arange(130))),
        "positions.*meta",
    ),
    "value given with None": (
        lambda: tamis.attend(*qkv()[:1], tamis.pack_kv(*qkv()[1:]), qkv()[2], precision="int8"),
        "value",
    ),
    "dropout": (sparse(dropout_p=0.1), "dropout_p.*0.1"),
    "is_causal and attn_mask": (
        sparse(is_causal=True, attn_mask=torch.ones(70, 70, dtype=torch.bool)),
        "attn_mask.*is_causal",
    ),
    "gqa not enabled": (sparse(query=torch.randn(1, 4, 70, 32)), "enable_gqa"),
    "cdf 0": (lambda: tamis.Sparge(cdf=0.0), "cdf"),
    "cdf above 1": (lambda: tamis.Sparge(cdf=1.5), "cdf"),
    "topk 0": (lambda: tamis.Sparge(topk=0.0), "topk"),
    "topk nan": (lambda: tamis.Sparge(topk=float("nan")), "topk"),
    "similarity 1": (lambda: tamis.Sparge(similarity=1.0), "similarity"),
    "one bad head": (lambda: tamis.Sparge(cdf=[0.5, 2.0]), "cdf.*2.0"),
    "settings for other heads": (predict(tamis.Sparge(cdf=[0.5, 0.5])), "cdf.*4"),
    "block_size": (predict(block_size=(32, 64)), "block_size"),
    "keep": (lambda: tamis.Sparge(keep={"key": [(0, 5)]}), "keep"),
    "keep range": (lambda: tamis.Sparge(keep={"keys": [(0, 5, 7)]}), "keep"),  # type: ignore[list-item]
    "window predictor": (lambda: tamis.Window(0), "size"),
    "window predictor's sink": (lambda: tamis.Window(64, sink=-1), "sink"),
    "predicting with other heads": (predict(key=torch.randn(1, 3, 130, 32)), "key has 3 heads"),
    "packing precision": (lambda: tamis.pack_kv(*qkv()[1:], precision="int4"), "precision.*int4"),
    "head_dim 0": (attend(query=torch.randn(1, 4, 70, 0), key=torch.randn(1, 2, 130, 0)), "head"),
    "block_mask device": (attend(block_mask=META_MASK), "block_mask.*meta"),
    "sinks on another device": (attend(sink_logits=torch.randn(4, device="meta")), "sink_logits.*meta"),
    "dense table of one dim": (lambda: tamis.BlockMask.from_dense(torch.ones(4, dtype=torch.bool)), "dense"),
    "merging nothing": (lambda: tamis.merge([], []), "outputs"),
    "merging unequal lists": (lambda: tamis.merge([torch.randn(1, 1, 3, 4)], []), "lses"),
    "sdpa with one dim": (lambda: tamis.sparse_attention(*(torch.randn(8),) * 3, is_causal=True), r"query.*\(8,\)"),
    "sdpa key with one dim": (sparse(key=torch.randn(8), is_causal=True), r"key.*\(8,\)"),
    "one block_size": (predict(block_size=64), "block_size"),
    "whole float block_size": (predict(block_size=(64.0, 128)), "block_size"),
    "float block_size": (predict(block_size=(64.5, 128)), "block_size"),
    "packing unequal batches": (
        lambda: tamis.pack_kv(torch.randn(1, 2, 9, 32), torch.randn(3, 2, 9, 32)),
        "value has batch 3 and key 1",
    ),
    "packing unequal dims": (lambda: tamis.pack_kv(torch.randn(1, 2, 9, 32), torch.randn(2, 9, 32)), "value.*key 4"),
    "packing devices": (lambda: tamis.pack_kv(META, META.new_empty(1, 2, 130, 32, device="cpu")), "value.*key on meta"),
    "packing no head_dim": (lambda: tamis.pack_kv(torch.randn(1, 2, 9, 0), torch.randn(1, 2, 9, 8)), "key has 0"),
    "packing one dim": (lambda: tamis.pack_kv(torch.randn(8), torch.randn(8)), r"key.*\(8,\)"),
    "three seq_lens": (
        lambda: tamis.BlockMask(MASK.kv_num_blocks, MASK.kv_indices, (128, 64), (70, 130, 1)),  # type: ignore[arg-type]
        "seq_lens.*130, 1",
    ),
    "negative seq_lens": (
        lambda: tamis.BlockMask(MASK.kv_num_blocks, MASK.kv_indices, (128, 64), (70, -130)),
        "seq_lens.*-130",
    ),
    "from_dense with one length": (
        lambda: tamis.BlockMask.from_dense(MASK.to_dense(), seq_lens=(70,)),  # type: ignore[arg-type]
        "seq_lens",
    ),
    "keep end above the integers": (lambda: tamis.Sparge(keep={"keys": [(0, 2**70)]}), "keep: keys"),
    "keep end below the integers": (lambda: tamis.Sparge(keep={"queries": [(-(2**70), None)]}), "keep: queries"),
    "keep with a number as a name": (lambda: tamis.Sparge(keep={1: [], "a": []}), "keep"),  # type: ignore[dict-item]
    "no cdf in a list": (lambda: tamis.Sparge(cdf=[]), "cdf"),
    "no similarity in a tensor": (lambda: tamis.Sparge(similarity=torch.ones(0)), "similarity"),
    "window predictor's size above the integers": (lambda: tamis.Window(2**70), "size"),
    "window predictor's sink above the integers": (lambda: tamis.Window(1, sink=2**70), "sink"),
    "merging other shapes": (
        lambda: tamis.merge([torch.randn(1, 1, 3, 4)] * 2, [torch.randn(1, 1, 3), torch.randn(1, 1, 4)]),
        "lses",
    ),
}

TYPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "integer query": (attend(query=torch.ones(1, 4, 70, 32, dtype=torch.int64)), "query.*int64"),
    "integer key": (attend(key=torch.ones(1, 2, 130, 32, dtype=torch.int8)), "key.*int8"),
    "integer everything": (lambda: tamis.attend(*(torch.ones(1, 1, 4, 4, dtype=torch.int32),) * 3), "query.*int32"),
    "double": (lambda: tamis.attend(*(torch.ones(1, 1, 4, 4, dtype=torch.float64),) * 3), "query.*float64"),
    "complex": (lambda: tamis.attend(*(torch.ones(1, 1, 4, 4, dtype=torch.complex64),) * 3), "query.*complex64"),
    "mixed dtypes": (attend(key=torch.randn(1, 2, 130, 32).bfloat16()), "key.*bfloat16.*query"),
    "value dtype": (attend(value=torch.randn(1, 2, 130, 32).half()), "value.*float16"),
    "not a tensor": (attend(query=[[1.0]]), "query.*list"),
    "key None": (attend(key=None), "key"),
    "value None": (attend(value=None), "value"),
    "a dense table as block_mask": (attend(block_mask=MASK.to_dense()), "block_mask"),
    "integer attn_mask": (attend(attn_mask=torch.ones(70, 130, dtype=torch.int64)), "attn_mask.*int64"),
    "attn_mask list": (attend(attn_mask=[[True]]), "attn_mask"),
    "float positions": (attend(positions=positions(torch.arange(70.0), torch.arange(130))), "positions"),
    "bool segments": (attend(segments=positions(torch.ones(70).bool(), torch.ones(130).bool())), "segments"),
    "one tensor of positions": (attend(positions=torch.arange(70)), "positions"),
    "float window": (attend(window=64.0), "window"),
    "causal as a number": (attend(causal=1), "causal"),
    "scale as a string": (attend(scale="1"), "scale"),
    "integer sinks": (attend(sink_logits=torch.ones(4, dtype=torch.int64)), "sink_logits"),
    "predictor": (sparse(predictor="sparge"), "predictor"),
    "cdf as a string": (lambda: tamis.Sparge(cdf="most"), "cdf"),  # type: ignore[arg-type]
    "sink as a number": (lambda: tamis.Sparge(sink=1), "sink"),  # type: ignore[arg-type]
    "sdpa query list": (sparse(query=[1]), "query.*list"),
    "sdpa key None": (sparse(key=None), "key.*None"),
    "sdpa value None": (sparse(value=None), "value.*None"),
    "sdpa packed key": (sparse(key=tamis.pack_kv(*qkv()[1:]), value=None), "key.*PackedKV"),
    "is_causal as a number": (sparse(is_causal=1), "is_causal.*int"),
    "sparse query": (attend(query=torch.randn(1, 4, 70, 32).to_sparse()), "query.*strided"),
    "sparse key": (attend(key=torch.randn(1, 2, 130, 32).to_sparse()), "key.*strided"),
    "sparse value": (attend(value=torch.randn(1, 2, 130, 32).to_sparse()), "value.*strided"),
    "sparse attn_mask": (attend(attn_mask=torch.randn(70, 130).to_sparse()), "attn_mask.*strided"),
    "sparse sinks": (attend(sink_logits=torch.randn(4).to_sparse()), "sink_logits.*strided"),
    "sdpa sparse value": (sparse(value=torch.randn(1, 2, 70, 32).to_sparse()), "value.*strided"),
    "sdpa sparse attn_mask": (sparse(attn_mask=torch.randn(70, 70).to_sparse()), "attn_mask.*strided"),
    "sparse predicted": (predict(key=torch.randn(1, 2, 130, 32).to_sparse()), "key.*strided"),
    "packing sparse": (
        lambda: tamis.pack_kv(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8).to_sparse()),
        "value.*strided",
    ),
    "predicting None": (predict(query=None), "query.*None"),
    "predicting without keys": (predict(key=None), "key.*None"),
    "window predictor of a string": (predict(tamis.Window(3), key="x"), "key.*str"),
    "predicting for a pack": (predict(key=tamis.pack_kv(*qkv()[1:])), "key.*PackedKV"),
    "packing no value": (lambda: tamis.pack_kv(qkv()[1], None), "value.*None"),  # type: ignore[arg-type]
    "packing no key": (lambda: tamis.pack_kv(None, qkv()[2]), "key.*None"),  # type: ignore[arg-type]
    "packing integers": (lambda: tamis.pack_kv(*(torch.ones(1, 1, 4, 4, dtype=torch.int32),) * 2), "key.*int32"),
    "packing other dtypes": (lambda: tamis.pack_kv(qkv()[1], qkv()[2].half()), "value.*float16 and key"),
    "one length": (
        lambda: tamis.BlockMask(MASK.kv_num_blocks, MASK.kv_indices, (128, 64), seq_lens=100),  # type: ignore[arg-type]
        "seq_lens.*int",
    ),
    "a string as a length": (
        lambda: tamis.BlockMask(MASK.kv_num_blocks, MASK.kv_indices, (128, 64), ("a", 1)),  # type: ignore[arg-type]
        "seq_lens.*'a'",
    ),
    "float lengths": (
        lambda: tamis.BlockMask(MASK.kv_num_blocks, MASK.kv_indices, (128, 64), (100.0, 100.0)),  # type: ignore[arg-type]
        "seq_lens.*100.0",
    ),
    "from_dense with float lengths": (
        lambda: tamis.BlockMask.from_dense(MASK.to_dense(), seq_lens=(70.0, 130)),  # type: ignore[arg-type]
        "seq_lens.*70.0",
    ),
    "keep of a number": (lambda: tamis.Sparge(keep={"keys": [3]}), "keep: keys.*3"),  # type: ignore[list-item]
    "keep without a list": (lambda: tamis.Sparge(keep={"keys": 3}), "keep: keys.*int"),  # type: ignore[dict-item]
    "merging numbers": (lambda: tamis.merge(1, 2), "outputs.*int"),  # type: ignore[arg-type]
    "merging numbers for lses": (
        lambda: tamis.merge([torch.randn(1, 1, 3, 4)] * 2, [1, 2]),  # type: ignore[list-item]
        r"lses\[0\].*int",
    ),
    "merging lses that are None": (
        lambda: tamis.merge([torch.randn(1, 1, 3, 4)], None),  # type: ignore[arg-type]
        "lses.*None",
    ),
    "keep of another kind": (lambda: tamis.Sparge(keep=[(0, 5)]), "keep"),  # type: ignore[arg-type]
    "cdf of something else": (lambda: tamis.Sparge(cdf=["most"]), "cdf"),  # type: ignore[list-item]
    "window predictor's size": (lambda: tamis.Window(2.5), "size"),  # type: ignore[arg-type]
    "integer predicted": (predict(query=torch.ones(1, 4, 70, 32, dtype=torch.int64)), "query.*int64"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_errors(case: str) -> None:
    call, match = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_errors(case: str) -> None:
    call, match = TYPE_ERRORS[case]
    with pytest.raises(TypeError, match=match):
        call()


def test_the_calls_are_fine_without_the_change() -> None:
    """Else the errors above could come from anything."""
    attend(block_mask=MASK)()
    attend(block_mask=block_mask((70, 130), heads=4, block_size=(64, 128)))()
    predict()()
    sparse()()


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("function", [attend, sparse])
def test_gradients_are_never_dropped(function: Any, name: str) -> None:
    """No trainable backend: the error names the tensor and the way out; without grad mode all is well."""
    shape = {"query": (1, 4, 70, 32), "key": (1, 2, 130, 32), "value": (1, 2, 130, 32)}
    shape = dict.fromkeys(shape, (1, 2, 70, 32)) if function is sparse else shape
    call = function(**{name: torch.randn(shape[name], requires_grad=True)})
    with pytest.raises(tamis.UnsupportedError, match=rf"{name}.*(no_grad|detach)"):
        call()
    with torch.no_grad():
        call()
    with torch.inference_mode():
        call()


def test_gradients_of_a_mask_and_of_sinks() -> None:
    for options in (
        {"attn_mask": torch.randn(70, 130, requires_grad=True)},
        {"sink_logits": torch.randn(4, requires_grad=True)},
    ):
        with pytest.raises(tamis.UnsupportedError, match=next(iter(options))):
            attend(**options)()


def test_gradients_in_varlen_and_packing() -> None:
    x = torch.randn(70, 2, 32, requires_grad=True)
    offsets = torch.tensor([0, 70], dtype=torch.int32)
    with pytest.raises(tamis.UnsupportedError, match=r"no_grad|detach"):
        tamis.attend_varlen(x, x, x, offsets, offsets)
    with pytest.raises(tamis.UnsupportedError, match=r"no_grad|detach"):
        tamis.pack_kv(x[None].transpose(1, 2), x[None].transpose(1, 2))
    _, k, v = qkv()
    packed = tamis.pack_kv(k, v)
    wanting = torch.randn(1, 2, 3, 32, requires_grad=True)
    for name, new in (("key", (wanting, v[:, :, :3])), ("value", (k[:, :, :3], wanting))):
        with pytest.raises(tamis.UnsupportedError, match=rf"{name}.*(no_grad|detach)"):
            packed.append(*new)
    with torch.no_grad():
        packed.append(wanting, wanting)
    assert not any(x.requires_grad for x in (*packed.tensors, *packed._tail))


def test_predicting_needs_no_gradient() -> None:
    """A mask has none, so a predictor takes tensors that require grad."""
    q, k, _ = qkv()
    mask = tamis.Sparge()(q.requires_grad_(), k.requires_grad_())
    assert not mask.kv_indices.requires_grad


def test_every_backend_gives_its_reason() -> None:
    """fp8 is a GPU's: the error lists each backend with a reason, whether one was named or none."""
    for backend in (None, *{engine.backend for engine in engines()}):
        with pytest.raises(tamis.UnsupportedError) as caught:
            attend(precision="fp8", backend=backend)()
        for name in ("cpu", "reference"):
            assert f"{name}: " in str(caught.value)
        assert "fp8" in str(caught.value)
        assert "can serve it" not in str(caught.value)


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses even what another could serve; unnamed, the other serves it and says so."""
    q, k, v = qkv()
    for refusing, other in (("cpu", "reference"), ("reference", "cpu")):
        with monkeypatch.context() as patch:
            module = importlib.import_module(f"tamis.backends.{refusing}")
            patch.setattr(module, "reasons", lambda call: ["it is Sunday"])
            with pytest.raises(tamis.UnsupportedError, match=f"{refusing}: it is Sunday"):
                tamis.attend(q, k, v, backend=refusing)
            with pytest.raises(tamis.UnsupportedError, match=f"{refusing}: it is Sunday"):
                tamis.Sparge()(q, k, backend=refusing)
            if other in {engine.backend for engine in engines()}:
                stats = tamis.attend(q, k, v).stats
                assert stats is not None
                assert stats.backend == other


def test_the_cpu_backend_takes_cpu_tensors() -> None:
    x = torch.randn(1, 2, 130, 32, device="meta")
    with pytest.raises(tamis.UnsupportedError, match=r"cpu: .*CPU tensors"):
        tamis.attend(x, x, x, backend="cpu")


def test_large_head_dims_are_refused_or_right(engine: Engine) -> None:
    q, k, v = qkv(dim=512)
    with contextlib.suppress(tamis.UnsupportedError):
        engine.check(q, k, v)


def test_compensate_is_refused_by_name(any_engine: Engine) -> None:
    with pytest.raises(ValueError, match="compensate must be one of centroid, got 'mean'"):
        any_engine.attend(*qkv(), compensate="mean")


def test_options_are_keyword_only() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError):
        tamis.attend(q, k, v, None, True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown"):
        tamis.attend(q, k, v, unknown=1)  # type: ignore[call-arg]


def test_errors_come_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on a call that will be refused."""

    def forbidden(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("a backend ran")

    from tamis.backends import base

    monkeypatch.setattr(base, "attend", forbidden)
    for call, match in VALUE_ERRORS.values():
        with pytest.raises(ValueError, match=match):
            call()
