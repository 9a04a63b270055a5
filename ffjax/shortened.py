"""Texts of others in our sentences: as much of them as a reader needs to know them again."""

from __future__ import annotations

__all__ = ["shortened"]


def shortened(text: str, most: int = 60) -> str:
    """A text, or its beginning and an ellipsis.

    Args:
        text: of any length.
        most: so many characters of it are kept.
    """
    return text if len(text) <= most else f"{text[:most]}..."
