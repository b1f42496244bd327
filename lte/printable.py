"""Text from the network, for terminals and logs."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text, each character of which that prints nothing of its own replaced.

    Those are control characters, which move a terminal's cursor or retitle its window, line breaks, which
    would begin a line of a log that nobody wrote, and marks that turn the direction of what follows.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
