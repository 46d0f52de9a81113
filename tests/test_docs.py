"""What the documents say about the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_reading_tour_counts_lines_as_they_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(evaclip/\S+)\]\(\1\) \| (\d+) \|", readme, re.MULTILINE)
    assert len(rows) > 10
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path, _ in rows}
    said = {path: int(count) for path, count in rows}
    assert said == {path: round(count, -1) for path, count in lines.items()}, "in tens"
    total = re.search(r"^About ([\d,]+) lines in all", readme, re.MULTILINE)
    assert int(total[1].replace(",", "")) == round(sum(lines.values()), -2)
