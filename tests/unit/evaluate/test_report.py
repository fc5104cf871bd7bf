"""What every report of a run holds, and that its numbers are those of the run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.evaluate.report import html_report, markdown_report, terminal_report
from packlight.evaluate.report.charts import KEPT, READ, chart, heat_maps
from packlight.evaluate.report.summary import KL, NEEDLE_SCORE, TOP1, Asked, Measure, Setting, mean, means, merge_cells
from packlight.evaluate.report.tables import summary_tables
from packlight.evaluate.results import Point, Results
from packlight.report.charts import BOTTOM, LEFT, RIGHT, TOP
from packlight.report.tables import ABSENT, Table, to_markdown, to_text
from tests.unit.evaluate.made_up import FACTORS, HEADER, RECIPES, made_up_results

NEEDLE_POINT = replace(made_up_results().points[-1], task="niah_single_1", score=0.5, kept_share=0.25)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Fails on an element that is not closed where it must be; collects texts, tags and whatever is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up_results()


def only(results: Results, **fields: object) -> list[Point]:
    return [point for point in results.points if all(getattr(point, name) == value for name, value in fields.items())]


def test_the_page_parses_and_names_every_recipe_in_every_part(results: Results) -> None:
    html = html_report(results)
    texts = outline(html).texts
    for recipe in RECIPES:
        # A plot against bytes kept and one against bytes read for each of three measures, maps, and five tables.
        assert texts.count(recipe) >= 6 + 1 + 5
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_needs_nothing_else(results: Results) -> None:
    html = html_report(results)
    page = outline(html)
    assert page.loaded == []
    assert "script" not in page.tags
    assert not re.search(r"https?:|@import|url\(", html)


def test_the_page_has_colours_for_both_schemes(results: Results) -> None:
    html = html_report(results)
    light, dark = html.split("prefers-color-scheme: dark", 1)
    used = set(re.findall(r"var\((--\w+)\)", html))
    assert used == set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))


def test_names_from_a_file_are_text_and_never_markup(results: Results) -> None:
    hostile = "<script>alert(1)</script>"
    header = replace(HEADER, model=hostile, command=hostile)
    html = html_report(Results(header=header, points=(replace(results.points[0], recipe=hostile, codec=hostile),)))
    assert "script" not in outline(html).tags


def test_codecs_are_compared_under_each_recipe() -> None:
    texts = outline(html_report(made_up_results(("native", "int4", "int8")))).texts
    assert [text for text in texts if text.startswith("Codecs with ")] == [f"Codecs with {name}" for name in RECIPES]
    assert "snapkv + int4" in texts


def test_markdown_tables_have_the_same_columns_in_every_row(results: Results) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", markdown_report(results), re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        rows = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1
        assert re.fullmatch(r"\|---(\|---:)+\|", rows[1])
        assert {re.match(r"\| `(\w+)`", row)[1] for row in rows[2:]} == set(RECIPES)  # type: ignore[index]


def test_terminal_tables_are_aligned(results: Results) -> None:
    blocks = terminal_report(results).strip().split("\n\n")
    assert [block.split(" (")[0] for block in blocks] == ["Needle score", "KL divergence", "Top-1 agreement"]
    for block in blocks:
        lines = block.splitlines()[1:]
        assert len({len(line) for line in lines}) == 1
        assert [line.split()[0] for line in lines] == ["recipe", *RECIPES]


def test_a_table_cell_is_the_measured_number(results: Results) -> None:
    needle, kl, top1 = summary_tables(results)
    row = {name: dict(zip(kl.columns[1:], cells, strict=True)) for name, *cells in kl.rows}
    [point] = only(results, recipe="snapkv", factor=8.0, task="teacher_forced")
    assert row["snapkv"]["8x"] == f"{point.kl_mean:.3g}"
    assert row["none"]["8x"] == row["snapkv"]["1x"] == ABSENT
    cells = {name: cells for name, *cells in needle.rows}["cake"]
    points = [point for point in only(results, recipe="cake", factor=32.0) if point.task.startswith("niah_")]
    assert cells[-1] == f"{sum(point.score or 0 for point in points) / len(points):.2f}"
    assert "20 samples each" in top1.note


def test_means_weigh_samples_and_skip_points_without_the_measure(results: Results) -> None:
    [point] = only(results, recipe="snapkv", factor=8.0, task="niah_single_1")
    points = [
        replace(point, score=1.0, num_samples=3, kept_share=0.1),
        replace(point, score=0.0, num_samples=1, kept_share=0.3),
        replace(point, task="vt", score=0.0, kept_share=0.9),
        replace(point, score=None, kl_mean=1.0, kept_share=0.9),
    ]
    [(asked, found)] = means(points, NEEDLE_SCORE).items()
    assert asked == Asked(Setting("snapkv", "native"), 8.0)
    assert (found.value, found.num_samples) == (0.75, 4)
    assert found.kept_share == pytest.approx(0.15)
    assert mean([], lambda point: point.score) is None


def test_cells_of_several_tasks_become_one_grid(results: Results) -> None:
    points = [point for point in only(results, recipe="adakv", factor=4.0) if point.cells]
    merged = merge_cells(points)
    assert len(points) == 2
    assert [(cell.depth, cell.length) for cell in merged] == sorted({(c.depth, c.length) for c in points[0].cells})
    assert {cell.num_samples for cell in merged} == {2}
    total = sum(cell.score for point in points for cell in point.cells)
    assert sum(cell.score for cell in merged) == pytest.approx(total / 2)


def test_a_heat_map_has_a_square_for_each_cell(results: Results) -> None:
    maps = heat_maps(results.points)
    assert list(maps) == list(RECIPES)
    assert [one.title for one in maps["snapkv"]] == [f"{factor:g}x" for factor in FACTORS]
    for one in maps["snapkv"]:
        places = {(square.column, square.row) for square in one.squares}
        assert len(places) == len(one.squares) == len(one.lengths) * len(one.depths)
        assert all(0 <= square.shade <= 10 for square in one.squares)


@pytest.mark.parametrize("measure", [NEEDLE_SCORE, KL, TOP1])
@pytest.mark.parametrize("axis", [KEPT, READ])
def test_a_chart_shows_every_number_inside_its_frame(results: Results, measure: Measure, axis: object) -> None:
    drawn = chart(results.points, measure, axis, lambda setting: setting.recipe)  # type: ignore[arg-type]
    assert sorted(line.label for line in drawn.lines) == sorted(RECIPES)
    assert sum(len(line.marks) for line in drawn.lines) == len(means(results.points, measure))
    for line in drawn.lines:
        assert all(LEFT <= mark.x <= RIGHT + 1e-6 for mark in line.marks)
        assert all(TOP - 1e-6 <= mark.y <= BOTTOM + 1e-6 for mark in line.marks)
        assert [mark.x for mark in line.marks] == sorted(mark.x for mark in line.marks)
    assert [tick.at for tick in drawn.x_ticks] == sorted(tick.at for tick in drawn.x_ticks)


def test_a_chart_puts_better_numbers_higher_and_harder_packing_further_right(results: Results) -> None:
    drawn = chart(results.points, TOP1, KEPT, lambda setting: setting.recipe)
    [line] = [line for line in drawn.lines if line.label == "snapkv"]
    [exact] = [line for line in drawn.lines if line.label == "none"]
    assert (exact.marks[0].x, exact.marks[0].y) == (LEFT, TOP)
    assert [mark.text.split(":")[0] for mark in line.marks] == [f"snapkv {factor:g}x" for factor in FACTORS]
    assert [mark.y for mark in line.marks] == sorted(mark.y for mark in line.marks)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_labels_of_a_chart_never_overlap_and_keep_their_order(scores: list[float]) -> None:
    points = [
        replace(NEEDLE_POINT, recipe=f"r{index}", score=score, kept_share=share)
        for index, score in enumerate(scores)
        for share in (1.0, 0.25)
    ]
    lines = chart(points, NEEDLE_SCORE, KEPT, lambda setting: setting.recipe).lines
    ordered = sorted(lines, key=lambda line: line.label_y)
    assert all(below.label_y - above.label_y >= 15 - 1e-6 for above, below in pairwise(ordered))
    assert all(above.marks[-1].y <= below.marks[-1].y for above, below in pairwise(ordered))
    assert all(TOP <= line.label_y <= BOTTOM for line in lines)


def test_a_lone_label_stands_at_its_line() -> None:
    [line] = chart([NEEDLE_POINT], NEEDLE_SCORE, KEPT, lambda setting: setting.recipe).lines
    assert line.label_y == line.marks[-1].y


def test_a_run_without_points_still_makes_reports() -> None:
    empty = Results(header=HEADER, points=())
    assert terminal_report(empty) == ""
    assert "made-up-135M" in markdown_report(empty)
    assert "made-up-135M" in " ".join(outline(html_report(empty)).texts)


def test_a_table_is_spelled_as_it_reads() -> None:
    table = Table("Speed", "in knots", ("boat", "1x", "16x"), (("raft", "1", "22"), ("ferry", "333", "-")))
    assert to_text(table) == "Speed (in knots)\nboat    1x  16x\nraft     1   22\nferry  333    -\n"
    assert to_markdown(table) == (
        "### Speed\n\nIn knots.\n\n| boat | 1x | 16x |\n|---|---:|---:|\n| `raft` | 1 | 22 |\n| `ferry` | 333 | - |\n"
    )
