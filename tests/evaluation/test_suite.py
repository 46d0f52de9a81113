"""A suite: what is there is measured, what is not is listed, and no average stands for fewer sets than it names."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from weights.stored import stored

from evaclip import cli, config_file
from evaclip.config import SuiteConfig
from evaclip.data.shards import write_shards
from evaclip.errors import ConfigError
from evaclip.evaluation.results import Result
from evaclip.evaluation.suite import Outcome, averages_of, format_suite, rows_of
from evaclip.metrics import EVAL_METRICS

REPOSITORY = Path(__file__).parents[2]
NAMES = ["cat", "dog", "red bicycle", "house", "tree at night", "boat"]
RECALLS = EVAL_METRICS["retrieval"]
AVERAGE_ROWS = {"mean": "mean of 2", "gap": "gap: shards - mean"}
TREE = {
    "root": "/sets",
    "datasets": {
        "one": {"path": "one", "records": 50},
        "two": {"path": "two", "metric": "mean_per_class"},
        "three": {"path": "three", "metric": "mean_top1_top5"},
        "pairs": {"task": "retrieval", "path": "pairs"},
    },
    "averages": {"family": {"of": ["one", "two"], "gap_from": "one"}, "all": {"of": ["one", "two", "three", "pairs"]}},
    "published": {
        "M": [
            {"source": "a paper", "values": {"one": 75.0, "family": 50.0, "pairs.text_to_image_recall@5": 61.5}},
            {"source": "a card", "values": {"one": 80.25}},
        ]
    },
}


def suite_of(**changes):
    return config_file.validate({**TREE, **changes}, "test", SuiteConfig)


def result(top1, top5=0.9, mean_per_class=0.4):
    return Result("set", "zero_shot", {"top1": top1, "top5": top5, "mean_per_class": mean_per_class}, 40)


def outcomes(**changes):
    recalls = Result("pairs", "retrieval", dict(zip(RECALLS, (0.1, 0.2, 0.3, 0.4, 0.6, 0.8), strict=True)), 10)
    found = {
        "one": Outcome({"crop": result(0.7), "squash": result(0.8)}),
        "two": Outcome({"": result(0.5)}),
        "three": Outcome({"": result(0.3)}),
        "pairs": Outcome({"": recalls}),
    }
    return found | changes


def by_name(rows):
    return {(row.name, row.metric): row for row in rows}


# ------------------------------------------------------------------------------------------------------------ decisions


def test_values_averages_and_gap_follow_the_suite():
    rows = by_name(rows_of(suite_of(), outcomes(), "M"))
    best = rows["one", "top1"]
    assert (best.value, best.resize, best.records) == (0.8, "squash", 40)
    assert best.note == "crop 70.0; published values are of 50 records"
    assert rows["two", "mean_per_class"].value == 0.4
    assert rows["three", "mean_top1_top5"].value == pytest.approx(0.6)
    assert rows["pairs", "mean_recall"].value == pytest.approx(0.4)
    assert [rows["pairs", name].value for name in RECALLS] == [0.1, 0.2, 0.3, 0.4, 0.6, 0.8]
    assert rows["family", "mean of 2"].value == pytest.approx(0.6)
    assert rows["family", "gap: one - mean"].value == pytest.approx(0.2)
    assert rows["all", "mean of 4"].value == pytest.approx(fmean([0.8, 0.4, 0.6, 0.4]))
    family, everything = averages_of(suite_of(), [*rows.values()])
    assert (family.name, family.task, family.num_records) == ("family", "average", 80)
    assert family.metrics == {"mean": pytest.approx(0.6), "gap": pytest.approx(0.2)}
    assert everything.metrics == {"mean": rows["all", "mean of 4"].value}


@pytest.mark.parametrize("lacking", ["one", "two"])
def test_an_average_that_lacks_a_set_has_no_value_and_names_it(lacking):
    rows = rows_of(suite_of(), outcomes(**{lacking: Outcome({}, "missing: /sets/x does not exist")}), "M")
    found = by_name(rows)
    assert found["family", "mean of 2"].value is None
    assert found["family", "mean of 2"].note == f"incomplete: 1 of 2 sets have no value: {lacking}"
    assert found["family", "gap: one - mean"].value is None
    assert found["all", "mean of 4"].value is None
    assert averages_of(suite_of(), rows) == []
    (row,) = (row for row in rows if row.name == lacking)
    assert (row.value, row.note) == (None, "missing: /sets/x does not exist")


def test_published_values_stand_beside_ours_with_difference_and_source():
    table = format_suite(rows_of(suite_of(), outcomes(), "M"))
    assert re.search(
        r"\| one +\| top1 +\| +80\.0 \| squash +\| +40 \| 75\.0 \[1\], 80\.2 \[2\] \| \+5\.0, -0\.2 ", table
    )
    assert re.search(r"\| family +\| mean of 2 +\| +60\.0 .* 50\.0 \[1\] +\| \+10\.0 ", table)
    assert re.search(r"\| pairs +\| text_to_image_recall@5 +\| +60\.0 .* 61\.5 \[1\] +\| -1\.5 ", table)
    assert table.endswith("\n\n[1] a paper\n[2] a card")
    assert not [line for line in table.splitlines() if "gap" in line and "[1]" in line]
    assert len({line[:-1].rindex("|") for line in table.splitlines() if line.startswith("|")}) == 1, "aligned"


def test_without_a_value_there_is_no_difference():
    table = format_suite(rows_of(suite_of(), outcomes(one=Outcome({}, "failed: x")), "M"))
    assert re.search(r"\| one +\| top1 +\| +none \| +\| +\| 75\.0 \[1\], 80\.2 \[2\] \| +\| failed: x", table)


def test_a_message_of_several_lines_stays_in_its_cell():
    table = format_suite(rows_of(suite_of(), outcomes(one=Outcome({}, "failed: a|b\nc")), "M"))
    assert "| failed: a\\|b c" in table


@pytest.mark.parametrize("model", [None, "another"])
def test_values_of_other_models_are_not_compared(model):
    rows = rows_of(suite_of(), outcomes(), model)
    assert not any(row.published for row in rows)
    assert rows[0].note == "crop 70.0", "nor is the set's size"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"averages": {"x": {"of": ["one", "four"]}}}, "averages.x names the set four, which is not in datasets"),
        ({"averages": {"x": {"of": ["one"], "gap_from": "five"}}}, "averages.x names the set five"),
        ({"averages": {"x": {"of": ["one", "two", "one"]}}}, "averages.x names the set one more than once"),
        ({"averages": {"one": {"of": ["two"]}}}, "averages.one has the name of a set"),
        ({"published": {"M": [{"source": "s", "values": {"six": 1.0}}]}}, "published.M: six is no set, average or SET"),
        ({"published": {"M": [{"source": "s", "values": {"one.recall": 1.0}}]}}, "published.M: one.recall is no set"),
        ({"datasets": {"one": {"path": "x", "tempaltes": "y"}}}, "did you mean datasets.one.templates?"),
        ({"datasets": {"one": {"task": "loss", "path": "x"}}}, "does not match any of the expected tags"),
    ],
)
def test_names_that_are_not_in_the_suite_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        suite_of(**changes)


def test_every_option_of_a_suite_has_a_documentation():
    assert [option.path for option in config_file.options(SuiteConfig) if not option.doc] == []


# ------------------------------------------------------------------------------------------------------------- suites


@pytest.fixture(scope="module")
def evas():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVAL_SETS", "/sets")
        return config_file.load(REPOSITORY / "configs/suites/eva_clip.yaml", section=SuiteConfig)


def test_the_suite_of_evas_papers_averages_27_sets_and_measures_the_gap_from_imagenet(evas):
    assert len(set(evas.averages["classification"].of)) == 27
    assert len(evas.averages["robustness"].of) == 6
    assert evas.averages["robustness"].gap_from == "imagenet"
    assert set(evas.averages["robustness"].of) < set(evas.averages["classification"].of)
    used = {name for average in evas.averages.values() for name in average.of}
    assert used == evas.datasets.keys()


def test_published_averages_are_those_of_the_published_sets(evas):
    """Which would not be so if a number had been copied wrong."""
    family, checked = evas.averages["robustness"].of, 0
    for model, sources in evas.published.items():
        values = {key: value for rows in sources for key, value in rows.values.items()}
        if all(name in values for name in family):
            assert fmean(values[name] for name in family) == pytest.approx(values["robustness"], abs=0.06), model
            checked += 1
    assert checked == 9


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("model"), {"name": "tiny-ViT"}, std=0.3)


@pytest.fixture
def sets(tmp_path, png):
    """A root with a set of each kind, one that is broken, and the suite file."""
    root = tmp_path / "sets"
    lists = {"classnames.txt": NAMES, "zeroshot_classification_templates.txt": ["a {c}", "the {c}, drawn"]}

    def write(name, labelled):
        for split, first in (("test", 0), ("train", 500)):
            records = [
                (
                    f"{i}",
                    {
                        "png": png(first + i),
                        **({"cls": str(i * i % 6).encode()} if labelled else {"txt": f"picture {i}".encode()}),
                    },
                )
                for i in range(30)
            ]
            write_shards(root / name / split, records, 40)[0].rename(root / name / split / "0.tar")
            (root / name / split / "nshards.txt").write_text("1\n")
        for file, lines in lists.items():
            (root / name / file).write_text("\n".join(lines) + "\n")

    for name, labelled in (("shards", True), ("pairs", False), ("broken", False)):
        write(name, labelled)
    for i in range(24):
        path = root / "folders" / f"class {i % 6}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(200 + i))
    (root / "names").write_text("\n".join(NAMES))
    tree = {
        "root": str(root),
        "resizes": ["crop", "squash"],
        "datasets": {
            "shards": {"path": "shards", "per_template": True, "records": 30},
            "folders": {
                "path": "folders",
                "class_names": "names",
                "templates": "shards/zeroshot_classification_templates.txt",
                "metric": "mean_per_class",
                "resize": "squash",
            },
            "pairs": {"task": "retrieval", "path": "pairs", "resize": "squash"},
            "probed": {"task": "linear_probe", "path": "shards", "metric": "mean_per_class", "resize": "squash"},
            "elsewhere": {"path": "elsewhere"},
        },
        "averages": {
            "here": {"of": ["shards", "folders"], "gap_from": "shards"},
            "all": {"of": ["shards", "elsewhere"]},
        },
        "published": {"tiny-ViT": [{"source": "a paper", "values": {"shards": 50.0, "elsewhere": 60.0}}]},
    }

    def run(*arguments, **datasets):
        suite = {**tree, "datasets": {**tree["datasets"], **datasets}}
        (tmp_path / "suite.yaml").write_text(json.dumps(suite))
        cli.main(["evaluate", *map(str, arguments), "--suite", str(tmp_path / "suite.yaml"), "--batch", "16"])

    return run


def test_a_suite_measures_what_is_there_and_lists_what_is_not(sets, checkpoint, tmp_path, capsys):
    sets(checkpoint, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/suite.json").read_text())
    whole = json.loads((tmp_path / "out/evaluation.json").read_text())
    rows = {(row["name"], row["metric"]): row for row in found["rows"]}
    assert found["model"] == "tiny-ViT"
    average = whole.pop("here")
    assert set(whole) == {"shards.crop", "shards.squash", "folders", "pairs", "probed"}
    for name, expected in whole.items():
        folder, _, mode = name.partition(".")
        given = [
            "--task",
            expected["task"],
            "--dataset",
            str(tmp_path / "sets" / folder),
            "--output",
            str(tmp_path / "o"),
        ]
        if folder == "folders":
            lists = ["names", "shards/zeroshot_classification_templates.txt"]
            given += [
                f"--{o}={tmp_path / 'sets' / f}" for o, f in zip(("class-names", "templates"), lists, strict=True)
            ]
        if mode == "crop":  # as the model itself does
            cli.main(["evaluate", str(checkpoint), *given])
            (alone,) = json.loads((tmp_path / "o/evaluation.json").read_text()).values()
            assert alone["metrics"].items() <= expected["metrics"].items()
    best = max(whole[f"shards.{mode}"]["metrics"]["top1"] for mode in ("crop", "squash"))
    assert 0 < best < 1
    assert rows["shards", "top1"]["value"] == best
    assert rows["shards", "top1"]["published"] == [{"value": 0.5, "source": "a paper", "difference": best - 0.5}]
    assert "single templates" in rows["shards", "top1"]["note"]
    assert rows["here", "mean of 2"]["value"] == fmean([best, whole["folders"]["metrics"]["mean_per_class"]])
    assert average["metrics"] == {name: rows["here", row]["value"] for name, row in AVERAGE_ROWS.items()}
    assert rows["probed", "mean_per_class"]["value"] == whole["probed"]["metrics"]["mean_per_class"]
    assert rows["elsewhere", "top1"]["value"] is None
    assert rows["elsewhere", "top1"]["note"] == f"missing: {tmp_path / 'sets/elsewhere'} does not exist"
    assert rows["elsewhere", "top1"]["published"] == [{"value": 0.6, "source": "a paper", "difference": None}]
    assert rows["all", "mean of 2"]["note"] == "incomplete: 1 of 2 sets have no value: elsewhere"
    table = format_table_of(tmp_path / "out/suite.md")
    assert table in printed
    assert set(json.loads((tmp_path / "out/predictions/shards.crop.json").read_text())["templates"]) == {
        "a {c}",
        "the {c}, drawn",
    }
    with Image.open(tmp_path / "out/suite.png") as picture:
        assert picture.width > 800


def format_table_of(path):
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("|"))


def test_a_set_that_cannot_be_used_does_not_cost_the_others(sets, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        sets(checkpoint, "--output", tmp_path / "out", broken={"path": "broken"})
    error = capsys.readouterr().err
    assert "1 of 6 sets could not be measured: broken: " in error
    assert "has no label (cls)" in error
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/suite.json").read_text())["rows"]}
    assert rows["broken"]["note"].startswith("failed: ")
    assert rows["pairs"]["value"] > 0


def test_under_a_limit_nothing_published_is_compared(sets, checkpoint, tmp_path):
    sets(checkpoint, "--limit", 6, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out/suite.json").read_text())["rows"]
    assert {row["records"] for row in rows} == {6, None}
    assert not any(row["published"] for row in rows)
    assert "limit: 6" in (tmp_path / "out/suite.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x"], "--suite names its datasets itself; leave --dataset out"),
        (["--task", "loss"], "describe a --dataset, which is missing"),
    ],
)
def test_a_suite_and_a_dataset_are_not_given_together(sets, checkpoint, capsys, arguments, message):
    with pytest.raises(SystemExit):
        sets(checkpoint, *arguments)
    assert message in capsys.readouterr().err


def test_a_root_without_any_set_is_refused(sets, checkpoint, tmp_path, capsys):
    (tmp_path / "sets").rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        sets(checkpoint)
    assert (
        f"no set of the suite is there, for instance {tmp_path / 'sets/shards'}; check its root"
        in capsys.readouterr().err
    )


def test_without_matplotlib_only_the_picture_is_left_out(sets, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    sets(checkpoint, "--output", tmp_path / "out")
    assert "pip install 'evaclip[plot]'" in capsys.readouterr().err
    assert (tmp_path / "out/suite.json").is_file()
    assert not (tmp_path / "out/suite.png").exists()
