"""The report: one self-contained HTML page about one run of `tamis demo`.

The page needs no network and no library: styles, script, drawings and pictures are all inside it.

    markup.py   HTML elements that escape whatever they are given
    parts.py    reading the result
    numbers.py  numbers as a reader wants them, NaN and missing ones included
    colour.py   the colour ramps and the PNG writer
    charts.py   density by layer and head, error by layer
    maps.py     attention maps beside the blocks that were kept
    summary.py  headline, cards, gains and costs
    page.py     the page and its sections, in reading order
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamis.report.page import render

__all__ = ["render", "write"]


def write(path: str | os.PathLike[str], result: Mapping[str, Any]) -> Path:
    """Write the report about `result` to `path` and return that path.

    `result` is the plain dict of a demo run, with `language`, `image` and `machine`, each of which may be absent.
    Missing and non-finite numbers are shown as such; the caller escapes nothing.

    Raises `OSError` if `path` cannot be written.

    Example:
        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> page = write(os.path.join(folder, "tamis-report.html"), {"language": {"tokens": 8192, "density": 0.5}})
        >>> "8,192" in page.read_text(encoding="utf-8")
        True
    """
    target = Path(path)
    target.write_text(render(result), encoding="utf-8")
    return target
