"""Runs the blocks of a guide, and compares what they print with what they say."""

from __future__ import annotations

import re
from typing import Any

import pytest


def run_guide(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run every ```python block, one after the other; each `print(..)  # so` has to print so."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
        printed = capsys.readouterr().out.splitlines()
        assert printed == re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
