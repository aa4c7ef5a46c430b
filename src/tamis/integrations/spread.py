"""Attention of a model whose tokens are spread over the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tamis.errors import UnsupportedError
from tamis.integrations.request import Request
from tamis.profile import LayerSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Spread:
    """Every rank calls the model with its part of the sequence, in the order of the ranks.

    What a call asks for is done for the whole sequence or refused: dense attention of a part alone would be wrong.

    Attributes:
        mesh: of one dimension, over the ranks; or their process group.
        mode: "heads" or "ring", as in `tamis.parallel.attend`.
    """

    mesh: DeviceMesh | ProcessGroup
    mode: str = "heads"

    def attend(self, request: Request, settings: LayerSettings, backend: str | None) -> Tensor:
        """The rank's rows of attention over the whole sequence.

        Raises:
            UnsupportedError: the call has a mask, or asks for what runs dense without a mesh.
        """
        from torch.distributed.device_mesh import DeviceMesh

        from tamis.parallel import layer_attention

        kinds = {"a complete mask": request.mask, "tokens that must be kept": request.keep}
        reason = request.obstacle or next((name for name, given in kinds.items() if given is not None), None)
        if reason is None and request.packed:
            reason = "packed documents"  # every rank numbers its own
        if reason is None and request.key.shape[2] != request.query.shape[2]:
            reason = "keys of a cache"  # every rank's would stand where the next rank's tokens belong
        if reason is not None:
            raise UnsupportedError(f"{request.layer}: {reason}: attention over a mesh does not do that")
        whole = isinstance(self.mesh, DeviceMesh)
        return layer_attention(
            request.query,
            request.key,
            request.value,
            settings,
            mesh=self.mesh if whole else None,  # type: ignore[arg-type]
            group=None if whole else self.mesh,  # type: ignore[arg-type]
            mode=self.mode,
            causal=request.causal,
            window=request.window,
            scale=request.scale,
            segments=request.segments,
            softcap=request.softcap,
            sink_logits=request.sink_logits,
            backend=backend,
        )
