"""Which blocks can see which: arithmetic on positions, segments and masks, never on a token-level table.

A block is described by the minima and maxima of the positions and segments of its tokens ("bounds", int64
`[batch | 1, blocks, 4]` = position min, position max, segment min, segment max). Tokens with a negative segment are
padding and do not count; a block without tokens that count is empty and has position min > position max.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZES = (64, 128)
DEFAULT_BLOCK_SIZE = (128, 64)
TILE_ROWS = 32  # query rows below which matrix units have nothing to gain
_INT64 = torch.iinfo(torch.int64)


def num_blocks(length: int, block: int) -> int:
    """Blocks needed for `length` tokens, the last one possibly partial."""
    return (length + block - 1) // block


def traced_blocks(length: int, block: int) -> int:
    """`num_blocks` for the shape rules of ops.

    In an exported graph it is a size of its own: torch asks of every size whether it is 1, and a number of blocks
    computed from a symbolic length would answer by a guard that forbids short sequences.
    """
    if torch.compiler.is_exporting() and isinstance(length, torch.SymInt):
        return torch.library.get_ctx().new_dynamic_size()
    return num_blocks(length, block)


def default_positions(q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions when none are given: keys count from 0, queries are aligned to the end of the keys."""
    query = torch.arange(q_len, device=device) + (kv_len - q_len)
    return query[None], torch.arange(kv_len, device=device)[None]


def default_bounds(length: int, block: int, offset: int, device: torch.device) -> Tensor:
    """Bounds of consecutive positions `offset .. offset + length - 1` in one segment, `[1, blocks, 4]`."""
    first = torch.arange(num_blocks(length, block), device=device) * block
    last = (first + (block - 1)).clamp(max=length - 1)
    zero = torch.zeros_like(first)
    return torch.stack([first + offset, last + offset, zero, zero], dim=-1)[None]


@torch.library.custom_op("tamis::token_bounds", mutates_args=())
def token_bounds(positions: Tensor, segments: Tensor | None, block: int) -> Tensor:
    """Bounds of tokens with explicit positions `[batch | 1, seq]` (and segments, if any)."""
    if segments is None:
        segments = torch.zeros_like(positions)
    batch, length = max(positions.shape[0], segments.shape[0]), positions.shape[-1]
    positions, segments = positions.expand(batch, -1), segments.expand(batch, -1)
    counts = segments >= 0
    padding = num_blocks(length, block) * block - length

    def extreme(values: Tensor, largest: bool) -> Tensor:
        fill = _INT64.min if largest else _INT64.max
        # Not F.pad, which takes its number as a double: the largest integer would wrap.
        values = torch.cat([torch.where(counts, values, fill), values.new_full((values.shape[0], padding), fill)], -1)
        values = torch.unflatten(values, -1, (num_blocks(length, block), block))
        return values.amax(-1) if largest else values.amin(-1)

    columns = [extreme(values, largest) for values in (positions, segments) for largest in (False, True)]
    return torch.stack(columns, dim=-1)


@token_bounds.register_fake
def _fake_token_bounds(positions: Tensor, segments: Tensor | None, block: int) -> Tensor:
    batch = positions.shape[0] if segments is None else max(positions.shape[0], segments.shape[0])
    return positions.new_empty((batch, traced_blocks(positions.shape[1], block), 4))


def visible_blocks(q_bounds: Tensor, kv_bounds: Tensor, causal: bool, window: int | None) -> Tensor:
    """Block pairs that may hold a visible pair, bool `[batch | 1, q_blocks, kv_blocks]`.

    Positions of a pair of blocks differ by q - k in [q_min - k_max, q_max - k_min]; the pair is visible if that
    interval meets the allowed one, and if the segment intervals meet.
    """
    q_min, q_max, q_seg_min, q_seg_max = q_bounds[:, :, None].unbind(-1)
    k_min, k_max, k_seg_min, k_seg_max = kv_bounds[:, None, :].unbind(-1)
    seen = (q_min <= q_max) & (k_min <= k_max)
    seen = seen & (q_seg_min <= k_seg_max) & (k_seg_min <= q_seg_max)
    if causal:
        seen = seen & (q_max >= k_min)
    if window is not None:
        seen = seen & _ahead_less(q_min, k_max, window) & _ahead_less(k_min, q_max, window)
    return seen


def without_hidden(attn_mask: Tensor | None, kv_segments: Tensor | None) -> Tensor | None:
    """Key segments in which keys that a mask hides from every row are padding: they then shift no mean and no scale."""
    if attn_mask is None or attn_mask.numel() == 0:
        return kv_segments
    for dim in range(3):
        if attn_mask.stride(dim) == 0:  # an expanded axis says the same everywhere
            attn_mask = attn_mask.narrow(dim, 0, 1)
    best = attn_mask.amax((1, 2))
    shown = best if best.dtype == torch.bool else best != float("-inf")
    segments = torch.zeros_like(best, dtype=torch.int64) if kv_segments is None else kv_segments
    return torch.where(shown, segments, -1)


