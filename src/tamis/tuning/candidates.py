"""The settings that tuning tries, and the masks they make: block means are taken once, for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tamis.backends import base
from tamis.block_mask import dense_blocks
from tamis.call import Call, make_call
from tamis.predictors import Sparge
from tamis.tuning.calls import LayerCall

_NOTHING = 1e-9  # as cdf or topk: of every row only the largest block


class Candidate(NamedTuple):
    """Settings of `Sparge` for one head; the union of what cdf and topk keep."""

    cdf: float = _NOTHING
    topk: float = _NOTHING
    similarity: float = -1.0


DENSE = Candidate(topk=1.0)
EVERYTHING = Candidate(cdf=1.0)  # all blocks too, but of a head that is not called dense: stage 2 skips parts of them
_CDF = (0.4, 0.55, 0.7, 0.8, 0.87, 0.92, 0.95, 0.97, 0.985, 0.993, 0.997, 0.9995)
_TOPK = (0.02, 0.035, 0.06, 0.1, 0.15, 0.22, 0.3, 0.42, 0.55, 0.7, 0.85)
_SIMILARITY = (-1.0, 0.1, 0.3)

# Ladders, from sparse to dense: each is one knob turned.
LADDERS: tuple[tuple[Candidate, ...], ...] = (
    *(tuple(Candidate(cdf=cdf, similarity=similarity) for cdf in _CDF) for similarity in _SIMILARITY),
    tuple(Candidate(topk=topk) for topk in _TOPK),
)
GRID: tuple[Candidate, ...] = (*(candidate for ladder in LADDERS for candidate in ladder), DENSE)


def predictor_of(heads: Sequence[Candidate]) -> Sparge:
    """The predictor with a candidate for each head."""
    cdf, topk, similarity = zip(*heads, strict=True)
    return Sparge(cdf=cdf, topk=topk, similarity=similarity)


def between(low: Candidate, high: Candidate, share: float) -> Candidate:
    """A candidate between two of the same kind: share 0 is `low`, 1 is `high`; logarithmic in what is left out."""

    def mix(one: float, two: float) -> float:
        return math.exp((1 - share) * math.log(one) + share * math.log(two))

    if low.topk != high.topk:
        return low._replace(topk=min(mix(low.topk, high.topk), 1.0))
    return low._replace(cdf=1 - mix(1 - low.cdf, 1 - high.cdf))


def masks(call: LayerCall, candidates: Sequence[Candidate], rows: Sequence[int], backend: str | None) -> Tensor:
    """What each candidate keeps in some rows of query blocks: bool `[candidates, heads, rows, kv_blocks]`.

    Exactly the blocks that a `Sparge` with these settings keeps.
    """
    checked = make_call(call.query, call.key, None, causal=call.causal, window=call.window, scale=call.scale)
    assert checked.key is not None
    name = base.choose(checked, backend)
    block_q, block_kv = checked.block_size
    mean = base.key_mean(checked.key, None, None, name)
    q_means, q_similarity = base.summarize(checked.query, block_q, None, None, name)
    k_means, k_similarity = base.summarize(checked.key, block_kv, mean, None, name)
    kv_blocks = k_means.shape[2]
    picked = torch.tensor(rows, device=q_means.device)
    found = []
    for candidate in candidates:
        cdf, topk, similarity = (torch.full((checked.num_heads,), value) for value in candidate)
        num, indices = base.select(
            *(q_means, q_similarity, k_means, k_similarity, checked.scale, cdf, topk, similarity, True),
            *_geometry(checked),
            name,
        )
        table = dense_blocks(num[:, :, picked], indices[:, :, picked], kv_blocks)
        found.append(table[0])
    return torch.stack(found)


def _geometry(call: Call) -> tuple[object, ...]:
    """The arguments of `select` about which blocks see which."""
    lengths = (call.causal, call.window, call.q_len, call.kv_len, *call.block_size)
    return (*lengths, call.q_bounds, call.kv_bounds, call.visible, None, False)
