"""Stop strings: finding the first one in a text that arrives in pieces.

Knows characters. Does not know tokens, requests or streams.

What may be shown at any moment is everything except the longest suffix that could still become a stop string, so a
stream lags only when it must. Each stop string is followed by its own Knuth-Morris-Pratt automaton (Knuth, Morris,
Pratt 1977), whose state is the length of that suffix.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Passes text through until a stop string completes.

    The match that completes first wins; of two that complete with the same character, the one listed first. The stop
    string and everything after it is dropped. `matched` then stays true and nothing more comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """The text that `piece` makes safe to show."""
        if not self._patterns:
            return piece
        if self.matched:
            return ""
        text = self._held + piece
        for end, char in enumerate(piece, start=len(self._held) + 1):
            if complete := [pattern for pattern in self._patterns if pattern.feed(char)]:
                self._held, self.matched = "", True
                return text[: end - complete[0].length]
        num_shown = len(text) - max(pattern.length for pattern in self._patterns)
        self._held = text[num_shown:]
        return text[:num_shown]

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """`length` characters of `text` match the end of what was fed."""

    def __init__(self, text: str) -> None:
        self.length = 0
        self._text = text
        self._borders = _borders(text)

    def feed(self, char: str) -> bool:
        """Whether `char` completes the pattern. Not to be called again once it has."""
        while self.length and self._text[self.length] != char:
            self.length = self._borders[self.length - 1]
        if self._text[self.length] == char:
            self.length += 1
        return self.length == len(self._text)


def _borders(text: str) -> list[int]:
    """For every prefix of `text`: the length of its longest proper prefix that is also its suffix."""
    borders, length = [0], 0
    for char in text[1:]:
        while length and text[length] != char:
            length = borders[length - 1]
        length += text[length] == char
        borders.append(length)
    return borders
