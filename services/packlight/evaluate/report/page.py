"""The HTML report: one file that needs nothing else, readable in light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from operator import attrgetter

from packlight.evaluate.report.charts import KEPT, READ, chart, heat_maps
from packlight.evaluate.report.summary import MEASURES, Setting, means, settings_of
from packlight.evaluate.report.tables import detail_tables, facts, summary_tables
from packlight.evaluate.results import Point, Results
from packlight.report.page import Section, render_page

_READING = "one dot for each compression asked for. Further right is packed harder."


def html_report(results: Results) -> str:
    """A page with plots, needle heat maps and the tables behind them."""
    return render_page(
        f"Packing fidelity of {results.header.model}",
        facts(results.header),
        _sections(results.points),
        [*summary_tables(results), *detail_tables(results)],
        template=files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"),
        heat_maps=heat_maps(results.points),
    )


def _sections(points: Sequence[Point]) -> list[Section]:
    """The recipes side by side under the commonest codec, then the codecs side by side under each recipe that has some.

    All together would be more lines than a plot can hold."""
    settings = settings_of(points)
    if not settings:
        return []
    codec = Counter(setting.codec for setting in settings).most_common(1)[0][0]
    recipes = [point for point in points if point.codec == codec]
    sections = [_section("Recipes", f"One line for each recipe, with codec {codec}", recipes, attrgetter("recipe"))]
    for recipe, count in Counter(setting.recipe for setting in settings).items():
        if count > 1:
            own = [point for point in points if point.recipe == recipe]
            sections.append(_section(f"Codecs with {recipe}", "One line for each codec", own, attrgetter("codec")))
    return sections


def _section(title: str, note: str, points: Sequence[Point], name: Callable[[Setting], str]) -> Section:
    """The measures against bytes kept and bytes read, with the same lines in all plots."""
    taken = [measure for measure in MEASURES if means(points, measure)]
    charts = [chart(points, measure, axis, name) for measure in taken for axis in (KEPT, READ)]
    return Section(title, f"{note}, {_READING}", tuple(charts))
