"""PackedKV: quantised key and value that stay between calls, for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.call import flatten, refuse_gradients

TILE = 64


class PackedKV:
    """Key and value as int8, in blocks of 64 keys; made by `pack_kv`, given to `attend` in place of key and value.

    The mean key of each head is subtracted before quantising and stays as it was at packing. Keys have one scale per
    block, values one per channel per block, so `append` requantises only the last, unfinished block, which is
    therefore also kept as it came. Backends other than triton mix neighbouring channels of a key first: `tamis.mixing`.

    Attributes:
        tensors: key int8 `[batch, kv_heads, blocks, 64, dim]` (dim padded to 4), its scales and row sums, value int8
            `[batch, kv_heads, blocks, value_dim, 64]`, its scales and column sums, the mean key, and int64 `[2]`:
            `length` and `mixed`. Room for more blocks than the length needs may be there; it is never read.
        length: number of keys.
        mixed: how many neighbouring channels of a key, less its mean, are mixed; 1: none.
    """

    def __init__(
        self, tensors: Sequence[Tensor], length: int, mixed: int, tail: tuple[Tensor, Tensor], backend: str
    ) -> None:
        """`tensors`: the first seven."""
        self.tensors = (*tensors, _numbers(length, mixed))
        self.length = length
        self.mixed = mixed
        self._tail = tail
        self._backend = backend

    @property
    def capacity(self) -> int:
        """Keys that fit without allocating."""
        return self.tensors[0].shape[2] * TILE

    def append(self, key: Tensor, value: Tensor) -> PackedKV:
        """Add keys and values at the end, in place; full blocks are never requantised.

        Args:
            key, value: `[batch, kv_heads, new, dim]`, as packed before.

        Returns:
            The same object.

        Raises:
            ValueError: shapes differ from what was packed. TypeError: the dtype does, or there is no tensor.
            UnsupportedError: an input requires grad.

        Example:
            >>> import torch, tamis
            >>> key, value = torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
            >>> packed = tamis.pack_kv(key, value)
            >>> packed.append(key[:, :, :1], value[:, :, :1]).length
            101
        """
        check_tensor(key, "key")
        check_tensor(value, "value")
        refuse_gradients(key=key, value=value)
        key, value = flatten(key.detach()), flatten(value.detach())
        for name, new, old in (("key", key, self._tail[0]), ("value", value, self._tail[1])):
            if new.dtype != old.dtype:
                raise TypeError(f"{name} is {new.dtype}, packed was {old.dtype}: they must agree")
            if new.shape[:2] != old.shape[:2] or new.shape[3] != old.shape[3]:
                batch, heads, _, dim = old.shape
                raise ValueError(
                    f"{name} must be [{batch}, {heads}, new tokens, {dim}] as packed before, got {tuple(new.shape)}"
                )
            if new.device != old.device:
                raise ValueError(f"{name} is on {new.device}, packed on {old.device}: they must agree")
        if value.shape[2] != key.shape[2]:
            raise ValueError(f"value has length {value.shape[2]} and key {key.shape[2]}: they must agree")
        fresh = tuple(torch.cat(pair, dim=2) for pair in zip(self._tail, (key, value), strict=True))
        blocks = torch.ops.tamis.pack_kv(fresh[0], fresh[1], self.tensors[6], None, self._backend)
        first = self.length // TILE
        length = self.length + key.shape[2]
        self._reserve(geometry.num_blocks(length, TILE))
        for store, new in zip(self.tensors, blocks, strict=False):
            store[:, :, first : first + new.shape[2]] = new
        self.length = length
        self.tensors = (*self.tensors[:7], _numbers(length, self.mixed))
        self._tail = tails(*fresh)
        return self

    def _reserve(self, blocks: int) -> None:
        """Make room that may be written: an eighth more at least, so that appending copies a block rarely."""
        have = self.tensors[0].shape[2]
        if blocks <= have:
            if not torch.is_inference_mode_enabled():
                # What torch.inference_mode() made cannot be written outside of it.
                stores = (store.clone() if store.is_inference() else store for store in self.tensors[:6])
                self.tensors = (*stores, *self.tensors[6:])
            return
        extra = max(blocks - have, have // 8)
        grown = (F.pad(store, (0, 0) * (store.dim() - 3) + (0, extra)) for store in self.tensors[:6])
        self.tensors = (*grown, *self.tensors[6:])

    def __repr__(self) -> str:
        batch, heads, dim = self.tensors[6].shape
        return (
            f"PackedKV(batch={batch}, kv_heads={heads}, length={self.length}, head_dim={dim}, "
            f"value_dim={self.tensors[4].shape[-1]}, precision='int8')"
        )


def check_tensor(tensor: Tensor, name: str) -> None:
    """Raise unless it is a strided tensor `[.., seq, dim]`: what must hold before a shape can be looked at."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_layout(tensor, name)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must be [.., seq, dim], got shape {tuple(tensor.shape)}")


def check_layout(tensor: object, name: str) -> None:
    """Raise for a tensor in a sparse layout; what is no tensor is not looked at."""
    if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
        raise TypeError(f"{name} must be strided, got {tensor.layout}")


def _numbers(length: int, mixed: int) -> Tensor:
    """Both as the ops take them: on the CPU, so that reading them waits for no device."""
    return torch.tensor([length, mixed], dtype=torch.int64)


def tails(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values of the unfinished last block."""
    start = key.shape[2] // TILE * TILE
    return key[:, :, start:].detach().clone(), value[:, :, start:].detach().clone()
