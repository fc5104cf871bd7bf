"""Lua scripts that ship inside the package.

Knows where their text is and what Redis calls them. Does not run them: see `link.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """A script and its SHA-1, the name under which a server that has seen it knows it."""

    text: str
    sha: str


def load_script(package: str, *names: str) -> Script:
    """The files `scripts/<name>.lua` of `package`, joined in order: Redis has no `require`, shared code goes first."""
    folder = files(package) / "scripts"
    text = "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