def visible_pairs(
    q_positions: Tensor,
    kv_positions: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    *,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Token pairs that are visible, bool `[batch | 1, queries, keys]`: for one tile at a time."""
    q_at, k_at = q_positions[:, :, None], kv_positions[:, None, :]
    seen = q_at >= k_at
    if not causal:
        seen = torch.ones_like(seen)
    if window is not None:
        seen = seen & _ahead_less(q_at, k_at, window) & _ahead_less(k_at, q_at, window)
    if q_segments is not None and kv_segments is not None:
        query, key = q_segments[:, :, None], kv_segments[:, None, :]
        seen = seen & (query == key) & (query >= 0)
    return seen


def sees_whole(
    q_positions: Tensor, q_segments: Tensor | None, kv_bounds: Tensor, *, causal: bool, window: int | None
) -> Tensor:
    """Key blocks of which a row sees every token that counts, bool `[batch | 1, queries, kv_blocks]`; none is empty."""
    q_at = q_positions[:, :, None]
    k_min, k_max, segment_min, segment_max = kv_bounds[:, None].unbind(-1)
    seen = (k_min <= k_max).expand(-1, q_at.shape[1], -1)
    if causal:
        seen = seen & (q_at >= k_max)
    if window is not None:
        seen = seen & _ahead_less(q_at, k_min, window) & _ahead_less(k_max, q_at, window)
    if q_segments is not None:
        segment = q_segments[:, :, None]
        seen = seen & (segment_min == segment) & (segment_max == segment)  # those that count are not negative
    return seen


def _ahead_less(this: Tensor, other: Tensor, window: int) -> Tensor:
    """this - other < window, right even where the difference does not fit 64 bits."""
    difference = this - other
    wrapped = ((this ^ other) & (this ^ difference)) < 0
    return torch.where(wrapped, this < other, difference < window)


def same_position_blocks(
    q_positions: Tensor,
    kv_positions: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    block_size: tuple[int, int],
) -> Tensor:
    """The diagonal for explicit positions: bool `[batch | 1, q_blocks, kv_blocks]`.

    A key block is on the diagonal of a query block if it holds a key at the position (and in the segment) of one of
    its rows. Where several keys share a position, every block between the first and the last of them is.
    """
    block_q, block_kv = block_size
    q_code, kv_code = _common_ranks(q_positions, kv_positions, q_segments, kv_segments)
    q_len, kv_len = q_code.shape[-1], kv_code.shape[-1]
    ordered, order = kv_code.sort(dim=-1, stable=True)
    first = torch.searchsorted(ordered, q_code, side="left")
    last = torch.searchsorted(ordered, q_code, side="right") - 1
    found = last >= first
    order = F.pad(order, (0, 1))
    first_block = order.gather(-1, first) // block_kv
    last_block = order.gather(-1, last.clamp(min=0)) // block_kv
    q_blocks, kv_blocks = num_blocks(q_len, block_q), num_blocks(kv_len, block_kv)
    # +1 where a run of kept blocks starts, -1 behind its end; two spare columns hold the ends, even without keys.
    width = kv_blocks + 2
    row = torch.arange(q_len, device=q_code.device) // block_q * width
    edges = torch.zeros(q_code.shape[0], q_blocks * width, dtype=torch.int32, device=q_code.device)
    step = found.to(torch.int32)
    edges = edges.scatter_add(-1, row + first_block, step).scatter_add(-1, row + last_block + 1, -step)
    return torch.unflatten(edges, -1, (q_blocks, width)).cumsum(-1)[..., :kv_blocks] > 0


def _common_ranks(
    q_positions: Tensor, kv_positions: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Numbers that are equal for a query and a key exactly if position and segment are."""

    def rank(query: Tensor, key: Tensor) -> Tensor:
        batch = max(query.shape[0], key.shape[0])
        both = torch.cat([query.expand(batch, -1), key.expand(batch, -1)], dim=-1)
        ordered, order = both.sort(dim=-1)
        changes = F.pad((ordered[:, 1:] != ordered[:, :-1]).to(torch.int64), (1, 0)).cumsum(-1)
        return torch.zeros_like(both).scatter(-1, order, changes)

    code = rank(q_positions, kv_positions)
    if q_segments is not None and kv_segments is not None:
        code = code + rank(q_segments, kv_segments) * code.shape[-1]
    q_len = q_positions.shape[-1]
    return code[:, :q_len].contiguous(), code[:, q_len:].contiguous()


@torch.library.custom_op("tamis::mask_blocks", mutates_args=())
def mask_blocks(attn_mask: Tensor, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
    """Block pairs in which an attention mask `[batch, heads, q_len | 1, kv_len | 1]` leaves anything visible, bool."""
    reduced = attn_mask
    for dim, block in ((-2, block_q), (-1, block_kv)):
        if reduced.shape[dim] > 1:
            reduced = _block_maxima(reduced, dim, block)
    seen = reduced if reduced.dtype == torch.bool else reduced != float("-inf")
    return seen.expand(-1, -1, num_blocks(q_len, block_q), num_blocks(kv_len, block_kv)).clone()


def _block_maxima(x: Tensor, dim: int, block: int) -> Tensor:
    """Maximum of every block along a dim, the last one possibly partial: few ops, and no copy of `x`."""
    blocks, rest = divmod(x.shape[dim], block)
    whole = torch.unflatten(x.narrow(dim, 0, blocks * block), dim, (blocks, block)).amax(dim)
    if rest == 0:
        return whole
    return torch.cat([whole, x.narrow(dim, blocks * block, rest).amax(dim, keepdim=True)], dim)


@mask_blocks.register_fake
def _fake_mask_blocks(attn_mask: Tensor, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Tensor:
    grid = (traced_blocks(q_len, block_q), traced_blocks(kv_len, block_kv))
    return attn_mask.new_empty((*attn_mask.shape[:2], *grid), dtype=torch.bool)
