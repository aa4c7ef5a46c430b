"""BlockMask: which blocks of the attention map are computed, in FlexAttention's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis import geometry
from tamis.call import check_block_size

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

_SHADES = " ░▒▓█"
_PICTURE = (24, 64)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """The key blocks that each block of queries visits.

    Args:
        kv_num_blocks: int32 `[batch | 1, heads | 1, q_blocks]`, how many key blocks each query block visits.
        kv_indices: int32 `[batch | 1, heads | 1, q_blocks, max_blocks]`, which ones: strictly ascending up to the
            count, whatever behind it. max_blocks is at least 1.
        block_size: tokens per (query block, key block), each 64 or 128.
        seq_lens: (q_len, kv_len) in tokens; the last blocks may be partial.

    A mask says only what is skipped. Causality, windows and the like hold per token inside the blocks it keeps and are
    arguments of `attend`. Making a mask checks shapes and dtypes; `validate` also reads the values.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape than the lengths and block sizes ask for.

    Example:
        >>> import torch, tamis
        >>> keep = torch.ones(4, 8, dtype=torch.bool).tril(1)
        >>> mask = tamis.BlockMask.from_dense(keep, block_size=(128, 64), seq_lens=(512, 512))
        >>> mask.density()
        0.4375
        >>> query, key, value = (torch.randn(1, 2, 512, 32) for _ in range(3))
        >>> tamis.attend(query, key, value, mask).output.shape
        torch.Size([1, 2, 512, 32])
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int]
    seq_lens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("kv_num_blocks", "kv_indices"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be an int32 tensor, got {kind}")
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        object.__setattr__(self, "seq_lens", _check_lens(self.seq_lens))
        if torch.compiler.is_compiling():
            return  # Sizes of a traced graph are symbols: comparing them would fix what must stay free.
        counts, indices = self.kv_num_blocks.shape, self.kv_indices.shape
        q_blocks = self.grid[0]
        if len(counts) != 3 or counts[2] != q_blocks:
            raise ValueError(
                f"kv_num_blocks must be [batch, heads, {q_blocks}] for {self.seq_lens[0]} queries in blocks of "
                f"{self.block_size[0]}, got {tuple(counts)}"
            )
        if len(indices) != 4 or indices[:3] != counts or indices[3] < 1:
            raise ValueError(
                f"kv_indices must be [{counts[0]}, {counts[1]}, {q_blocks}, max_blocks] with max_blocks at least 1, "
                f"got {tuple(indices)}"
            )
        if self.kv_indices.device != self.kv_num_blocks.device:
            raise ValueError(
                f"kv_indices is on {self.kv_indices.device} and kv_num_blocks on {self.kv_num_blocks.device}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(q_blocks, kv_blocks)."""
        q_len, kv_len = self.seq_lens
        return geometry.num_blocks(q_len, self.block_size[0]), geometry.num_blocks(kv_len, self.block_size[1])

    @staticmethod
    def from_dense(
        dense: Tensor,
        block_size: tuple[int, int] = geometry.DEFAULT_BLOCK_SIZE,
        seq_lens: tuple[int, int] | None = None,
    ) -> BlockMask:
        """Make a mask from a bool table of blocks.

        Args:
            dense: bool `[q_blocks, kv_blocks]`, `[heads, ..]` or `[batch, heads, ..]`, True where a block is kept.
            block_size: tokens per (query block, key block).
            seq_lens: (q_len, kv_len); by default the blocks are all full.

        Raises:
            TypeError: dense is not bool.
            ValueError: its shape does not fit the lengths.
        """
        if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
            kind = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
            raise TypeError(f"dense must be a bool tensor, got {kind}")
        if dense.dim() not in (2, 3, 4):
            raise ValueError(f"dense must be [.., q_blocks, kv_blocks] with 2 to 4 dims, got {tuple(dense.shape)}")
        block_size = check_block_size(block_size)
        dense = dense[(None,) * (4 - dense.dim())]
        if seq_lens is None:
            seq_lens = (dense.shape[2] * block_size[0], dense.shape[3] * block_size[1])
        seq_lens = _check_lens(seq_lens)
        grid = tuple(geometry.num_blocks(length, block) for length, block in zip(seq_lens, block_size, strict=True))
        if dense.shape[2] != grid[0] or dense.shape[3] != grid[1]:
            raise ValueError(
                f"dense has {tuple(dense.shape[2:])} blocks, lengths {tuple(seq_lens)} in blocks of {block_size} "
                f"need {grid}"
            )
        return BlockMask(*block_lists(dense, trim=may_trim(dense.device)), block_size, seq_lens)

    def to_dense(self) -> Tensor:
        """The mask as a bool table `[batch | 1, heads | 1, q_blocks, kv_blocks]`."""
        return dense_blocks(self.kv_num_blocks, self.kv_indices, self.grid[1])

    def density(self, causal: bool = False) -> float:
        """Kept share of the visible block pairs, in [0, 1]; 0 if none is visible.

        With `causal=True` blocks that lie wholly in the future (bottom-right aligned) are not counted on either side.
        """
        kept = self.to_dense()
        visible = self._visible(causal).expand_as(kept)
        total = int(visible.sum())
        return int((kept & visible).sum()) / total if total else 0.0

    def validate(self) -> BlockMask:
        """Check the values (this reads them, so it synchronises a device) and return the mask.

        Raises:
            ValueError: a count or an index is out of range, or indices are not strictly ascending.
        """
        check_lists(self.kv_num_blocks, self.kv_indices, self.grid[1])
        return self

    def to_flex(self, causal: bool = False) -> FlexBlockMask:
        """Make the FlexAttention mask of the same blocks.

        With `causal=True` the blocks on the (bottom-right aligned) causal diagonal are partial ones with the causal
        rule, and those in the future are dropped; all others are full blocks, which no token rule touches.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        kept = self.to_dense() & self._visible(causal)
        full = kept & self._whole(causal)
        offset = self.seq_lens[1] - self.seq_lens[0]

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query + offset >= key if causal else query >= 0

        partial_counts, partial_indices = block_lists(kept & ~full, trim=False)
        full_counts, full_indices = block_lists(full, trim=False)
        return FlexBlockMask.from_kv_blocks(
            partial_counts,
            partial_indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=self.block_size,
            mask_mod=rule,
            seq_lengths=self.seq_lens,
        )

    @staticmethod
    def from_flex(mask: FlexBlockMask, causal: bool = False) -> BlockMask:
        """Make a mask from a FlexAttention mask.

        A `BlockMask` has no rule for tokens inside a block, so a partial block is accepted only if its rule is what
        `attend(.., causal=causal)` does there anyway.

        Raises:
            ValueError: a partial block has another rule, a full block crosses the causal diagonal, or the block size
                is not made of 64 and 128.
        """
        block_size = check_block_size(mask.BLOCK_SIZE)
        q_len, kv_len = (int(length) for length in mask.seq_lengths)
        kv_blocks = geometry.num_blocks(kv_len, block_size[1])
        partial = dense_blocks(mask.kv_num_blocks, mask.kv_indices, kv_blocks)
        full = torch.zeros_like(partial)
        if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
            full = dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, kv_blocks)
        made = BlockMask.from_dense(partial | full, block_size, (q_len, kv_len))
        if causal and bool((full & ~made._whole(causal)).any()):
            raise ValueError("mask has full blocks that cross the causal diagonal: they cannot be kept whole")
        _check_partial(partial, mask.mask_mod, block_size, (q_len, kv_len), causal)
        return made

    def _bounds(self) -> tuple[Tensor, Tensor]:
        (q_len, kv_len), (block_q, block_kv), device = self.seq_lens, self.block_size, self.kv_indices.device
        q_bounds = geometry.default_bounds(q_len, block_q, kv_len - q_len, device)
        return q_bounds, geometry.default_bounds(kv_len, block_kv, 0, device)

    def _visible(self, causal: bool) -> Tensor:
        return geometry.visible_blocks(*self._bounds(), causal, None)[:, None]

    def _whole(self, causal: bool) -> Tensor:
        """Blocks of which every pair is visible."""
        q_bounds, kv_bounds = self._bounds()
        if not causal:
            return torch.ones(1, 1, *self.grid, dtype=torch.bool, device=q_bounds.device)
        return (q_bounds[:, :, None, 0] >= kv_bounds[:, None, :, 1])[:, None]

    def __repr__(self) -> str:
        batch, heads, _ = self.kv_num_blocks.shape
        head = (
            f"BlockMask(batch={batch}, heads={heads}, seq_lens={self.seq_lens}, block_size={self.block_size}, "
            f"density={self.density():.3f}, causal density={self.density(causal=True):.3f})"
        )
        return "\n".join([head, *self._picture()])

    def _picture(self) -> list[str]:
        """The kept share of each patch of blocks, over all heads, as one character."""
        kept = self.to_dense()
        if kept.numel() == 0:
            return []
        share = kept.to(torch.float32).mean(dim=(0, 1))[None]
        size = (min(share.shape[1], _PICTURE[0]), min(share.shape[2], _PICTURE[1]))
        share = torch.nn.functional.adaptive_avg_pool2d(share, size)[0]
        # The blank means "nothing kept": a patch with anything in it gets at least the lightest shade.
        levels = (share * (len(_SHADES) - 1)).ceil().to(torch.int64).tolist()
        return ["".join(_SHADES[level] for level in row) for row in levels]


def _check_lens(seq_lens: Sequence[int]) -> tuple[int, int]:
    if not isinstance(seq_lens, (tuple, list)):
        raise TypeError(f"seq_lens must be (q_len, kv_len), got {type(seq_lens).__name__}")
    if len(seq_lens) != 2:
        raise ValueError(f"seq_lens must be (q_len, kv_len), got {tuple(seq_lens)}")
    if torch.compiler.is_compiling():
        return seq_lens[0], seq_lens[1]  # These may be symbols.
    for length in seq_lens:
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"seq_lens must be two integers, got {tuple(seq_lens)}")
        if length < 0:
            raise ValueError(f"seq_lens must not be negative, got {tuple(seq_lens)}")
    return seq_lens[0], seq_lens[1]


def may_trim(device: torch.device) -> bool:
    """Whether finding the largest count is free: not in a traced graph, not where it would synchronise a device."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def block_lists(dense: Tensor, trim: bool) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of the True entries of a bool table `[.., kv_blocks]`, both int32.

    The tail of the indices holds the blocks that are not kept, so it never points outside. With `trim` the lists are
    cut to the largest count, at least 1.
    """
    counts = dense.sum(-1, dtype=torch.int32)
    if dense.shape[-1] == 0:
        return counts, torch.zeros((*dense.shape[:-1], 1), dtype=torch.int32, device=dense.device)
    indices = (~dense).to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32)
    if trim:
        most = max(1, int(counts.max())) if counts.numel() else 1
        indices = indices[..., :most].contiguous()
    return counts, indices


def dense_blocks(kv_num_blocks: Tensor, kv_indices: Tensor, kv_blocks: int) -> Tensor:
    """The bool table `[.., kv_blocks]` of lists; whatever stands behind the counts is ignored."""
    used = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    target = torch.where(used, kv_indices, kv_blocks).to(torch.int64)
    table = torch.zeros((*kv_num_blocks.shape, kv_blocks + 1), dtype=torch.bool, device=kv_indices.device)
    return table.scatter(-1, target, True)[..., :kv_blocks]


def check_lists(kv_num_blocks: Tensor, kv_indices: Tensor, kv_blocks: int) -> None:
    """Raise ValueError if counts or indices are out of range or indices do not ascend."""
    width = kv_indices.shape[-1]
    if bool(((kv_num_blocks < 0) | (kv_num_blocks > width)).any()):
        low, high = int(kv_num_blocks.min()), int(kv_num_blocks.max())
        raise ValueError(f"kv_num_blocks must be in 0..{width} (max_blocks), got values from {low} to {high}")
    used = torch.arange(width, device=kv_indices.device) < kv_num_blocks[..., None]
    bad = used & ((kv_indices < 0) | (kv_indices >= kv_blocks))
    if bool(bad.any()):
        raise ValueError(f"kv_indices must be in 0..{kv_blocks - 1}, got {int(kv_indices[bad][0])}")
    if bool((used[..., 1:] & (kv_indices[..., 1:] <= kv_indices[..., :-1])).any()):
        raise ValueError("kv_indices must be strictly ascending up to kv_num_blocks in every row")


def _check_partial(
    partial: Tensor,
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    block_size: tuple[int, int],
    seq_lens: Sequence[int],
    causal: bool,
) -> None:
    """Raise if a partial block's rule differs from `q_position >= kv_position` (causal) or from "everything"."""
    rows = torch.arange(block_size[0], device=partial.device)[:, None]
    columns = torch.arange(block_size[1], device=partial.device)[None]
    for batch, head, q_block, kv_block in partial.nonzero().tolist():
        query, key = rows + q_block * block_size[0], columns + kv_block * block_size[1]
        inside = (query < seq_lens[0]) & (key < seq_lens[1])
        wanted = query + (seq_lens[1] - seq_lens[0]) >= key if causal else torch.ones_like(inside)
        where = (torch.tensor(batch, device=partial.device), torch.tensor(head, device=partial.device))
        found = rule(*where, query.clamp(max=seq_lens[0] - 1), key.clamp(max=seq_lens[1] - 1))
        if bool((inside & (found != wanted)).any()):
            raise ValueError(
                f"mask has a partial block at batch {batch}, head {head}, query block {q_block}, key block {kv_block} "
                f"whose rule is not {'causality' if causal else 'to keep everything'}: a BlockMask keeps whole blocks"
            )
