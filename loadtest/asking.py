"""Asking a server from a greenlet, and timing what it answers from the wire.

Knows HTTP through the standard library, which gevent has patched: no pool, proxy or decoder stands between clock and
socket. Definitions and the reading of streams are those of `packlight bench serve`. Connections are not reused, as
there: some servers close idle ones just when the next request is on its way.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.stream import Piece, Reading, describe_refusal, read_stream, to_answer

Clock = Callable[[], float]
PATH = "/v1/chat/completions"
UNANSWERED = "no whole answer before the run ended"
_PIECE_BYTES = 1 << 16


class Asker:
    """One server. `clock` is the run's: its times are those in the answers."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, clock: Clock) -> None:
        """`url` may have a path, and may end in `/v1`. `timeout_s` is for each wait on the server."""
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        assert parts.hostname is not None, "the command line refuses other URLs"
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path + PATH
        self._headers = {"content-type": "application/json", "connection": "close"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout_s, self._clock = timeout_s, clock

    def ask(self, body: Mapping[str, Any], due_s: float, *, is_follow_up: bool, references: tuple[str, ...]) -> Answer:
        """One streamed answer. Whatever goes wrong becomes an answer with an error. Fields that are None are not sent.

        Without usage, `num_output_tokens` is 0 and `counted_by` the tokenizer, which is not in this process."""
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        sent_s = self._clock()
        reading = self._read(data)
        return to_answer(reading, max(due_s, 0.0), sent_s, references=references, is_follow_up=is_follow_up)

    def _read(self, data: bytes) -> Reading:
        pieces: list[Piece] = []
        try:
            with closing(self._connection(self._host, self._port, timeout=self._timeout_s)) as connection:
                connection.request("POST", self._path, data, self._headers)
                reply = connection.getresponse()
                if reply.status != http.client.OK:
                    return Reading(error=f"HTTP {reply.status}: {describe_refusal(reply.read())}")
                pieces.extend(self._pieces(reply))
        except (OSError, http.client.HTTPException) as error:
            return Reading(error=f"{type(error).__name__}: {error}")
        return read_stream(pieces)

    def _pieces(self, reply: http.client.HTTPResponse) -> Iterator[Piece]:
        """As they come: `read1` does not wait for more than there is."""
        while data := reply.read1(_PIECE_BYTES):
            yield Piece(self._clock(), data)
