"""Native arguments of one call, kept as bytes: a call of the same form changes the addresses in them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.cpu import attention, library, native, prediction
from tamis.call import Call

_MOST_KEPT = 1 << 16  # bytes of one record


@dataclass(frozen=True)
class AttendRecord:
    """An `attend` without masks of tokens, positions, segments and sinks.

    Attributes:
        template: the bytes of `native.Attend`.
        kept: what the template points to and no call replaces.
        heads: of the query.
        group: key heads, where one query of each head is a row of its key head's block; else 0.
        rooms: shape and strides, and dtype, of output, log-sum-exp and counts.
        entry: the function and the target.
    """

    template: bytes
    kept: list[object]
    heads: int
    group: int
    rooms: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], torch.dtype]]
    entry: tuple[Callable[[bytes, object], int], bytes]

    @classmethod
    def of(cls, call: Call) -> AttendRecord | None:
        """The record of a call that went well, or None if its tensors would have to be copied."""
        if call.kv_indices is not None and call.kv_indices.stride(-1) != 1:
            return None
        if not all(t.is_contiguous() for t in call.packed):
            return None
        grouped = attention.groups(call.query, call.num_kv_heads, call.kv_num_blocks, call.window, call.pv_threshold)
        args, kept = attention.attend_args(
            attention.group(call.query, call.num_kv_heads) if grouped else call.query,
            (call.key, call.value, call.packed),
            (call.kv_num_blocks, call.kv_indices),
            call.block_size,
            (call.causal and not grouped, call.window),
            (None,) * 7,
            (call.scale, call.softcap, None, None, call.pv_threshold),
            call.precision,
            bf16_products=call.q_len >= geometry.TILE_ROWS,
        )
        rooms = [(_dense(shape), dtype) for shape, dtype in attention.result_shapes(args, call.query.dtype)]
        # Tensors of the call itself are the next call's business: only the threshold stays.
        group = call.num_kv_heads if grouped else 0
        return cls(bytes(args), kept[-1:], call.num_heads, group, rooms, library.entry("attend"))

    def run(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        packed: Sequence[Tensor],
        lists: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and counts of a call of the recorded form."""
        args = native.Attend.from_buffer_copy(self.template)
        rows = attention.group(query, self.group) if self.group else query
        args.query.data = rows.data_ptr()
        if key is None or value is None:
            args.packed = attention.packed_struct(packed, args.packed.mixed)
        else:
            args.key.data, args.value.data = key.data_ptr(), value.data_ptr()
        if lists is not None:
            args.kv_num_blocks, args.kv_indices = lists[0].data_ptr(), lists[1].data_ptr()
            # As wide as they are; an axis that all share stays one.
            args.max_blocks = lists[1].shape[3]
            args.idx_stride[:] = [
                new if old else 0 for old, new in zip(args.idx_stride, lists[1].stride(), strict=False)
            ]
        # Twice as fast as torch.empty.
        output, lse, counts = (torch.empty_strided(*room, dtype=dtype) for room, dtype in self.rooms)
        args.output, args.lse, args.counts = output.data_ptr(), lse.data_ptr(), counts.data_ptr()
        function, target = self.entry
        native.check(function(target, ctypes.byref(args)))
        return attention.ungroup(output, lse, counts, self.heads) if self.group else (output, lse, counts)


@dataclass(frozen=True)
class PredictRecord:
    """A `predict` without masks of tokens, positions and segments.

    Attributes:
        template: the bytes of `native.Predict`.
        kept: what the template points to and no call replaces.
        counts: shape of the counts.
        room: bytes of all that the prediction writes beside its counts.
        at: where in there are the mean key, the bits, and means and similarities of query and key blocks.
        block_size: of the lists.
        entry: the function and the target.
    """

    template: bytes
    kept: list[Tensor | None]
    counts: tuple[int, ...]
    room: int
    at: tuple[int, ...]
    block_size: tuple[int, int]
    entry: tuple[Callable[[bytes, object], int], bytes]

    @classmethod
    def of(cls, call: Call, choice: prediction.Choice) -> PredictRecord | None:
        """The record of a call that went well, or None if too much would have to be kept for it."""
        assert call.key is not None
        must = choice[-1]
        if must is not None and must.nbytes > _MOST_KEPT:
            return None
        args, kept = prediction.predict_args(call.query, call.key, (None, None), choice, call.block_size, (None, None))
        num, bits, mean, *summaries = (kept[i] for i in prediction.WRITTEN)
        assert num is not None
        at, room = [], 0
        for part in (mean, bits, *summaries):
            assert part is not None
            at.append(room)
            room += -(-part.nbytes // 64) * 64
        settings = [t for t in kept if not any(t is written for written in (num, bits, mean, *summaries))]
        return cls(bytes(args), settings, tuple(num.shape), room, tuple(at), call.block_size, library.entry("predict"))

    def run(self, query: Tensor, key: Tensor, trim: bool) -> tuple[Tensor, Tensor]:
        """Lists of a call of the recorded form."""
        args = native.Predict.from_buffer_copy(self.template)
        scratch = torch.empty(self.room, dtype=torch.uint8)
        num = torch.empty(self.counts, dtype=torch.int32)
        base, chosen = scratch.data_ptr(), args.select
        mean, bits, q_means, q_similarity, k_means, k_similarity = (base + offset for offset in self.at)
        args.query.x.data = query.data_ptr()
        args.key_mean.x.data = args.key.x.data = key.data_ptr()
        args.key_mean.means = args.key.mean = mean
        args.query.means = chosen.q_means = q_means
        args.query.similarity = chosen.q_similarity = q_similarity
        args.key.means = chosen.k_means = k_means
        args.key.similarity = chosen.k_similarity = k_similarity
        chosen.bits, chosen.kv_num_blocks = bits, num.data_ptr()
        function, target = self.entry
        native.check(function(target, ctypes.byref(args)))
        return num, prediction.indices(args, bits, num, trim)


def _dense(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and the strides of a dense tensor, without making one: outputs are large."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    return shape, tuple(strides[::-1])
