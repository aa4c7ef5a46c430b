"""compensate="centroid": skipped blocks enter the softmax as their mean key and value, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from remember import remember
from samples import assert_reordered, block_mask, blocks_needed, full_mask, qkv, same
from torch import Tensor

import tamis
from tamis import compensate

CENTROID = "centroid"


@remember
def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    tokens: bool = True,
    **masks: Any,
) -> oracle.Result:
    """The definition, spelled out: one softmax over the kept tokens and one mean per block; without `tokens` the means
    alone, without the sink."""
    heads, (q_len, kv_len) = query.shape[1], mask.seq_lens
    block_q, block_kv = mask.block_size
    query, key, value = (x.to(dtype) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    shape = (*query.shape[:3], kv_len)
    seen = oracle.visible(q_len, kv_len, **masks).expand(shape)
    bias = masks.get("attn_mask")
    bias = torch.zeros(shape, dtype=dtype) if bias is None or bias.dtype == torch.bool else bias.to(dtype).expand(shape)
    counts = counting(shape, masks.get("segments"), masks.get("attn_mask"))
    kept = oracle.token_mask(oracle.blocks_of(mask), mask.block_size, q_len, kv_len).expand(shape)
    rows = torch.arange(q_len) // block_q
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def scores(keys: Tensor, added: Tensor, allowed: Tensor) -> Tensor:
        products = query @ keys.transpose(-1, -2) * scale
        products = products if softcap is None else softcap * torch.tanh(products / softcap)
        return torch.where(allowed, products + torch.where(allowed, added, 0), -torch.inf)

    parts, values = [scores(key, bias, seen & kept)] if tokens else [], [value] if tokens else []
    for block in range(-(-kv_len // block_kv)):
        cut = slice(block * block_kv, min(kv_len, (block + 1) * block_kv))
        for sample in range(query.shape[0]):
            # One sample at a time, since padding differs.
            inside = counts[sample, cut]
            number = int(inside.sum())
            mean_k, mean_v = (x[sample, :, cut][:, inside].mean(1, keepdim=True) for x in (key, value))
            whole = seen[sample, :, :, cut][..., inside].all(-1) & (number > 0)
            finite = mean_k.isfinite().all(-1) & mean_v.isfinite().all(-1)
            skipped = ~oracle.blocks_of(mask).expand(query.shape[0], heads, -1, -1)[sample][:, rows, block]
            added = bias[sample, :, :, cut][..., inside].mean(-1) + math.log(max(1, number))
            only = torch.arange(query.shape[0])[:, None, None] == sample
            allowed = (whole & skipped & finite)[None] & only
            mean_k, mean_v = (torch.where(finite[..., None], x, 0) for x in (mean_k, mean_v))
            batch = query.shape[0]
            parts.append(
                scores(
                    mean_k.expand(batch, -1, -1, -1),
                    added[None, ..., None].expand(batch, -1, -1, -1),
                    allowed[..., None],
                )
            )
            values.append(mean_v.expand(batch, -1, -1, -1))
    joint = torch.cat(parts, -1)
    if sink_logits is not None and tokens:
        joint = torch.cat([joint, sink_logits.to(dtype)[:, None, None].expand(*joint.shape[:3], 1)], -1)
        values.append(torch.zeros_like(values[0][:, :, :1]))
    lse = torch.logsumexp(joint, -1)
    weights = torch.exp(joint - torch.where(lse == -torch.inf, 0, lse)[..., None])
    everything = torch.cat(values, 2)
    return oracle.Result(weights @ torch.where(everything.isfinite(), everything, 0), lse)


def counting(shape: tuple[int, ...], segments: Any, attn_mask: Tensor | None) -> Tensor:
    """Keys that are no padding, `[batch, kv_len]`: in a segment, and not hidden from every row by a mask."""
    counts = torch.ones(shape[0], shape[-1], dtype=torch.bool)
    if segments is not None:
        counts = counts & (segments[1] >= 0)
    if attn_mask is not None:
        shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        counts = counts & shown.expand(shape).any((1, 2))
    return counts


def check(engine: Engine, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """Full precision against the definition, as far off as plain torch may be."""
    result = engine.attend(q, k, v, mask, compensate=CENTROID, **options)
    expected = reference(q, k, v, mask, **options)
    plain = reference(q, k, v, mask, dtype=q.dtype, **options)
    assert result.output.dtype == q.dtype
    assert result.lse.dtype == torch.float32
    oracle.assert_within(result.output, expected.output, plain.output)
    lse = reference(q, k, v, mask, dtype=torch.float32, **options).lse
    # Where weights are bf16 so are those that the engine sums: eight bits of every one.
    rounded = [expected.lse + 2**-9] if result.stats.pv_dtype == "bfloat16" and engine.backend == "cpu" else []
    oracle.assert_within(result.lse, expected.lse, lse, *rounded, what="lse")
    return result


def documents(length: int, *ends: int, padding: int = 0) -> Tensor:
    """Segment numbers of documents that end there; the last tokens are padding."""
    number = torch.searchsorted(torch.tensor(ends), torch.arange(length), right=True)
    return torch.where(torch.arange(length) < length - padding, number, -1)


def with_mask(q_len: int, kv_len: int, floating: bool) -> Tensor:
    """A mask with whole blocks, half blocks, and 70 keys hidden from everyone."""
    torch.manual_seed(5)
    hidden = torch.rand(2, 1, q_len, kv_len // 50 + 1).repeat_interleave(50, -1)[..., :kv_len] < 0.15
    hidden[..., 100:170] = True
    return torch.randn(2, 1, q_len, kv_len).masked_fill(hidden, -torch.inf) if floating else ~hidden


N, M = 330, 410
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one sequence": {"kv_len": N},
    "ragged by one": {"q_len": 129, "kv_len": 257},
    "short": {"q_len": 63, "kv_len": 65},
    "decode": {"q_len": 1, "kv_len": 700},
    "grouped heads": {"heads": 6, "kv_heads": 2},
    "value dim": {"dim": 40, "value_dim": 24},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "kv_len": N},
}
OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "dense": lambda n, m: {},
    "causal": lambda n, m: {"causal": True},
    "window": lambda n, m: {"window": 150},
    "causal window": lambda n, m: {"causal": True, "window": 200},
    "softcap and scale": lambda n, m: {"softcap": 2.0, "scale": 0.7, "causal": True},
    "sinks": lambda n, m: {"sink_logits": torch.tensor([2.0, -1.0, 0.0, 1.0, 3.0, 0.5]), "causal": True},
    "documents": lambda n, m: {"segments": (documents(n, n // 3), documents(m, m // 3)), "causal": True},
    "documents, both ways": lambda n, m: {"segments": (documents(n, n // 3), documents(m, m // 3))},
    "padding": lambda n, m: {
        "segments": (documents(n).expand(2, n), torch.stack([documents(m, padding=m // 5), documents(m)]))
    },
    "positions": lambda n, m: {
        "positions": (torch.randperm(m)[:n] if n <= m else torch.arange(n), torch.arange(m) // 3 * 3),
        "causal": True,
    },
    "bool mask": lambda n, m: {"attn_mask": with_mask(n, m, False), "causal": True},
    "float mask": lambda n, m: {"attn_mask": with_mask(n, m, True)},
}


def inputs(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(**({"batch": 2, "q_len": N, "kv_len": M} | SHAPES[shape]))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", ["plain", "grouped heads", "bf16"])
def test_is_its_definition(engine: Engine, shape: str, option: str) -> None:
    q, k, v = inputs(shape)
    options = OPTIONS[option](q.shape[2], k.shape[2])
    if "sink_logits" in options:
        options["sink_logits"] = options["sink_logits"][: q.shape[1]]
    check(engine, q, k, v, block_mask((N, M), batch=2, heads=q.shape[1], density=0.3), **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)], ids=str)
def test_shapes(engine: Engine, shape: str, block_size: tuple[int, int]) -> None:
    q, k, v = inputs(shape)
    lengths = (q.shape[2], k.shape[2])
    for causal in (False, True):
        check(engine, q, k, v, block_mask(lengths, heads=q.shape[1], block_size=block_size, density=0.3), causal=causal)


def test_more_queries_than_keys(engine: Engine) -> None:
    """The first rows see nothing, with means or without."""
    q, k, v = qkv(q_len=300, kv_len=170)
    result = check(engine, q, k, v, block_mask((300, 170), heads=2, density=0.3), causal=True)
    assert (result.lse[:, :, :130] == -torch.inf).all()
    assert (result.output[:, :, :130] == 0).all()


def test_a_row_without_kept_blocks_has_the_means(engine: Engine) -> None:
    q, k, v = qkv(q_len=200, kv_len=300)
    nothing = tamis.BlockMask.from_dense(torch.zeros(1, 1, 2, 5, dtype=torch.bool), seq_lens=(200, 300))
    result = check(engine, q, k, v, nothing)
    assert result.lse.isfinite().all()
    causal = check(engine, q, k, v, nothing, causal=True)
    sees_none = torch.arange(200) + 100 < 63
    assert torch.equal(causal.lse[0, 0].isinf(), sees_none)
    check(engine, q, k, v, nothing, causal=True, sink_logits=torch.tensor([1.0, -1.0]))


def test_equal_tokens_make_it_dense(engine: Engine) -> None:
    """If the tokens of every block are alike, a mean is what it stands for."""
    q, k, v = qkv(q_len=300, kv_len=300)
    k, v = (x[:, :, ::64].repeat_interleave(64, 2)[:, :, :300].contiguous() for x in (k, v))
    diagonal = torch.eye(5, dtype=torch.bool)[None, None]
    mask = tamis.BlockMask.from_dense(diagonal, (64, 64), (300, 300))
    for causal in (False, True):
        result = engine.attend(q, k, v, mask, causal=causal, compensate=CENTROID)
        dense = oracle.attention(q, k, v, causal=causal)
        plain = oracle.attention(q, k, v, causal=causal, dtype=torch.float32)
        oracle.assert_within(result.output, dense.output, plain.output)
        oracle.assert_within(result.lse, dense.lse, plain.lse, what="lse")


def test_nothing_skipped_nothing_changed(engine: Engine) -> None:
    """Bit for bit, in both precisions."""
    q, k, v = qkv(q_len=300, heads=4, kv_heads=2)
    for precision in ("full", "int8"):
        for mask in (None, full_mask((300, 300))):
            options: dict[str, Any] = {"causal": True, "precision": precision}
            assert same(
                engine.attend(q, k, v, mask, compensate=CENTROID, **options), engine.attend(q, k, v, mask, **options)
            )


def test_rows_that_no_mean_reaches_keep_their_bits(engine: Engine) -> None:
    """Of the first 128 queries the first 63 see no block whole."""
    q, k, v = qkv(q_len=400)
    dense = torch.ones(4, 7, dtype=torch.bool)
    dense[:, 0] = False
    dense[0, 0] = True
    dense[0, 1] = False
    mask = tamis.BlockMask.from_dense(dense, seq_lens=(400, 400))
    plain, result = (engine.attend(q, k, v, mask, causal=True, compensate=c) for c in (None, CENTROID))
    assert torch.equal(result.output[:, :, :127], plain.output[:, :, :127])
    assert torch.equal(result.lse[:, :, :127], plain.lse[:, :, :127])
    assert (result.lse[:, :, 127:] > plain.lse[:, :, 127:]).all()


@pytest.mark.parametrize("poison", [1e6, 3e38, torch.inf, torch.nan])
def test_the_future_changes_nothing(engine: Engine, poison: float) -> None:
    """Token by token: what comes later moves no bit of what was before, although it is in the mean of a block."""
    q, k, v = qkv(q_len=330)
    mask = block_mask((330, 330), heads=2, density=0.4)
    before = engine.attend(q, k, v, mask, causal=True, compensate=CENTROID)
    for row in (0, 62, 63, 64, 127, 128, 191, 200, 328):
        later = [x.clone() for x in (k, v)]
        for x in later:
            x[:, :, row + 1 :] = poison
        after = engine.attend(q, *later, mask, causal=True, compensate=CENTROID)
        assert torch.equal(after.output[:, :, : row + 1], before.output[:, :, : row + 1])
        assert torch.equal(after.lse[:, :, : row + 1], before.lse[:, :, : row + 1])


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_block(engine: Engine, side: str, poison: float) -> None:
    """A skipped block with one such number has no mean; the other blocks have theirs."""
    q, k, v = qkv(q_len=200, kv_len=330)
    dense = torch.rand(1, 2, 2, 6) < 0.4
    dense[..., 2] = False
    mask = tamis.BlockMask.from_dense(dense, seq_lens=(200, 330))
    (k if side == "key" else v)[:, 1, 150, 3] = poison
    result = check(engine, q, k, v, mask)
    assert result.output.isfinite().all()
    assert torch.equal(
        result.output[:, 0],
        engine.attend(*(x[:, :1] for x in (q, k, v)), of_head(dense, 0), compensate=CENTROID).output[:, 0],
    )


def of_head(dense: Tensor, head: int) -> Any:
    return tamis.BlockMask.from_dense(dense[:, head : head + 1], seq_lens=(200, 330))


def test_padding_holds_what_it_likes(engine: Engine) -> None:
    """Padded keys are in no mean, whether segments or a mask say so, and may be NaN."""
    q, k, v = qkv(q_len=200, kv_len=330)
    mask = block_mask((200, 330), heads=2, density=0.3)
    visible = torch.arange(330) < 270
    segments = (torch.zeros(200, dtype=torch.int64), torch.where(visible, 0, -1))
    results = []
    for filling in (0.0, torch.nan):
        k[:, :, 270:], v[:, :, 270:] = filling, filling
        for options in ({"segments": segments}, {"attn_mask": visible[None]}):
            results.append(engine.attend(q, k, v, mask, compensate=CENTROID, **options))
    for result in results[1:]:
        assert same(result, results[0])
    short = oracle.blocks_of(mask)[..., :5]
    cut = tamis.BlockMask.from_dense(short, seq_lens=(200, 270))
    assert_reordered(results[0], engine.attend(q, k[:, :, :270], v[:, :, :270], cut, compensate=CENTROID), 270)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_is_the_merge_with_the_means(engine: Engine, precision: str) -> None:
    """Whatever the sparse part is, stage 2 included: `merge` brings the means in."""
    q, k, v = qkv(q_len=330, heads=4, kv_heads=2)
    mask = block_mask((330, 330), heads=4, density=0.4)
    options: dict[str, Any] = {"causal": True, "precision": precision, "pv_threshold": 2.0}
    plain, result = (engine.attend(q, k, v, mask, compensate=c, **options) for c in (None, CENTROID))
    means = reference(q, k, v, mask, causal=True, tokens=False)
    assert_reordered(result, tamis.merge([plain.output, means.output.float()], [plain.lse, means.lse]), 330)
    assert torch.equal(result.stats.counts, plain.stats.counts)
    assert (result.stats.compensate, plain.stats.compensate) == (CENTROID, None)
    assert "compensate='centroid'" in repr(result.stats)


@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("padding", [0, 75])
def test_packed(engine: Engine, block_size: tuple[int, int], padding: int) -> None:
    """A PackedKV has the means of its own 8 bits, also behind what was appended, and reads nothing behind its end."""
    q, k, v = qkv(q_len=150, kv_len=330, heads=4, kv_heads=2, dim=30, value_dim=20)
    k = k + 3
    packed = tamis.pack_kv(k[:, :, :201], v[:, :, :201]).append(k[:, :, 201:], v[:, :, 201:])
    assert packed.capacity >= 330
    mask = block_mask((150, 330), heads=4, block_size=block_size, density=0.3)
    options: dict[str, Any] = {"causal": True}
    if padding:
        options["segments"] = (torch.zeros(150, dtype=torch.int64), documents(330, padding=padding))
    plain, result = (engine.attend(q, packed, None, mask, compensate=c, **options) for c in (None, CENTROID))
    key8, key_scale, _, value8, value_scale, _, mean = packed.tensors[:7]
    keys = (key8[..., :30] * key_scale[..., None, None]) @ oracle.mixer(30).float().T + mean[:, :, None, None]
    keys = keys.flatten(2, 3)[:, :, :330]
    values = (value8 * value_scale[..., None]).transpose(3, 4).flatten(2, 3)[:, :, :330]
    means = reference(q, keys, values, mask, tokens=False, **options)
    assert_reordered(result, tamis.merge([plain.output, means.output.float()], [plain.lse, means.lse]), 330)


@pytest.mark.parametrize("budget", [1, 2**16, 2**18])
def test_parts_make_the_whole(any_engine: Engine, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """However few rows and heads are scored at a time."""
    q, k, v = qkv(batch=2, q_len=N, kv_len=M, heads=6, kv_heads=2)
    mask = block_mask((N, M), batch=2, heads=6, density=0.3)
    for name in ("causal", "documents", "float mask"):
        options = OPTIONS[name](N, M)
        whole = any_engine.attend(q, k, v, mask, compensate=CENTROID, **options)
        with monkeypatch.context() as patch:
            patch.setattr(compensate, "CPU_BUDGET", budget)
            patch.setattr(compensate, "BUDGET", budget)
            assert_reordered(any_engine.attend(q, k, v, mask, compensate=CENTROID, **options), whole, M)


def test_scores_stay_in_their_budget() -> None:
    """Every row of every head once, and no more scores at a time than there is room for."""
    query = torch.zeros(2, 6, 1, 1).expand(2, 6, 5000, 1)
    times = torch.zeros(2, 6, 5000)
    for at in compensate._places(query, 128, 900):
        times[at] += 1
        assert times[at].numel() * 900 * 4 <= compensate.CPU_BUDGET
    assert (times == 1).all()


def test_it_helps_where_keys_are_smooth(engine: Engine) -> None:
    """On slowly varying keys and values the means take away most of the error."""
    n = 1024
    along = torch.linspace(0, 6, n)[:, None]
    k, v = (torch.sin(along * torch.rand(32) * 3 + torch.rand(32) * 6).expand(1, 2, n, 32) for _ in range(2))
    q = torch.randn(1, 2, n, 32)
    mask = tamis.Sparge(topk=0.25, similarity=-1.0)(q, k, causal=True)
    dense = oracle.attention(q, k, v, causal=True).output
    for precision in ("full", "int8"):
        without, beside = (
            oracle.relative_l1(
                engine.attend(q, k, v, mask, causal=True, precision=precision, compensate=c).output, dense
            )
            for c in (None, CENTROID)
        )
        assert beside < without / 5
        assert without > 0.05


def test_varlen(engine: Engine) -> None:
    """A block of two sequences is whole for nobody: each sequence is as it is alone where its blocks are its own."""
    offsets = torch.tensor([0, 128, 300], dtype=torch.int32)
    q, k, v = (torch.randn(300, 2, 16) for _ in range(3))
    dense = torch.rand(1, 2, 3, 5) < 0.4
    mask = tamis.BlockMask.from_dense(dense, seq_lens=(300, 300))
    result = engine.attend_varlen(q, k, v, offsets, offsets, mask, causal=True, compensate=CENTROID)
    for rows, q_blocks, kv_blocks in (
        (slice(0, 128), slice(0, 1), slice(0, 2)),
        (slice(128, 300), slice(1, 3), slice(2, 5)),
    ):
        length = rows.stop - rows.start
        part = tamis.BlockMask.from_dense(dense[:, :, q_blocks, kv_blocks].contiguous(), seq_lens=(length, length))
        alone = engine.attend(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), part, causal=True, compensate=CENTROID
        )
        mine = tamis.AttentionOutput(result.output[rows].transpose(0, 1)[None], result.lse[None, :, rows])
        assert_reordered(mine, alone, length)


def test_sparse_attention_hands_it_on(engine: Engine) -> None:
    q, k, v = qkv(q_len=600)
    options: dict[str, Any] = {"predictor": tamis.Sparge(topk=0.3, similarity=-1.0), "precision": "full"}
    output, stats = engine.sparse_attention(q, k, v, is_causal=True, pv_threshold=None, compensate=CENTROID, **options)
    mask = engine.predict(options["predictor"], q, k, causal=True)
    expected = reference(q, k, v, mask, causal=True)
    oracle.assert_within(output, expected.output, reference(q, k, v, mask, causal=True, dtype=torch.float32).output)
    assert stats.compensate == CENTROID
    assert stats.density < 1


def test_empty_sizes(engine: Engine) -> None:
    for batch, q_len, kv_len in ((0, 70, 70), (1, 0, 70), (1, 70, 0)):
        q, k, v = qkv(batch=batch, q_len=q_len, kv_len=kv_len)
        grid = blocks_needed((q_len, kv_len), (128, 64))
        mask = tamis.BlockMask.from_dense(torch.zeros(*grid, dtype=torch.bool), seq_lens=(q_len, kv_len))
        for hidden in (None, torch.ones(q_len, kv_len, dtype=torch.bool)):
            result = engine.attend(q, k, v, mask, attn_mask=hidden, compensate=CENTROID)
            assert result.output.shape == q.shape
            assert (result.output == 0).all()


def test_without_gradients(engine: Engine) -> None:
    """Under no_grad and inference_mode what requires grad is taken as it is."""
    q, k, v = qkv(q_len=300)
    mask = block_mask((300, 300), heads=2, density=0.3)
    plain = engine.attend(q, k, v, mask, compensate=CENTROID)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert same(engine.attend(q.requires_grad_(), k, v, mask, compensate=CENTROID), plain)


def test_strided_inputs(engine: Engine) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(q_len=300, heads=4, kv_heads=2))
    check(engine, q, k[:, :1].expand(-1, 2, -1, -1), v, block_mask((300, 300), heads=4, density=0.3), causal=True)


@pytest.mark.parametrize("name", ["mean", "", 1, True])
def test_other_names(any_engine: Engine, name: Any) -> None:
    with pytest.raises(ValueError, match="compensate must be one of centroid, got"):
        any_engine.attend(*qkv(), compensate=name)


def test_fewer_tokens_weigh_less(engine: Engine) -> None:
    """The last block has one token: skipped, it counts once, so its mean is the token itself."""
    q, k, v = qkv(q_len=65)
    dense = torch.tensor([[True, False]])
    mask = tamis.BlockMask.from_dense(dense, seq_lens=(65, 65))
    result = engine.attend(q, k, v, mask, compensate=CENTROID)
    expected = oracle.attention(q, k, v)
    plain = oracle.attention(q, k, v, dtype=torch.float32)
    oracle.assert_within(result.output, expected.output, plain.output)
    oracle.assert_within(result.lse, expected.lse, plain.lse, what="lse")
