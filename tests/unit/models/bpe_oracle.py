"""Byte-pair encoding written from its definition, to check tokenizers against. Slow and obvious.

Knows pre-tokenizers as lists of regular expressions applied one after the other, each splitting every piece further,
which is how llama.cpp describes them. Bytes that the vocabulary cannot spell are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import regex

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": [_GPT2],
    "default": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [rf"{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}"],
    "qwen2": [rf"{_LETTERS}|\p{{N}}|{_OTHERS}"],
}


class BpeOracle:
    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        special: Sequence[str],
        pre: str,
        *,
        ignore_merges: bool = False,
    ) -> None:
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._special = regex.compile("|".join(regex.escape(token) for token in sorted(special, key=len, reverse=True)))
        self._splits = [regex.compile(pattern) for pattern in SPLITS[pre]]
        self._ignore_merges = ignore_merges

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._special.finditer(text):
            ids += self._plain(text[position : match.start()])
            ids.append(self._ids[match[0]])
            position = match.end()
        return ids + self._plain(text[position:])

    def _plain(self, text: str) -> list[int]:
        pieces = [text] if text else []
        for pattern in self._splits:
            pieces = [part for piece in pieces for part in _split(pattern, piece)]
        return [self._ids[symbol] for piece in pieces for symbol in self._symbols(piece)]

    def _symbols(self, piece: str) -> list[str]:
        symbols = [symbol for symbol in map(_spell, piece.encode()) if symbol in self._ids]
        if self._ignore_merges and "".join(symbols) in self._ids:
            return ["".join(symbols)]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(range(len(pairs)), key=lambda index: (self._ranks.get(pairs[index], 1 << 60), index))
            if pairs[best] not in self._ranks:
                break
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        return symbols


def _split(pattern: regex.Pattern[str], text: str) -> Iterator[str]:
    """The matches and what lies between them."""
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            yield text[position : match.start()]
        yield match[0]
        position = match.end()
    if position < len(text):
        yield text[position:]


def _spell(byte: int) -> str:
    """The printable stand-in of a byte: Latin-1 where it can be seen, else the next free code point from U+0100."""
    visible = (0x21 <= byte <= 0x7E) or (0xA1 <= byte <= 0xFF and byte != 0xAD)
    if visible:
        return chr(byte)
    if byte <= 0x20:
        return chr(0x100 + byte)
    return chr(0x143) if byte == 0xAD else chr(0x121 + byte - 0x7F)
