"""The reports: one self-contained HTML page about a run of `tamis demo`, or about a profile of `tamis tune`.

A page needs no network and no library: styles, script, drawings and pictures are all inside it.

    markup.py   HTML elements that escape whatever they are given
    parts.py    reading the result of a demo
    numbers.py  numbers as a reader wants them, NaN and missing ones included
    colour.py   the colour ramps and the PNG writer
    shell.py    head, style, script, header and footer of a page
    axes.py     the frame of every chart
    heat.py     heat maps by layer and head
    charts.py   density by layer and head, and error by layer, of a demo
    maps.py     attention maps beside the blocks that were kept
    summary.py  headline, cards, gains and costs
    page.py     the demo's page and its sections, in reading order
    tuning/     the page about a profile
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamis.profile import Profile
from tamis.report import tuning
from tamis.report.page import render
from tamis.report.tuning.frontier import Survey

__all__ = ["render", "write", "write_tuning"]


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


def write_tuning(path: str | os.PathLike[str], profile: Profile, survey: Survey | None = None) -> Path:
    """Write the report about a profile to `path` and return that path.

    Args:
        survey: of the run that made the profile, `tamis.tuning.surveys.read` of its journal; adds the frontiers.

    Raises:
        ValueError: the survey is of another run than the profile.
        OSError: `path` cannot be written.

    Example:
        >>> import os, tempfile, tamis
        >>> from tamis.profile import Evidence, LayerSettings, Stage
        >>> evidence = Evidence(density=(0.25,), l1=(0.03,), l1_worst=(0.04,), samples=5)
        >>> stage = Stage(LayerSettings(tamis.Sparge(topk=0.25)), evidence=evidence)
        >>> profile = tamis.Profile({"layers.0": (stage,)}, model="Tiny", budget={"l1": 0.05})
        >>> page = write_tuning(os.path.join(tempfile.mkdtemp(), "tamis-tuning.html"), profile)
        >>> "Tiny computes 25% of the blocks" in page.read_text(encoding="utf-8")
        True
    """
    target = Path(path)
    target.write_text(tuning.render(profile, survey), encoding="utf-8")
    return target
