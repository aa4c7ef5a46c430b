"""Pictures of attention maps beside the blocks that a predictor kept, at the grain of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from tamis.block_mask import BlockMask

_LARGEST_SIDE = 128  # blocks per side of a picture; longer sequences are pooled


@dataclass
class Pick:
    """The best candidate so far for one place in the gallery: the head with the highest score."""

    score: float = float("-inf")
    picture: dict[str, Any] | None = None


class Gallery:
    """A few maps worth looking at, chosen while the layers go by: first and middle layer, sparsest, largest error."""

    def __init__(self, layers: int) -> None:
        self._fixed = {0: Pick(), layers // 2: Pick()}
        self._sparsest = Pick()
        self._worst = Pick()

    def consider(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        block_mask: BlockMask,
        *,
        density: list[float],
        relative_l1: list[float],
        causal: bool,
        scale: float | None,
    ) -> None:
        """Keep pictures of this layer's heads where they beat what is there."""
        sparsest = min(range(len(density)), key=lambda head: density[head])
        worst = max(range(len(density)), key=lambda head: relative_l1[head])
        candidates = [(self._sparsest, sparsest, -density[sparsest]), (self._worst, worst, relative_l1[worst])]
        if layer in self._fixed:
            candidates.append((self._fixed[layer], 0, 0.0))
        for pick, head, score in candidates:
            if score > pick.score:
                pick.score = score
                pick.picture = {
                    "layer": layer,
                    "head": head,
                    "tokens": query.shape[2],
                    "block_size": list(block_mask.block_size),
                    **picture(query, key, block_mask, head=head, causal=causal, scale=scale),
                    "density": density[head],
                    "relative_l1": relative_l1[head],
                }

    def pictures(self) -> list[dict[str, Any]]:
        """The chosen maps, each once, in the order of layers."""
        picks = [*self._fixed.values(), self._sparsest, self._worst]
        found = {(p["layer"], p["head"]): p for pick in picks if (p := pick.picture) is not None}
        return [found[place] for place in sorted(found)]


def picture(
    query: Tensor, key: Tensor, block_mask: BlockMask, *, head: int, causal: bool, scale: float | None
) -> dict[str, list[list[float]]]:
    """`attention`: share of each query block's softmax mass in each key block; `kept`: 1 where it was visited."""
    mass = block_mass(query, key, block_mask.block_size, head=head, causal=causal, scale=scale)
    dense = block_mask.to_dense()
    kept = dense[0, head if dense.shape[1] > 1 else 0].float()
    size = (min(mass.shape[0], _LARGEST_SIDE), min(mass.shape[1], _LARGEST_SIDE))
    small = adaptive_avg_pool2d(mass[None], size)[0]
    small = small / small.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return {
        "attention": [[round(entry, 5) for entry in row] for row in small.tolist()],
        "kept": [[int(entry) for entry in row] for row in adaptive_max_pool2d(kept[None], size)[0].tolist()],
    }


def block_mass(
    query: Tensor, key: Tensor, block_size: tuple[int, int], *, head: int, causal: bool, scale: float | None
) -> Tensor:
    """Mean softmax mass per block pair of one head, `[q_blocks, kv_blocks]`; rows sum to 1."""
    q = query[0, head].float()
    k = key[0, head * key.shape[1] // query.shape[1]].float()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    block_q, block_kv = block_size
    pad = -k.shape[0] % block_kv
    columns = torch.arange(k.shape[0])
    rows = []
    for start in range(0, q.shape[0], block_q):
        scores = q[start : start + block_q] @ k.T * factor
        if causal:
            own = torch.arange(start, start + scores.shape[0]) + k.shape[0] - q.shape[0]
            scores.masked_fill_(columns > own[:, None], float("-inf"))
        mass = torch.softmax(scores, dim=-1).mean(dim=0)
        rows.append(torch.nn.functional.pad(mass, (0, pad)).view(-1, block_kv).sum(dim=-1))
    return torch.stack(rows)
