"""Bytes that the kernels before attention ask memory for, and the least that would do.

Counted is what their loads and stores name, by formulas that a test holds against every access in Triton's interpreter.
The least is each input once, the key and the value twice (a mean, or a largest entry, of the whole sequence comes
before the rounding that it decides), and each result once. What is asked for above that comes from a cache where it
is near: means of blocks, which tiles of scores share, and parts that are put together. Without segments, `used` and
`must`, as in `tamis bench gpu`, and for rows that are not copied first: those of more than 128 channels that can't be
loaded by 16 bytes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tamis.backends.triton.launch import power
from tamis.backends.triton.lists import COLUMNS, ROWS, chunk_of
from tamis.backends.triton.prepare import CHUNK_TILES, SLICE, TILE
from tamis.geometry import num_blocks


class Moved(NamedTuple):
    """What one kernel reads and writes, in bytes."""

    kernel: str
    read: int
    written: int


@dataclass(frozen=True)
class Prologue:
    """A call, as far as it decides what is moved before attention.

    Attributes:
        entry: bytes of an entry of query, key and value.
        rounds: whether query and key are rounded to int8.
        kept: blocks in the lists of all heads together.
        criteria: how many of cdf and topk choose.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    entry: int = 2
    rounds: bool = True
    kept: int = 0
    cdf: bool = False
    topk: bool = True
    block_size: tuple[int, int] = (128, 64)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return num_blocks(self.q_len, self.block_size[0]), num_blocks(self.kv_len, self.block_size[1])

    def visible(self, causal: bool) -> int:
        """Pairs of blocks of one head that hold a visible pair, under causality with as many queries as keys."""
        (q_blocks, kv_blocks), (block_q, block_kv) = self.blocks, self.block_size
        if not causal:
            return q_blocks * kv_blocks
        return sum(num_blocks(min((i + 1) * block_q, self.kv_len), block_kv) for i in range(q_blocks))


def prediction(call: Prologue) -> list[Moved]:
    """The kernels of a prediction, which also round query and key."""
    return [*_columns(call, call.head_dim, is_key=True), _digest(call), _scores(call), _choose(call)]


def values(call: Prologue) -> list[Moved]:
    """The kernels that round value to e4m3."""
    tiles, pad = num_blocks(call.kv_len, TILE), power(call.value_dim)
    heads = call.batch * call.kv_heads
    read = heads * (call.kv_len * call.value_dim * call.entry + tiles * pad * 4)
    rounded = Moved("value_fp8_kernel", read, heads * tiles * TILE * pad)
    return [*_columns(call, call.value_dim, is_key=False), rounded]


def least_prediction(call: Prologue) -> int:
    """Query once and key twice; in 8 bits both once, with two numbers a query row and one per 64 keys; the lists."""
    rows, keys = call.batch * call.heads * call.q_len, call.batch * call.kv_heads * call.kv_len
    read = (rows + 2 * keys) * call.head_dim * call.entry
    scales = 8 * rows + 4 * call.batch * call.kv_heads * num_blocks(call.kv_len, TILE)
    rounded = (rows + keys) * call.head_dim + scales if call.rounds else 0
    return read + rounded + 4 * (call.kept + call.batch * call.heads * call.blocks[0])


def least_values(call: Prologue) -> int:
    """Value twice, and once in 8 bits with a scale per channel."""
    channels = call.batch * call.kv_heads * call.value_dim
    return channels * (call.kv_len * (2 * call.entry + 1) + 4)


def _columns(call: Prologue, dim: int, *, is_key: bool) -> Iterable[Moved]:
    """The sums or maxima of chunks, and what they are put together to; keys are counted too."""
    chunks, heads = num_blocks(num_blocks(call.kv_len, TILE), CHUNK_TILES), call.batch * call.kv_heads
    slices = num_blocks(power(dim), SLICE)
    yield Moved(
        "columns_kernel", heads * call.kv_len * dim * call.entry, heads * chunks * 4 * (dim + (1 if is_key else 0))
    )
    read = heads * chunks * 4 * (dim + (slices if is_key else 0))
    yield Moved("join_kernel", read, heads * 4 * (dim if is_key else power(dim)))


def _digest(call: Prologue) -> Moved:
    """Query and key; the mean key is read for each 64 keys, and for each 64 queries that are multiplied by it."""
    (q_blocks, kv_blocks), dim = call.blocks, call.head_dim
    q_heads, kv_heads = call.batch * call.heads, call.batch * call.kv_heads
    q_tiles, kv_tiles = (n * size // TILE for n, size in zip(call.blocks, call.block_size, strict=True))
    read = (q_heads * call.q_len + kv_heads * call.kv_len) * dim * call.entry + kv_heads * kv_tiles * dim * 4
    written = (q_heads * q_blocks + kv_heads * kv_blocks) * (dim + 1) * 4
    if call.rounds:
        width = power(dim, 32)
        read += q_heads * q_tiles * dim * 4
        written += q_heads * call.q_len * (width + 8) + kv_heads * kv_tiles * (TILE * width + 4)
    return Moved("digest_kernel", read, written)


def _scores(call: Prologue) -> Moved:
    """Means of blocks as often as there are tiles of scores beside or above each other."""
    q_blocks, kv_blocks = call.blocks
    across, down = num_blocks(kv_blocks, COLUMNS), num_blocks(q_blocks, ROWS)
    row = call.head_dim * 4
    read = q_blocks * row * across + kv_blocks * (row + 4) * down + 4 * across * down
    return Moved("scores_kernel", call.batch * call.heads * read, call.batch * call.heads * q_blocks * kv_blocks * 4)


def _choose(call: Prologue) -> Moved:
    """A row once; one that does not stay in registers again for its maximum, for each sum, and for its list."""
    q_blocks, kv_blocks = call.blocks
    chunk, rows = chunk_of(kv_blocks), call.batch * call.heads * q_blocks
    row = min(kv_blocks, chunk)
    if kv_blocks > chunk:
        row += kv_blocks * (2 + 34 * call.cdf + 33 * call.topk)
    return Moved("choose_kernel", rows * 4 * (row + 2 + call.cdf + call.topk), 4 * (call.kept + rows))


def total(moved: Iterable[Moved]) -> int:
    """Bytes of all kernels together."""
    return sum(kernel.read + kernel.written for kernel in moved)
