"""Which query rows of a call an audit looks at, and dense attention of those rows alone.

A call is cut into `pairs` strata of neighbouring rows; in each stratum and head two rows are drawn independently, so
that their difference tells the spread inside the stratum. A row is drawn 2 * pairs / q_len times on average, wherever
it stands. Calls too short for `FEWEST` pairs are looked at with a probability instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.integrations.request import Request

# An audited call costs half a millisecond however few its rows are, so short calls are audited less often but with this
# many pairs.
FEWEST = 8
# Strata are multiplied with the keys in so many products. Each reads every key up to its last row, which wastes work
# under causality; but products of few rows run at a fraction of a processor's speed.
PRODUCTS = 4
# Scores held at a time, unless one stratum alone has more: 64 MB.
SCORES = 2**24


@dataclass(frozen=True)
class Shape:
    """What the work of a call depends on; `heads` is batch times query heads."""

    heads: int
    q_len: int
    kv_len: int
    causal: bool
    window: int | None

    @staticmethod
    def of(request: Request) -> Shape:
        """Of a call; a complete mask and padding save no work, as in a dense kernel."""
        batch, heads, q_len, _ = request.query.shape
        return Shape(batch * heads, q_len, request.key.shape[2], request.causal, request.window)

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """The range of keys that rows first .. last - 1 can see."""
        shift = self.kv_len - self.q_len
        low, high = 0, self.kv_len
        if self.causal:
            high = min(high, last + shift)
        if self.window is not None:
            low = max(low, first + shift - self.window + 1)
            high = min(high, last + shift + self.window - 1)
        return low, max(low, high)

    @property
    def work(self) -> int:
        """Pairs of a row and a key that it can see, per head."""
        shift, total = self.kv_len - self.q_len, self.q_len * self.kv_len
        if self.causal:
            total = _ramp(shift + 1, self.q_len, self.kv_len)
        elif self.window is not None:
            total = _ramp(shift + self.window, self.q_len, self.kv_len)
        hidden = 0 if self.window is None else _ramp(shift - self.window + 1, self.q_len, self.kv_len)
        return total - hidden

    def products(self, pairs: int) -> list[tuple[int, int, int, int]]:
        """(first stratum, last + 1, first key, last + 1) of every product that recomputes the drawn rows."""
        most = max(1, SCORES // max(1, 2 * self.heads * self.kv_len))
        step = min(most, -(-pairs // PRODUCTS))
        found = []
        for first in range(0, pairs, step):
            last = min(pairs, first + step)
            rows = first * self.q_len // pairs, -(-last * self.q_len // pairs)
            found.append((first, last, *self.keys(*rows)))
        return found

    def cost(self, pairs: int) -> int:
        """Pairs of a row and a key that the products multiply, per head."""
        return sum(2 * (last - first) * (high - low) for first, last, low, high in self.products(pairs))


def _ramp(start: int, count: int, most: int) -> int:
    """Sum of start, start + 1, .. (so many numbers), each limited to 0 .. most."""

    def up_to(last: int) -> int:
        inside = min(max(last, 0), most)
        return inside * (inside + 1) // 2 + max(last - most, 0) * most

    return up_to(start + count - 1) - up_to(start - 1)


@functools.lru_cache(maxsize=1024)
def plan(shape: Shape, share: float) -> tuple[float, float]:
    """Probability that a call is audited, and the mean number of pairs per head then, such that the mean cost is at
    most `share` of the call's work."""
    allowed = share * shape.work
    pairs = max(min(FEWEST, shape.q_len // 2), 1)
    if shape.q_len == 0 or shape.cost(pairs) == 0:
        return 0.0, float(pairs)
    if shape.cost(pairs) >= allowed:
        return allowed / shape.cost(pairs), float(pairs)
    low, high = pairs, max(pairs, shape.q_len // 2)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if shape.cost(middle) <= allowed else (low, middle - 1)
    more = shape.cost(low + 1) - shape.cost(low)
    return 1.0, low + min(1.0, (allowed - shape.cost(low)) / more) if low < shape.q_len // 2 else float(low)


def draw(shape: Shape, batch: int, share: float, generator: torch.Generator) -> tuple[Tensor, float] | None:
    """Rows, int64 `[batch, heads, pairs, 2]`, and the probability with which this call was chosen; None if it was not.

    Given the number of pairs every row is drawn equally often on average.
    """
    probability, mean = plan(shape, share)
    coins = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    if coins[0] >= probability:
        return None
    pairs = int(mean + coins[1])
    places = torch.rand(batch, shape.heads // batch, pairs, 2, generator=generator, dtype=torch.float64)
    places = (places + torch.arange(pairs, dtype=torch.float64)[:, None]) * (shape.q_len / pairs)
    return places.long().clamp_(max=shape.q_len - 1), probability


def exact(request: Request, rows: Tensor) -> Tensor:
    """Dense attention of drawn rows in fp32 plain torch, `[batch, heads, pairs, 2, value_dim]`.

    A score is s = scale * q.k, then softcap * tanh(s / softcap); a sink logit is one more score, of value 0. A row that
    sees no key gets 0.
    """
    query, shape = request.query, Shape.of(request)
    batch, heads, pairs, _ = rows.shape
    output = query.new_empty(*rows.shape, request.value.shape[-1], dtype=torch.float32)
    # Autocast would make products of fp32 tensors ones of bf16.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for first, last, low, high in shape.products(pairs):
            part = rows[:, :, first:last].reshape(batch, heads, -1)
            output[:, :, first:last] = _part(request, part, low, high).reshape(batch, heads, last - first, 2, -1)
    return output


def _part(request: Request, rows: Tensor, low: int, high: int) -> Tensor:
    """Attention of `rows` `[batch, heads, some]` over the keys low .. high - 1."""
    batch, heads, some = rows.shape
    kv_heads, dim = request.key.shape[1], request.query.shape[-1]
    if low == high:
        return request.query.new_zeros(batch, heads, some, request.value.shape[-1], dtype=torch.float32)
    query = request.query.take_along_dim(rows[..., None], 2).float().reshape(batch, kv_heads, -1, dim)
    scores = query @ request.key[:, :, low:high].float().mT
    scores = scores.mul_(dim**-0.5 if request.scale is None else request.scale).reshape(batch, heads, some, -1)
    if request.softcap is not None:
        scores = scores.div_(request.softcap).tanh_().mul_(request.softcap)
    seen = _seen(request, rows, low, high)
    if seen is not None:
        scores = scores.masked_fill_(~seen, -torch.inf)
    sinks = None if request.sink_logits is None else request.sink_logits.reshape(1, -1, 1, 1)
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - largest).exp()
    weights = (weights / total.masked_fill(total == 0, 1.0)).reshape(batch, kv_heads, -1, high - low)
    return (weights @ request.value[:, :, low:high].float()).reshape(batch, heads, some, -1)


def _seen(request: Request, rows: Tensor, low: int, high: int) -> Tensor | None:
    """Which keys the rows see, bool and broadcastable to `[batch, heads, some, high - low]`; None for all."""
    batch, heads, q_len, _ = request.query.shape
    kv_len = request.key.shape[2]
    seen = []
    if request.mask is not None:
        mask = request.mask.expand(batch, heads, q_len, kv_len)[..., low:high]
        seen.append(mask.take_along_dim(rows[..., None], 2))
    if request.causal or request.window is not None:
        distance = (rows + kv_len - q_len)[..., None] - torch.arange(low, high, device=rows.device)
        if request.causal:
            seen.append(distance >= 0)
        if request.window is not None:
            seen.append(distance.abs() < request.window)
    if request.segments is not None:
        own = request.segments[0][:, None].expand(batch, heads, q_len).take_along_dim(rows, 2)[..., None]
        seen.append((own == request.segments[1][:, None, None, low:high]) & (own >= 0))
    return functools.reduce(torch.logical_and, seen) if seen else None
