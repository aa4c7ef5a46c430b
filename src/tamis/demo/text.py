"""The text that the language model reads."""

from __future__ import annotations

from pathlib import Path

SHORTEST = 20_000  # characters of one of several texts: 4,096 tokens at the 4.1 characters a token that this prose has


def default_text() -> str:
    """Prose of the Python standard library's documentation, about 0.7 MB of English with some code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def texts(count: int) -> list[str]:
    """`count` texts of like length out of `default_text()`, in its order, that share no paragraph.

    Paragraphs that stand in several topics of the documentation are in one text only. Ten texts have at least 4,096
    tokens of SmolLM2 each.

    Raises:
        ValueError: `count` is below 1, or so large that the texts would be shorter than `SHORTEST` characters.
    """
    paragraphs = {" ".join(paragraph.split()): paragraph for paragraph in reversed(default_text().split("\n\n"))}
    kept = list(reversed(paragraphs.values()))
    total = sum(map(len, kept))
    if not 1 <= count <= total // SHORTEST:
        raise ValueError(f"count must be between 1 and {total // SHORTEST}, got {count}")
    parts: list[list[str]] = [[] for _ in range(count)]
    start = 0
    for paragraph in kept:
        parts[start * count // total].append(paragraph)
        start += len(paragraph)
    return ["\n\n".join(part) for part in parts]


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
