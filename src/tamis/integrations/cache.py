"""A cache of transformers that keeps the mean key of every block, for `Decode`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from tamis.integrations.decoding import KeyMeans


class MeansLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' own, as below
    """One layer's growing keys and values, written into room that is kept, with the mean key of every block of 64.

    Whatever replaces `keys` from outside (beam search, cropping) is noticed at the next update, which then makes room
    and means anew. Offloading takes the means along and gives the room up.
    """

    def __init__(self, layer: DynamicLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self.means: KeyMeans | None = None
        if layer is not None and layer.keys is not None and layer.values is not None:
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values `[batch, kv_heads, new, head_dim]`; returns all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or (self.is_initialized and self._recorded())):
            self._room = self._seen = self.means = None  # what is written in place has no derivative
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self._seen is None or self._seen[0] is not self.keys or self._seen[1] is not self.values:
            self._room = self.means = None
        old = self.get_seq_length()
        length = old + key_states.shape[2]
        room = self._room
        if room is not None and room[0].is_inference() and not torch.is_inference_mode_enabled():
            room = self.means = None  # what inference mode made is not written outside of it
        if room is None or length > room[0].shape[2]:
            room = _grown(self.keys, key_states, old, length), _grown(self.values, value_states, old, length)
        room[0][:, :, old:length] = key_states
        room[1][:, :, old:length] = value_states
        keys, values = room[0][:, :, :length], room[1][:, :, :length]
        if self.means is None:
            self.means = KeyMeans.of(keys)
        else:
            self.means.extend(keys)
        keys.tamis_means = self.means  # type: ignore[attr-defined]  # how it reaches the attention function
        self._room, self._seen = room, (keys, values)
        self.keys, self.values = keys, values
        return keys, values

    def _recorded(self) -> bool:
        return self.keys is not None and self.keys.requires_grad

    def offload(self) -> None:
        """Move keys, values and means to the host; the device keeps nothing."""
        before = self.keys
        super().offload()  # type: ignore[no-untyped-call]
        self._followed(before)

    def prefetch(self) -> None:
        """Move keys, values and means back to their device."""
        before = self.keys
        super().prefetch()  # type: ignore[no-untyped-call]
        self._followed(before)

    def _followed(self, before: Tensor | None) -> None:
        """Be where the keys went, if they went anywhere."""
        if self.keys is before or self.keys is None or self.values is None:
            return
        current = self._seen is not None and self._seen[0] is before
        self._room = self._seen = None
        if current and self.means is not None:
            # Another one: attention of the call that is under way still reads the means where they were.
            self.means = KeyMeans(self.means.means.to(self.keys.device, non_blocking=True), self.means.length)
            self._seen = (self.keys, self.values)
        else:
            self.means = None

    def __copy__(self) -> MeansLayer:
        """Another layer of the same keys, with room of its own."""
        return MeansLayer(self)

    def reset(self) -> None:
        """Forget all keys and values."""
        super().reset()
        self._room = self._seen = self.means = None


def _grown(have: Tensor, new: Tensor, old: int, length: int) -> Tensor:
    """Room for `length` tokens and an eighth more, with the first `old` of `have` in it."""
    batch, heads, _, dim = new.shape
    dtype = torch.promote_types(have.dtype, new.dtype) if old else new.dtype
    room = new.new_empty(batch, heads, length + max(length // 8, 256), dim, dtype=dtype)
    if old:
        room[:, :, :old] = have
    return room


def keep_means(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: the growing layers of the cache that a model is called with keep means from here on."""
    for cache in (*args, *kwargs.values()):
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache  # the part of it that grows
        if not isinstance(cache, Cache):
            continue
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = MeansLayer
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[number] = MeansLayer(layer)
