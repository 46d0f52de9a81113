"""docs/data.md: its commands and its configuration work, in their order, on small data."""

import csv
import json
import re

import pages
import pyarrow
import pytest
from pyarrow import parquet
from tiny import COLOURS, jpeg

from evaclip.history import load_history

PAGE = (pages.REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str, str]] = re.findall(
    r"(?:<!-- (not run) -->\n)?```(bash|yaml|)\n(.*?)```", PAGE, flags=re.DOTALL
)
"""(Whether it stays out, language, text)."""


@pytest.fixture
def folder(tmp_path):
    """What the page begins with: 24 captioned images as a folder, a table, parquet files and COCO's captions."""
    for name in ("photos/a", "parquet", "train", "val"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(24)]
    images = [jpeg(COLOURS[name], size=40, seed=number) for number, name in enumerate(names)]
    captions = [f"a {name} square, {number}" for number, name in enumerate(names)]
    coco = {
        "images": [{"id": 99, "file_name": "gone.jpg"}],
        "annotations": [{"id": 98, "image_id": 98, "caption": "x"}],
    }
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (tmp_path / f"photos/a/{number}.jpg").write_bytes(image)
        (tmp_path / f"photos/a/{number}.txt").write_text(caption)
        for split in ("train", "val"):
            (tmp_path / split / f"{number}.jpg").write_bytes(image)
        coco["images"].append({"id": number, "file_name": f"{number}.jpg"})
        coco["annotations"] += [{"id": number, "image_id": number, "caption": f"{caption}, {n}"} for n in range(5)]
    for split in ("train", "val"):
        (tmp_path / f"captions_{split}.json").write_text(json.dumps(coco))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = [(f"photos/a/{number}.jpg", caption) for number, caption in enumerate(captions)]
        csv.writer(file).writerows([("path", "text"), *rows])
    for part in range(2):
        columns = {
            "image": [{"bytes": image, "path": None} for image in images],
            "caption": captions,
            "similarity": [0.2 + number / 100 for number in range(24)],
            "language": ["en", "de", "fr"] * 8,
            "NSFW": ["UNLIKELY"] * 20 + ["NSFW"] * 4,
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / f"parquet/{part}.parquet")
    return pages.furnish(tmp_path)


def test_every_block_of_the_page_works(folder):
    assert len(BLOCKS) == PAGE.count("```") / 2 > 8
    assert [("img2dataset" in text) for left_out, _, text in BLOCKS if left_out] == [True]
    printed = ""
    for left_out, language, text in BLOCKS:
        if language == "yaml":
            (folder / "first.yaml").write_text(text)
        if language != "bash" or left_out:
            continue
        printed += pages.run(text, folder)
    shown = [text for left_out, language, text in BLOCKS if not language]
    assert len(shown) == 2
    for line in "".join(shown).splitlines():
        assert line in printed, f"{line}\n{printed}"
    last = load_history(folder / "runs/first/metrics.jsonl")[-1]
    assert last["step"] == 4
    assert all(last[f"data/delivered/{name}"] > 0 for name in ("photos", "table", "parquet", "coco"))
    assert last["data/filtered/table"] > 0
    assert "eval/coco/image_to_text_recall@1" in last
