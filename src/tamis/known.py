"""Attention calls of a form that came before: no checks, no dispatcher; see `tamis.backends.replay`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.backends import replay
from tamis.block_mask import BlockMask
from tamis.call import Call
from tamis.packed import PackedKV
from tamis.stats import AttentionOutput, AttentionStats


def form(
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | None,
    block_mask: BlockMask | None,
    backend: str | None,
    settings: tuple[object, ...],
) -> replay.Form | None:
    """The form of a call without masks of tokens, positions, segments, sinks and compensation; None if it has none.

    The arguments are as the caller gave them: anything.
    """
    if type(query) is not Tensor or query.dim() != 4 or (block_mask is not None and type(block_mask) is not BlockMask):
        return None
    lists = None if block_mask is None else (block_mask.kv_num_blocks, block_mask.kv_indices)
    shape = None if block_mask is None else (block_mask.block_size, block_mask.seq_lens)
    if type(key) is not PackedKV:
        return replay.form((query, key, value), backend, settings, shape, lists=lists)
    if value is not None:
        return None
    return replay.form((query, *key.tensors[:7]), backend, settings, shape, (key.length, key.mixed), lists=lists)


@dataclass(frozen=True)
class Known:
    """An attention call that can be made again with other tensors.

    Attributes:
        stats: what it reported, without its counts.
    """

    record: replay.AttendRecord
    stats: AttentionStats

    @classmethod
    def of(cls, call: Call, stats: AttentionStats) -> Known | None:
        """What stays of a call that went well; None if its tensors had to be copied first."""
        record = replay.AttendRecord.of(call)
        return None if record is None else cls(record, stats.with_counts(torch.empty(0)))

    def run(
        self, query: Tensor, key: Tensor | PackedKV, value: Tensor | None, block_mask: BlockMask | None
    ) -> AttentionOutput:
        """The same call of other tensors."""
        lists = None if block_mask is None else (block_mask.kv_num_blocks, block_mask.kv_indices)
        packed = key.tensors if isinstance(key, PackedKV) else ()
        plain = None if isinstance(key, PackedKV) else key
        output, lse, counts = self.record.run(query, plain, value, packed, lists)
        return AttentionOutput(output, lse, self.stats.with_counts(counts))


RECORDS: replay.Memory[Known] = replay.Memory()
