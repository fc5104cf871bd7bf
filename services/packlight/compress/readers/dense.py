"""The reader that leaves nothing out: every decode step attends to every packed token.

There is no code here to run. The attention backend walks the page tables; a reader tells it which pages to walk, and
this one says all of them. Page-sparse readers (top pages by key summaries) choose among the pages at each step.
"""

from __future__ import annotations

from typing import Final


class DenseReader:
    name: Final = "dense"
