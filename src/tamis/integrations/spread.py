"""Attention of a model whose tokens are spread over the ranks of a process group."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from tamis.errors import UnsupportedError
from tamis.integrations.request import Request, dense
from tamis.integrations.shards import Shards
from tamis.predictors.base import also_keep
from tamis.profile import LayerSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from tamis.parallel.wire import Peers


class Spread:
    """Every rank has its part of the sequence, in the order of the ranks.

    What a call asks for is done for the whole sequence or refused, on all ranks: dense attention of a part alone would
    be wrong.

    Args:
        mesh: of one dimension, over the ranks; or their process group.
        mode: "heads" or "ring", as in `tamis.parallel.attend`.

    Raises:
        TypeError: mesh is neither.
        ValueError: the mesh has several dimensions, or there is no process group.
    """

    def __init__(self, mesh: DeviceMesh | ProcessGroup, mode: str) -> None:
        from torch.distributed import ProcessGroup
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, (DeviceMesh, ProcessGroup)):
            raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {type(mesh).__name__}")
        self.mode = mode
        self._mesh = mesh if isinstance(mesh, DeviceMesh) else None
        self._group = None if isinstance(mesh, DeviceMesh) else mesh
        self.shards = Shards(lambda: self.peers)
        assert self.peers.size > 0

    @cached_property
    def peers(self) -> Peers:
        """The ranks as this one sees them."""
        from tamis.parallel.wire import peers

        return peers(self._mesh, self._group)

    def attend(self, request: Request, settings: LayerSettings, backend: str | None) -> Tensor:
        """The rank's rows of attention over the whole sequence, or over the keys that all are here.

        Raises:
            UnsupportedError: the call has a mask, or asks for what runs dense without a mesh. The other ranks get a
                `ValueError`, if they ask for nothing of the kind.
        """
        from tamis.parallel import layer_attention
        from tamis.parallel.dispatch import decline

        if request.whole:
            return dense(request)
        reason = request.obstacle or (None if request.mask is None else "a complete mask")
        if reason is None and request.packed:
            reason = "offsets of packed documents"  # every rank numbers its own; positions tell all of them
        if reason is None and request.key.shape[2] != request.query.shape[2]:
            reason = "keys of a cache"  # every rank's would stand where the next rank's tokens belong
        if reason is not None:
            decline(self.peers)
            raise UnsupportedError(f"{request.layer}: {reason}: attention over a mesh does not do that")
        if request.keep is not None and settings.predictor is not None:
            settings = replace(settings, predictor=also_keep(settings.predictor, request.keep))
        own = self.shards.segments if request.causal else None
        return layer_attention(
            request.query,
            request.key,
            request.value,
            settings,
            group=self.peers.group,
            mode=self.mode,
            parts=request.parts,
            causal=request.causal,
            window=request.window,
            scale=request.scale,
            segments=request.segments if own is None else (own, own),
            softcap=request.softcap,
            sink_logits=request.sink_logits,
            backend=backend,
        )
