"""What a call asks for beside its tensors, and what of it belongs to some of the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tamis.attend import DEFAULT_PV_THRESHOLD, _attend
from tamis.block_mask import BlockMask
from tamis.call import PerHead, Prepared
from tamis.errors import UnsupportedError
from tamis.packed import PackedKV
from tamis.parallel.layout import Layout
from tamis.predictors import Random, Sparge
from tamis.predictors.base import Predictor
from tamis.predictors.search import Search
from tamis.stats import AttentionOutput

MEASURED = "measured"


@dataclass(frozen=True)
class Request:
    """The arguments of an attention call over the whole sequence.

    `predictor` chooses the blocks, or else `block_mask` names them; without either the call is dense. `segments` are
    (the query's, the key's) of the whole sequence, `layouts` tell where the query's and the key's tokens are.
    """

    layouts: tuple[Layout, Layout]
    predictor: Predictor | None = None
    block_mask: BlockMask | None = None
    precision: str = "full"
    pv_threshold: PerHead | None = None
    compensate: str | None = None
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    segments: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    backend: str | None = None

    def of_heads(self, heads: slice, total: int) -> Request:
        """What is left for some of `total` query heads."""
        return replace(
            self,
            predictor=None if self.predictor is None else predictor_of(self.predictor, heads, total),
            block_mask=None if self.block_mask is None else mask_of(self.block_mask, heads),
            pv_threshold=_some(self.pv_threshold, heads, total, "pv_threshold"),
            sink_logits=None if self.sink_logits is None else self.sink_logits[heads],
        )

    def predict(self, query: Tensor, key: Tensor) -> tuple[BlockMask | None, Prepared | None]:
        """The blocks of a call over whole sequences, and what its `attend` need not read again."""
        predictor = self.predictor
        if predictor is None:
            return self.block_mask, None
        seen: Any = {name: getattr(self, name) for name in ("causal", "window", "scale", "segments", "backend")}
        if isinstance(predictor, Sparge):
            return predictor.prepare(query, key, **seen, precision=self.precision)
        return predictor(query, key, **seen), None

    def attend(
        self,
        query: Tensor,
        key: Tensor | PackedKV,
        value: Tensor | None,
        mask: BlockMask | None,
        *,
        prepared: Prepared | None = None,
    ) -> AttentionOutput:
        """The engine on whole sequences."""
        return _attend(
            query,
            key,
            value,
            mask,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            segments=self.segments,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            precision=self.precision,
            pv_threshold=self.pv_threshold,
            compensate=self.compensate,
            backend=self.backend,
            prepared=prepared,
        )

    def here(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """The whole call in this process."""
        mask, prepared = self.predict(query, key)
        return self.attend(query, key, value, mask, prepared=prepared)


def threshold_of(pv_threshold: PerHead | str | None, mode: str) -> PerHead | None:
    """The value threshold of a call, whose measured default is off where it cannot be honoured."""
    if isinstance(pv_threshold, str):
        if pv_threshold != MEASURED:
            raise ValueError(f"pv_threshold must be a number, one per head, None or 'measured', got {pv_threshold!r}")
        return DEFAULT_PV_THRESHOLD if mode == "heads" else None
    return pv_threshold


def predictor_of(predictor: Predictor, heads: slice, total: int) -> Predictor:
    """A predictor for some of `total` heads; its settings per head are cut, everything else stays.

    A predictor that is not from here is asked for `for_heads(start, stop)` if it has that, and else used as it is.
    """
    if heads == slice(0, total):
        return predictor
    if isinstance(predictor, Random):
        raise UnsupportedError("Random draws by the number of a head, which ranks count anew: use another predictor")
    if hasattr(predictor, "for_heads"):
        made: Predictor = predictor.for_heads(heads.start, heads.stop)
        return made
    names: tuple[str, ...] = ("cdf", "topk", "similarity") if isinstance(predictor, Sparge) else ()
    if isinstance(predictor, Search):
        names = tuple(predictor.SHARES)
    cut = {name: _some(getattr(predictor, name), heads, total, name) for name in names}
    if not any(isinstance(value, tuple) for value in cut.values()):
        return predictor
    return dataclasses.replace(predictor, **cut)  # type: ignore[type-var]


def mask_of(mask: BlockMask, heads: slice) -> BlockMask:
    """A mask for some of its heads."""
    if mask.kv_num_blocks.shape[1] == 1:
        return mask
    return BlockMask(mask.kv_num_blocks[:, heads], mask.kv_indices[:, heads], mask.block_size, mask.seq_lens)


def _some(setting: Any, heads: slice, total: int, name: str) -> Any:
    """A setting of some heads; one number for all stays as it is."""
    if isinstance(setting, Tensor) and setting.dim() == 0:
        return setting
    if not isinstance(setting, (Sequence, Tensor)):
        return setting
    if len(setting) != total:
        raise ValueError(f"{name} must be one number or one per query head ({total}), got {len(setting)}")
    return setting[heads]
