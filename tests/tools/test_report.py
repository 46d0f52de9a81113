"""tools/report.py on made-up results: the numbers, the verdicts, and what stands on the page."""

import base64
import io
import itertools
import json
import sys
from dataclasses import fields

import pytest
import report
import report_page
import torch
from PIL import Image

import evaclip
from evaclip import checkpoint, config_file
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.data.shards import write_shards
from evaclip.distributed import Ranks
from evaclip.errors import DataError

METRICS = {
    "digits": {"top1": 0.75, "top5": 1.0, "mean_per_class": 0.7},
    "pictures": {
        "image_to_text_recall@1": 0.5,
        "image_to_text_recall@5": 1.0,
        "image_to_text_recall@10": 1.0,
        "text_to_image_recall@1": 0.25,
        "text_to_image_recall@5": 1.0,
        "text_to_image_recall@10": 1.0,
    },
    "validation": {"loss": 2.5},
}
TASKS = {"digits": "zero_shot", "pictures": "retrieval", "validation": "loss"}
EVALUATION = {name: {"task": TASKS[name], "metrics": metrics, "num_records": 4} for name, metrics in METRICS.items()}
DIGITS = {"class_names": ["nought", "<one>"], "labels": [0, 0, 1, 1], "predictions": [0, 1, 1, 1]}
ROWS = [
    {"step": 0, "samples": 0, "eval/digits/top1": 0.5, "eval/validation/loss": 4.0},
    {"step": 1, "samples": 100, "train/loss": 3.0, "speed/samples_per_second": 50, "speed/data_wait_fraction": 0.5},
    {"step": 2, "samples": 200, "train/loss": None, "speed/samples_per_second": 100, "speed/data_wait_fraction": 0.1},
    {"step": 2, "samples": 200, "eval/digits/top1": 0.75, "eval/validation/loss": 2.5},
]
CAPTIONS = {"pictures": [["red", "rouge"], ["blue", "bleu"], ["green", "vert"], ["grey", "gris"]]}


