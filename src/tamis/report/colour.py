"""Colour ramps for a light and a dark page, and an indexed PNG written with the standard library.

A ramp runs from the background of the page (little) to its strongest contrast (much), so the same picture reads the
same way in both schemes. It has few steps on purpose: a drawing names a step, the style sheet knows its colours.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

Colour = tuple[int, int, int]

STEPS = 32
LIGHT_STOPS = ("#f3f1ea", "#b9ded3", "#5fb3a8", "#1f7f8c", "#154a6b", "#131a3a")
DARK_STOPS = ("#1d2530", "#17465a", "#1c7f85", "#47b99f", "#a9e2ae", "#fbf6cf")
LIGHT_UNSEEN: Colour = (224, 220, 210)
DARK_UNSEEN: Colour = (44, 51, 62)


def parse(colour: str) -> Colour:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def ramp(stops: Sequence[str], steps: int = STEPS) -> list[Colour]:
    """`steps` colours, linear between the stops."""
    anchors = [parse(stop) for stop in stops]
    colours = []
    for step in range(steps):
        place = step * (len(anchors) - 1) / (steps - 1)
        left = min(int(place), len(anchors) - 2)
        share = place - left
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(anchors[left], anchors[left + 1], strict=True))
        colours.append((red, green, blue))
    return colours


LIGHT = ramp(LIGHT_STOPS)
DARK = ramp(DARK_STOPS)


def step_of(value: float) -> int:
    """The step of the ramp for a value of [0, 1]; values outside are clamped."""
    return round(min(max(value, 0.0), 1.0) * (STEPS - 1))


def css(colours: Sequence[Colour]) -> str:
    """Style rules `.s0 ... .s31` that fill a cell with its step."""
    return "".join(f".s{step}{{fill:#{bytes(colour).hex()}}}" for step, colour in enumerate(colours))


def png(rows: Sequence[bytes], palette: Sequence[Colour]) -> str:
    """A `data:` URI of an 8-bit indexed PNG; each row is one byte, a palette index, per pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", header),
            (b"PLTE", b"".join(bytes(colour) for colour in palette)),
            (b"IDAT", pixels),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")
