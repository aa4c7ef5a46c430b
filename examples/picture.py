"""Which blocks every layer and head kept: a predictor that remembers its masks, and a picture of them as an SVG."""

from __future__ import annotations

import argparse
import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tamis

LARGEST, GAP, LEFT, TOP = 36, 2, 52, 66  # pixels of the image: of a map at most, between maps; of the margins
WIDEST, HIGHEST = 960, 480  # pixels that maps are magnified to
INK = bytes((20, 150, 140))  # seen on white and on black
STYLE = """svg{--page:#fff;--text:#1f2328;--soft:#59636e;--map:#eceff2}
@media (prefers-color-scheme:dark){svg{--page:#0d1117;--text:#e6edf3;--soft:#9198a1;--map:#20262e}}
text{font:12px system-ui,sans-serif;fill:var(--soft)}.title{font-size:15px;font-weight:600;fill:var(--text)}
.page{fill:var(--page)}.map{fill:var(--map)}image{image-rendering:pixelated}.end{text-anchor:end}"""


@dataclass(frozen=True)
class Recorder:
    """A predictor like any other, which keeps a list of the masks it gave out, in the order of the calls."""

    predictor: tamis.Sparge
    masks: list[tamis.BlockMask] = field(default_factory=list)
    keep: Any = None  # tokens that tamis.apply wants kept, such as the text of an image model

    def __call__(self, query: Tensor, key: Tensor, **options: Any) -> tamis.BlockMask:
        predictor = self.predictor if self.keep is None else replace(self.predictor, keep=self.keep)
        self.masks.append(predictor(query, key, **options))
        return self.masks[-1]


def new_file(name: str) -> Path:
    """Where a picture can be written, found out before anything runs."""
    path = Path(name)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def sparse_layers(handle: Any) -> dict[str, Any]:
    """Stats of the last sparse call of every layer; the script ends, and says why, where none ran sparse."""
    layers = {name: layer.last for name, layer in handle.stats().items() if layer.last is not None}
    if not layers:
        calls, reasons = handle.calls, dict(handle.dense_reasons)
        raise SystemExit(
            f"attention calls: {calls['sparse']} sparse, {calls['dense']} dense {reasons}\n"
            "nothing ran sparse, so there is nothing to compare or to draw"
        )
    return layers


def draw(path: Path, title: str, density: float, masks: Sequence[tamis.BlockMask]) -> None:
    """Write a map for every layer and head, of queries (down) and keys: full colour is kept, none is skipped."""
    if not masks:
        raise ValueError("masks must not be empty: nothing ran sparse (handle.dense_reasons says why)")
    if len({mask.grid for mask in masks}) > 1:
        raise ValueError("masks must be those of calls of one length: recorder.masks[-layers:] are those of the last")
    note = f"blocks kept, a map for every layer (to the right) and head (down); density {density:.2f}"
    maps = [[shrink(head) for head in mask.to_dense()[0]] for mask in masks]
    side, heads = maps[0][0].shape[0], len(maps[0])
    pitch = side + GAP
    sheet = torch.zeros(heads * pitch - GAP, len(maps) * pitch - GAP)
    places = [(column * pitch, row * pitch) for column in range(len(maps)) for row in range(heads)]
    for (x, y), one in zip(places, (one for column in maps for one in column), strict=True):
        sheet[y : y + side, x : x + side] = one
    zoom = max(1, min(4, WIDEST // sheet.shape[1], HIGHEST // sheet.shape[0]))
    height, width = (zoom * length for length in sheet.shape)
    boxes = "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in places)
    step = -(-30 // (zoom * pitch))  # a number every 30 pixels at most
    labels = [(LEFT + (i * pitch + side / 2) * zoom - 4, TOP - 6, i) for i in range(0, len(maps), step)]
    names = "".join(f'<text x="{x:.0f}" y="{y}">{i}</text>' for x, y, i in labels)
    sides = ((TOP + (i * pitch + side / 2) * zoom + 4, i) for i in range(heads))
    names += f'<text class="end" x="{LEFT - 8}" y="{TOP - 6}">layer</text>'
    names += "".join(f'<text class="end" x="{LEFT - 8}" y="{y:.0f}">{i or "head 0"}</text>' for y, i in sides)
    full = max(LEFT + width + 16, 7 * len(note) + 30, 9 * len(title) + 30), TOP + height + 16
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full[0]} {full[1]}" width="{full[0]}" '
        f'height="{full[1]}" role="img"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="page" width="{full[0]}" height="{full[1]}"/>'
        f'<text class="title" x="16" y="24">{escape(title)}</text><text x="16" y="42">{escape(note)}</text>'
        f'{names}<g transform="translate({LEFT} {TOP}) scale({zoom})"><path class="map" d="{boxes}"/>'
        f'<image width="{sheet.shape[1]}" height="{sheet.shape[0]}" href="{png(sheet)}"/></g></svg>\n',
        encoding="utf-8",
    )


def shrink(kept: Tensor) -> Tensor:
    """A map with a pixel per 64 queries and keys, or the mean of several: bool `[q_blocks, kv_blocks]` to a square."""
    square = kept.float().repeat_interleave(2, 0)[: kept.shape[1]]  # blocks are 128 queries by 64 keys
    several = -(-kept.shape[1] // LARGEST)
    return torch.nn.functional.avg_pool2d(square[None, None], several, ceil_mode=True)[0, 0]


def png(sheet: Tensor) -> str:
    """Shares `[height, width]` as the opacity of ink: a `data:` URI of a PNG with a palette of 16 steps."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = sheet.shape
    rows = b"".join(b"\0" + bytes(row) for row in (sheet * 15).ceil().int().tolist())
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)), (b"PLTE", INK * 16)
    parts += (b"tRNS", bytes(range(0, 256, 17))), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
