"""Writing a text file as a whole."""

from __future__ import annotations

import os
from pathlib import Path

from packlight.core.errors import ConfigError


def write(path: Path, text: str) -> None:
    """All of the file or nothing of it: a reader never sees half. Raises ConfigError naming the path."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
