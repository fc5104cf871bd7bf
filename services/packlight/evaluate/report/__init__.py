"""Results as people read them: a terminal, a web page, a document."""

from __future__ import annotations

from packlight.evaluate.report.page import html_report
from packlight.evaluate.report.tables import detail_tables, facts, summary_tables
from packlight.evaluate.results import Results
from packlight.report.tables import to_markdown, to_text

__all__ = ["html_report", "markdown_report", "terminal_report"]


def terminal_report(results: Results) -> str:
    """The summary as aligned plain text."""
    return "\n".join(map(to_text, summary_tables(results)))


def markdown_report(results: Results) -> str:
    """The header as a list, then every table."""
    header = "\n".join(f"- {name}: {value}" for name, value in facts(results.header))
    return "\n".join([header, "", *map(to_markdown, [*summary_tables(results), *detail_tables(results)])])
