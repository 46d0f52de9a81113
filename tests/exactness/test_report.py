"""The tables of figures."""

from datetime import date

from exactness.report import Figure, markdown


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