def summarise(*requirements, evaluation=EVALUATION, rows=ROWS):
    wanted = [report.parse_requirement(text) for text in requirements]
    return report.summarise(rows, evaluation, {"digits": DIGITS}, CAPTIONS, wanted)


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("images", "captions", "k"), [(3, 6, 1), (3, 6, 2), (2, 6, 5), (2, 4, 10), (4, 4, 1)])
def test_chance_of_image_to_text_recall_is_the_share_of_draws_that_hold_an_own_caption(images, captions, k):
    draws = list(itertools.combinations(range(captions), min(k, captions)))
    share = sum(any(caption < captions // images for caption in draw) for draw in draws) / len(draws)
    found = report.chance(f"image_to_text_recall@{k}", images=images, captions=captions)
    assert found == pytest.approx(share, abs=1e-12)  # exact up to rounding of a short product


def test_chance_levels_of_classification_and_text_to_image_recall():
    assert report.chance("top1", classes=900) == report.chance("mean_per_class", classes=900) == 1 / 900
    assert report.chance("top5", classes=10) == 0.5
    assert report.chance("top5", classes=4) == 1
    assert report.chance("text_to_image_recall@5", images=50, captions=250) == 0.1
    assert report.chance("loss") is None
    assert report.chance("log10_l2", classes=10) is None  # of a linear probe


def test_confusion_counts_true_classes_in_rows_and_leaves_out_what_has_no_prediction():
    assert report.confusion([0, 0, 1, 2, 2], [0, 1, 1, 0, -1], 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_throughput_is_samples_over_time_and_waiting_is_weighted_by_time():
    found = report.throughput(ROWS)
    assert found == {
        "samples_per_second": pytest.approx(200 / 3),  # 100 samples in 2 s, 100 in 1 s
        "training_seconds": pytest.approx(3),
        "data_wait_fraction": pytest.approx((2 * 0.5 + 1 * 0.1) / 3),
    }
    assert report.throughput(ROWS[:1]) == {}


def test_summary_puts_chance_and_the_value_before_training_beside_each_score():
    scores = summarise()["evaluation"]
    assert scores["digits"]["metrics"]["top1"] == {"value": 0.75, "chance": 0.5, "at_start": 0.5}
    assert scores["digits"]["metrics"]["top5"]["at_start"] is None
    assert scores["pictures"]["metrics"]["text_to_image_recall@1"]["chance"] == 0.25
    assert scores["validation"]["metrics"]["loss"] == {"value": 2.5, "chance": None, "at_start": 4.0}
    assert summarise(rows=ROWS[1:])["evaluation"]["digits"]["metrics"]["top1"]["at_start"] is None


@pytest.mark.parametrize(
    ("requirement", "passed"),
    [("digits.top1=0.75", True), ("digits.top1=0.76", False), ("pictures.image_to_text_recall@1=0.5", True)],
)
def test_requirement_is_passed_from_its_value_up(requirement, passed):
    summary = summarise(requirement, "digits.top5=0.9")
    assert [verdict["passed"] for verdict in summary["requirements"]] == [passed, True]
    assert summary["passed"] is passed


def test_score_that_is_not_finite_never_passes():
    broken = {**EVALUATION, "digits": {**EVALUATION["digits"], "metrics": {**METRICS["digits"], "top1": None}}}
    summary = summarise("digits.top1=0", evaluation=broken)
    assert not summary["passed"]
    assert "not finite" in page(summary)


def test_requirement_of_a_score_that_does_not_exist_is_an_error_that_lists_those_that_do():
    with pytest.raises(DataError, match=r"--require digit\.top1: the run has no such result; it has digits\.top1, "):
        summarise("digit.top1=0.9")


def test_history_without_rows_is_an_error():
    with pytest.raises(DataError, match="no rows; train first"):
        summarise(rows=[])


@pytest.mark.parametrize("text", ["digits.top1", "top1=0.5", "digits.top1=much", "digits.top1=nan", ".top1=1", "=1"])
def test_malformed_requirement_is_refused_with_an_example(capsys, text):
    with pytest.raises(SystemExit):
        report.main(["run", "--require", text])
    assert f"{text!r} is not of the form DATASET.METRIC=VALUE, such as digits.top1=0.97" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- page


def page(summary, samples=(), mistakes=()):
    names = {"digits": DIGITS["class_names"]}
    shown = {"digits": samples}, {"digits": mistakes}
    return report_page.page("runs/x", {**summary, "commands": {}}, names, *shown, "<svg>PLOTS</svg>")


def test_the_penalty_of_a_probe_is_no_percentage():
    found = {"task": "linear_probe", "num_records": 4, "metrics": {"top1": 0.5, "log10_l2": -1.125}}
    text = page(summarise(evaluation={**EVALUATION, "probed": found}))
    assert "-1.1250" in text
    assert "-112" not in text


def test_page_says_plainly_what_is_passed_and_what_is_not():
    text = page(summarise("digits.top1=0.9", "digits.top5=0.9"))
    assert '<strong class="bad">not passed: digits.top1</strong>' in text
    assert 'required 90.0 %: <strong class="bad">not passed</strong>' in text
    assert "passed: all required scores are reached" in page(summarise("digits.top5=0.9"))
    assert "required" not in page(summarise())


def test_page_holds_scores_chance_confusion_and_recall():
    text = page(summarise())
    assert "<b>75.0 %</b> chance 50.0 %" in text
    assert "<td>digits (4)</td>\n<td>top1</td>\n<td>75.0 %</td>\n<td>50.0 %</td>\n<td>50.0 %</td>" in text
    assert "<td>validation (4)</td>\n<td>loss</td>\n<td>2.5000</td>\n<td></td>\n<td>4.0000</td>" in text
    assert "<td>pictures, image to text</td>\n<td>50.0 % (25.0 %)</td>" in text
    assert "4 images, 8 captions" in text
    assert "67 samples per second" in text
    assert "PLOTS" in text


def test_page_marks_right_and_wrong_predictions_and_escapes_what_comes_from_data():
    samples = [
        report_page.Sample("data:,", truth="nought", predicted="nought", right=True),
        report_page.Sample("data:,", truth="<one>", predicted='"&', right=False),
    ]
    text = page(summarise(), samples, samples[1:])
    assert "1 of 2 right" in text
    assert "Mistakes, 1 shown" in text
    assert text.count('"bad">wrong') == 2
    assert '<strong class="good">right</strong>: nought</figure>' in text
    assert '<strong class="bad">wrong</strong>: &quot;&amp;<br><span class="note">is: &lt;one&gt;</span>' in text
    assert "<one>" not in text


def test_curves_are_one_svg_the_same_every_time_with_a_panel_per_kind_of_metric():
    evaluation = summarise()["evaluation"]
    svg = report_page.curves(ROWS, evaluation)
    assert svg.startswith("<svg")
    assert svg == report_page.curves(ROWS, evaluation)
    assert all(f"<!-- {heading} -->" in svg for heading in ("loss, in nats", "retrieval recall@1"))
    assert "recall" not in report_page.curves(ROWS, {"digits": evaluation["digits"]})


# ------------------------------------------------------------------------------------------------------------ running


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (60 * shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_set(folder, name, extras):
    """A set of four images in CLIP_benchmark's layout."""
    records = [(f"s{number}", {"jpg": jpeg(number), **extra}) for number, extra in enumerate(extras)]
    (tar,) = write_shards(folder / name / "test", records, 4)
    tar.rename(tar.with_name("0.tar"))
    (folder / name / "test/nshards.txt").write_text("1\n")
    return str(folder / name)


@pytest.fixture
def run_dir(tmp_path):
    """A run that was never trained: made-up results, real images, and a checkpoint of random weights."""
    digits = write_set(tmp_path, "digits", [{"cls": str(label).encode()} for label in DIGITS["labels"]])
    texts = [{"txt": "\n".join(captions).encode()} for captions in CAPTIONS["pictures"]]
    pictures = write_set(tmp_path, "pictures", texts)
    tower = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
    config = config_file.validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"embed_dim": 8, "image": {**tower, "image_size": 8, "patch_size": 4}, "text": tower},
            "data": {"sources": {"noise": {"kind": "synthetic"}}},
            "train": {"steps": 2, "global_batch": 100},
            "eval": {
                "datasets": {
                    "digits": {"path": digits},
                    "pictures": {"task": "retrieval", "path": pictures},
                    "validation": {"task": "loss", "path": str(tmp_path / "any.tar")},
                }
            },
        },
        "test",
    )
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_file.dump(config))
    rows = [*ROWS[:2], ROWS[2] | ROWS[3]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "predictions/digits.json").write_text(json.dumps(DIGITS))
    weights = dict(evaclip.create_model(config.model).model.named_parameters()) | {"logit_scale": torch.ones(1)}
    nothing = {field.name: {} for field in fields(checkpoint.RunState)}
    shapes = {name: list(value.shape) for name, value in weights.items()}
    progress = checkpoint.RunState(**{**nothing, "step": 2, "shapes": shapes})
    entries = [checkpoint.Entry("weight", name, 0, value.detach().flatten()) for name, value in weights.items()]
    CheckpointWriter(folder / "checkpoints", config, Ranks()).save(progress, entries, final=True)
    return folder


