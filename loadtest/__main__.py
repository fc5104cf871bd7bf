"""`python -m loadtest`. SIGTERM ends a run as Ctrl-C does: with a report on what was answered."""

import signal
import sys
from types import FrameType

from loadtest.cli import main


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Not by way of SIGINT, which a shell's background jobs ignore."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
