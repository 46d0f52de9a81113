"""The tables of figures."""

from datetime import date

import pytest
import tables
from tables import Figure, markdown


def test_tables_hold_every_figure_in_its_place():
    figures = [
        Figure("One", "a", "x", 0.123456),
        Figure("Two", "b", "y", "none"),
        Figure("One", "c", "z", 1052688),
        Figure("One", "a", "x", 2e-7),
    ]
    assert markdown(figures, {"torch": "2.15.0", "timm": "1.0"}, date(2026, 1, 31)).splitlines() == [
        "Measured on 2026-01-31 with torch 2.15.0, timm 1.0.",
        "",
        "### One",
        "",
        "|  | x | z |",
        "| --- | ---: | ---: |",
        "| a | 2e-07 |  |",
        "| c |  | 1,052,688 |",
        "",
        "### Two",
        "",
        "|  | y |",
        "| --- | ---: |",
        "| b | none |",
    ]


def test_a_page_keeps_its_prose_and_takes_the_tables_and_pictures_of_the_session(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(tables, "FIGURES", [Figure("One", "a", "x", 1)])
    monkeypatch.setattr(tables, "PICTURES", {"a.svg": "<svg/>"})
    page = tables.PAGES["faults"]
    (tmp_path / page.name).write_text(f"Prose.\n\n{page.mark}old tables\n")
    tables.write(page)
    text = (tmp_path / page.name).read_text()
    assert text.startswith(f"Prose.\n\n{page.mark}\nMeasured on ")
    assert "| a | 1 |" in text
    assert "old tables" not in text
    assert (tmp_path / "images" / "a.svg").read_text() == "<svg/>"


@pytest.mark.parametrize("page", tables.PAGES.values())
def test_each_page_has_the_line_behind_which_its_tables_stand(page):
    assert page.mark in (tables.DOCS / page.name).read_text(encoding="utf-8")
