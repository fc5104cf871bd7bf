"""The web page of a report: one file that needs nothing else, readable in light and dark.

Knows the frame: a head, sections of plots, tables. A report that shows more extends `base.html.j2` with a template of
its own, which may fill the blocks `style` and `more`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from packlight.report import charts
from packlight.report.charts import Chart
from packlight.report.tables import Table

_BASE = "base.html.j2"


@dataclass(frozen=True, slots=True)
class Section:
    """Plots that belong together. `note` is one or more whole sentences."""

    title: str
    note: str
    charts: tuple[Chart, ...]


def render_page(
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    tables: Sequence[Table],
    *,
    template: str | None = None,
    **more: Any,
) -> str:
    """`facts` are names and values for the head; `template`, if any, is the text of one that extends the base."""
    texts = {_BASE: files(__package__).joinpath(_BASE).read_text(encoding="utf-8")}
    if template is not None:
        texts["page"] = template
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(_BASE if template is None else "page")
    return page.render(title=title, facts=facts, sections=sections, tables=tables, size=charts, **more)
