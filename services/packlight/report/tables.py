"""A table of a report, and its spelling as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text already. The first column names the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    first, *others = widths

    def spell(line: Sequence[str]) -> str:
        return "  ".join(
            [line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))]
        )

    return "\n".join([f"{table.title} ({table.note})", *map(spell, lines)]) + "\n"


def to_markdown(table: Table) -> str:
    """A heading, the note, and a table whose first column is set in code type."""
    rule = "|".join(["---", *("---:" for _ in table.columns[1:])])
    rows = [(f"`{name}`", *cells) for name, *cells in table.rows]
    lines = [f"| {' | '.join(table.columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return f"### {table.title}\n\n{table.note[:1].upper()}{table.note[1:]}.\n\n" + "\n".join(lines) + "\n"
