"""Sparge: predict the attention map from block means, where the blocks are alike inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tamis import geometry
from tamis.backends import base as backends
from tamis.backends import replay
from tamis.block_mask import BlockMask, may_trim
from tamis.call import Call, Prepared, make_call, per_head
from tamis.predictors.base import Keep, Range, Setting, as_keep, detached, must_blocks, numbers

# Measured by `tamis bench defaults` on SmolLM2-135M: the lowest density whose relative L1 over its 270 heads at 4,096
# tokens stays within .08 on average, and its perplexity on three parts of one text of 8,192 within .5%.
DEFAULT_CDF = 0.995
DEFAULT_SIMILARITY = 0.1
_RECORDS: replay.Memory[replay.PredictRecord] = replay.Memory()


@dataclass(frozen=True)
class Sparge:
    """SpargeAttn's first stage: a block mask from the softmax of scores between block means.

    Each block is its mean row. Per row of blocks the largest entries of the softmax are kept, until their mass reaches
    `cdf` or their number `topk`. A block whose rows are not alike is badly described by its mean: such query blocks
    keep every key, such key blocks are kept by every query. Invisible blocks are never kept.

    Args:
        cdf: mass to keep, in (0, 1]; the fewest largest blocks that reach it, at least one. By default the
            measured .995 (docs/defaults.md), or off if `topk` is given.
        topk: share of the VISIBLE blocks of each row to keep, in (0, 1], rounded up. With `cdf`: the union.
        similarity: blocks whose mean cosine similarity of rows (keys less their mean) is below this are kept whole,
            in [-1, 1); -1 turns it off.
        sink: always keep the first key block.
        keep: key ranges every row keeps and query ranges that keep every key, as
            `{"keys": [(0, 226)], "queries": [(0, 226)]}`, read as Python slices.

    cdf, topk and similarity are one number or one per query head. Under `causal` the diagonal is always kept.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: SpargeAttn (arXiv 2502.18137), section 3.3; similarity as the authors' code computes it.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> mask = tamis.Sparge(topk=0.25, similarity=-1, sink=False)(query, key)
        >>> mask.density()
        0.25
    """

    cdf: Setting | None = None
    topk: Setting | None = None
    similarity: Setting = DEFAULT_SIMILARITY
    sink: bool = True
    keep: Keep | Mapping[str, Sequence[Range]] | None = None

    def __post_init__(self) -> None:
        if self.cdf is None and self.topk is None:
            object.__setattr__(self, "cdf", DEFAULT_CDF)
        for name, allowed in (("cdf", "in (0, 1]"), ("topk", "in (0, 1]"), ("similarity", "in [-1, 1)")):
            setting = getattr(self, name)
            if setting is not None or name == "similarity":
                object.__setattr__(self, name, numbers(setting, name, allowed))
        if not isinstance(self.sink, bool):
            raise TypeError(f"sink must be True or False, got {type(self.sink).__name__}")
        object.__setattr__(self, "keep", as_keep(self.keep))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        causal: bool = False,
        window: int | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        block_size: tuple[int, int] | None = None,
        positions: tuple[Tensor | None, Tensor | None] | None = None,
        segments: tuple[Tensor | None, Tensor | None] | None = None,
        backend: str | None = None,
    ) -> BlockMask:
        """Predict a `BlockMask` for every query head; the arguments are those of `attend`."""
        return self.prepare(
            query,
            key,
            causal=causal,
            window=window,
            attn_mask=attn_mask,
            scale=scale,
            block_size=block_size,
            positions=positions,
            segments=segments,
            backend=backend,
            precision="full",
        )[0]

    def prepare(
        self,
        query: Tensor,
        key: Tensor,
        *,
        causal: bool = False,
        window: int | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        block_size: tuple[int, int] | None = None,
        positions: tuple[Tensor | None, Tensor | None] | None = None,
        segments: tuple[Tensor | None, Tensor | None] | None = None,
        backend: str | None = None,
        precision: str,
    ) -> tuple[BlockMask, Prepared]:
        """Predict, and keep of query and key what an `attend` in `precision` on the same inputs need not read again."""
        form = None
        plain = type(query) is Tensor and query.dim() == 4 and type(self) is Sparge
        if plain and attn_mask is None and positions is None and segments is None:
            settings = (causal, window, scale, block_size, precision)
            form = replay.form((query, key), backend, settings, self)
        if (record := _RECORDS.get(form)) is not None:
            lists, lengths = record.run(query, key, trim=True), (query.shape[2], key.shape[2])
            return BlockMask(*lists, record.block_size, lengths), Prepared(replay.BACKEND, ())
        call = make_call(
            detached(query, "query"),
            detached(key, "key"),
            None,
            block_size=block_size,
            causal=causal,
            window=window,
            scale=scale,
            attn_mask=attn_mask,
            positions=positions,
            segments=segments,
        )
        name = backends.choose(call, backend)
        assert call.key is not None
        choice = (*self._settings(call), self.sink, call.causal, call.window)
        visible, must = call.visible, self._must(call)
        num, indices, left = backends.predict(
            call.query,
            call.key,
            call.q_segments,
            geometry.without_hidden(call.attn_mask, call.kv_segments),
            call.scale,
            *choice,
            *call.block_size,
            call.q_bounds,
            call.kv_bounds,
            visible,
            must,
            may_trim(call.query.device),
            precision,
            name,
        )
        _RECORDS.offer(form, name, lambda: replay.PredictRecord.of(call, (call.scale, *choice, visible, must)))
        return BlockMask(num, indices, call.block_size, (call.q_len, call.kv_len)), Prepared(name, tuple(left))

    def _settings(self, call: Call) -> tuple[Tensor | None, Tensor | None, Tensor]:
        heads, device = call.num_heads, call.query.device
        cdf = None if self.cdf is None else per_head(self.cdf, heads, "cdf", device)
        topk = None if self.topk is None else per_head(self.topk, heads, "topk", device)
        return cdf, topk, per_head(self.similarity, heads, "similarity", device)

    def _must(self, call: Call) -> Tensor | None:
        """Blocks kept whatever their score. The diagonal of default positions is known to `select` itself."""
        keep = self.keep if isinstance(self.keep, Keep) else None
        diagonal = call.causal and call.q_bounds is not None
        return must_blocks(call, keep, diagonal=diagonal) if diagonal or keep is not None else None
