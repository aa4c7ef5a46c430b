"""diffusers' own context parallelism: what an attention backend is handed there, as arguments of the calls here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tamis.errors import UnsupportedError
from tamis.parallel.layout import Layout


def from_diffusers(parallel_config: Any, tokens: int | Sequence[int]) -> dict[str, Any]:
    """The arguments `mesh`, `mode` and `layout` of a diffusers `ParallelConfig` or `ContextParallelConfig`.

    Args:
        parallel_config: what a backend gets as `_parallel_config`, after `model.enable_parallelism`. Ulysses is mode
            "heads", ring is mode "ring".
        tokens: of this rank; or of each part, e.g. (text, image), in the order in which the model puts them together.

    diffusers cuts every part into equal shards, so nothing is exchanged; its "anything" modes do not, and there the
    ranks tell each other their tokens.

    Raises:
        UnsupportedError: both degrees are above 1.
    """
    config = getattr(parallel_config, "context_parallel_config", parallel_config)
    if config.ring_degree > 1 and config.ulysses_degree > 1:
        raise UnsupportedError(
            f"ring_degree {config.ring_degree} and ulysses_degree {config.ulysses_degree} at once have no mode here: "
            "leave one of them at 1"
        )
    ring = config.ring_degree > 1
    mesh = config._ring_mesh if ring else config._ulysses_mesh
    parts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    made: dict[str, Any] = {"mesh": mesh, "mode": "ring" if ring else "heads"}
    if config.ulysses_anything or config.ring_anything:
        return made | {"parts": parts}
    return made | {"layout": Layout.parts([parts] * mesh.size())}
