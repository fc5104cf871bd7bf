"""How far an evaluation is: a bar where somebody watches, a line for each prompt where not. Knows only the terminal."""

from __future__ import annotations

from typing import Any, TextIO


class Progress:
    """Writes to `stream`, never to standard output: that is the report's. `close` before anything else is printed."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total, self._num_done = stream, total, 0
        self._bar: Any = None
        if stream.isatty():
            # It comes with transformers, which whoever computes has.
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, file=stream, unit="variant", dynamic_ncols=True, smoothing=0.05)

    def step(self, what: str, num_done: int) -> None:
        """`num_done` more of `total` are finished; `what` is being worked on."""
        self._num_done += num_done
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.update(num_done)
        elif num_done == 0:
            print(f"{self._num_done} of {self._total} done, now {what}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
