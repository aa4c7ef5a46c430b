"""The text that the language model reads."""

from __future__ import annotations

from pathlib import Path


def default_text() -> str:
    """Prose of the Python standard library's documentation, about 0.7 MB of English with some code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, or `default_text()`.

    Raises:
        ValueError: the file cannot be read as UTF-8 text.
    """
    if path is None:
        return default_text()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
