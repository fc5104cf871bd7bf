"""`python -m loadtest`. SIGTERM ends a run as Ctrl-C does: with a report on what was answered."""

import signal
import sys

from loadtest.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