def test_report_is_written_and_names_images_captions_and_commands(run_dir, capsys):
    assert report.main([str(run_dir), "--require", "digits.top1=0.75"]) == 0
    text = (run_dir / "report.html").read_text()
    images = [base64.b64encode(jpeg(shade)).decode() for shade in range(4)]
    # each once as a digit and once as a picture, and the second, which is taken for another digit, as a mistake
    assert [text.count(image) for image in images] == [2, 3, 2, 2]
    assert "3 of 4 right" in text
    assert sum(f": {caption}<" in text for image in CAPTIONS["pictures"] for caption in image) >= 1
    for command in (
        f"launch/local.sh 1 {run_dir}/config.yaml run_dir={run_dir}-again",
        f"launch/local.sh 1 {run_dir}/config.yaml<",
        f"evaclip evaluate {run_dir}",
    ):
        assert command in text
    out = capsys.readouterr().out
    assert "passed: digits.top1 0.75 >= 0.75" in out
    assert "pictures.text_to_image_recall@1: 0.25  (chance 0.2500)" in out


def test_report_json_holds_every_number_and_repeats(run_dir):
    assert report.main([str(run_dir), "--require", "digits.top1=0.75"]) == 0
    first = [(run_dir / name).read_bytes() for name in ("report.json", "report.html")]
    found = json.loads(first[0])
    assert found["passed"] is True
    assert found["requirements"] == [{"name": "digits.top1", "required": 0.75, "value": 0.75, "passed": True}]
    assert found["evaluation"]["pictures"]["captions"] == 8
    assert found["confusion"] == {"digits": [[1, 1], [0, 2]]}
    assert (found["steps"], found["samples"]) == (2, 200)
    assert report.main([str(run_dir), "--require", "digits.top1=0.75"]) == 0
    assert [(run_dir / name).read_bytes() for name in ("report.json", "report.html")] == first


def test_missed_requirement_writes_the_report_and_exits_with_1(run_dir, capsys):
    assert report.main([str(run_dir), "--require", "digits.top1=0.97"]) == 1
    assert "NOT PASSED: digits.top1 0.75 < 0.97" in capsys.readouterr().out
    assert json.loads((run_dir / "report.json").read_text())["passed"] is False
    assert "not passed: digits.top1" in (run_dir / "report.html").read_text()


def test_retrieved_caption_is_the_nearest_of_all(run_dir):
    config = config_file.load(run_dir / "config.yaml")
    clip = evaclip.load(run_dir)
    samples = report.retrieved_samples(config.eval.datasets["pictures"], CAPTIONS["pictures"], config, clip)
    texts = [caption for image in CAPTIONS["pictures"] for caption in image]
    for number, sample in enumerate(samples):
        pixels = clip.preprocess(Image.open(io.BytesIO(jpeg(number))))[None]
        with torch.no_grad():
            image = clip.encode_image(pixels, normalize=True)
            scores = [(image @ clip.encode_text(clip.tokenize(text), normalize=True).T).item() for text in texts]
        assert sample.predicted == texts[max(range(len(texts)), key=scores.__getitem__)]
        assert sample.right == (sample.predicted in CAPTIONS["pictures"][number])


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "config.yaml"])
def test_run_that_lacks_a_file_is_refused(run_dir, capsys, name):
    (run_dir / name).unlink()
    assert report.main([str(run_dir)]) == 1
    assert f"error: {run_dir / name} does not exist; give the directory of a run" in capsys.readouterr().err


def test_results_of_a_set_that_the_run_does_not_know_are_refused(run_dir, capsys):
    (run_dir / "evaluation.json").write_text(json.dumps({"other": EVALUATION["digits"]}))
    assert report.main([str(run_dir)]) == 1
    assert "error: evaluation.json has 'other', config.yaml has not; run evaclip evaluate" in capsys.readouterr().err


def test_missing_matplotlib_is_named_with_its_remedy(run_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run_dir)]) == 1
    assert "error: the curves need matplotlib, which is missing; pip install 'evaclip[demo]'" in capsys.readouterr().err
