import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaclip import evaluation
from evaclip.config import ZeroShotDataset
from evaclip.data.batch import PackedText
from evaclip.data.images import eval_crop, load_eval
from evaclip.distributed import Ranks
from evaclip.errors import DataError
from evaclip.evaluation import open_bench
from evaclip.evaluation.accuracy import nearest_classes
from evaclip.loss import Similarity

NAMES = ["cat", "dog", "red bicycle", "house", "tree at night", "boat", "{x} brace"]
TEMPLATES = ["a photo of a {c}.", "{c}", "the {c}, drawn; a {c}"]
LABELS = [(3 * i + i // 4) % 6 for i in range(23)]  # class 6 never occurs


@pytest.fixture
def records(png):
    return [(f"s{i:07d}", {"png": png(i), "cls": str(label).encode()}) for i, label in enumerate(LABELS)]


@pytest.fixture
def dataset(folder, records):
    return {"path": str(folder(records, names=NAMES, templates=TEMPLATES))}


def reference(clip, tokens, records):
    """Prompt ensembling as in CLIP's notebook."""
    images = torch.stack([eval_crop(load_eval(r["png"], max_pixels=10_000), 16, "crop") for _, r in records])
    prompts = [PackedText.pack(tokens([t.replace("{c}", name) for t in TEMPLATES])) for name in NAMES]
    weights = torch.stack([F.normalize(clip.encode_text(p, normalize=True).mean(0), dim=0) for p in prompts])
    return (clip.encode_image(images, normalize=True) @ weights.T).topk(5).indices


def test_accuracies_and_predictions_are_those_of_a_naive_classifier(clip, tokens, dataset, records, measure):
    nearest, labels = reference(clip, tokens, records), torch.tensor(LABELS)
    hit = nearest[:, 0] == labels
    result = measure(dataset)
    assert result.num_records == 23
    assert result.metrics == pytest.approx(
        {
            "top1": hit.double().mean().item(),
            "top5": (nearest == labels[:, None]).any(1).double().mean().item(),
            "mean_per_class": sum(hit[labels == c].double().mean().item() for c in range(6)) / 6,
        }
    )
    assert 0 < result.metrics["top1"] < result.metrics["top5"] < 1, "a test on 0 or 1 would show little"
    assert result.predictions.labels == tuple(LABELS)
    assert result.predictions.predicted == tuple(nearest[:, 0].tolist())
    assert result.predictions.class_names == tuple(NAMES)
    assert [name for name, _ in result] == ["eval/set/top1", "eval/set/top5", "eval/set/mean_per_class"]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_result_does_not_depend_on_the_number_of_ranks(dataset, measure, world_size):
    assert measure(dataset, world_size=world_size) == measure(dataset)


def test_nor_on_workers_or_batch_size(dataset, measure):
    assert measure(dataset, workers=2, batch=3) == measure(dataset, batch=64)


def test_more_ranks_than_records_and_classes_work(dataset, measure):
    assert measure({**dataset, "limit": 2}, world_size=9) == measure({**dataset, "limit": 2})


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_every_rank_calls_the_towers_equally_often_with_equally_many(dataset, measure, counting, batch):
    encoders = [counting() for _ in range(3)]
    measure(dataset, world_size=3, batch=batch, encoder=lambda rank: encoders[rank])
    assert encoders[0].calls == encoders[1].calls == encoders[2].calls
    assert max(count for _, count in encoders[0].calls) <= batch


def test_only_the_first_records_are_used_under_a_limit(dataset, measure):
    whole, part = measure(dataset), measure({**dataset, "limit": 10})
    assert part.num_records == 10
    assert part.predictions.labels == whole.predictions.labels[:10]
    assert part.predictions.predicted == whole.predictions.predicted[:10]
    assert measure({**dataset, "limit": 1000}) == whole


def test_given_lists_replace_the_folders_and_plain_shards_are_read(folder, records, tmp_path, measure, dataset):
    (tmp_path / "names").write_text("\n".join(NAMES))
    (tmp_path / "templates").write_text("\n".join(TEMPLATES))
    lists = {"class_names": str(tmp_path / "names"), "templates": str(tmp_path / "templates")}
    shards = {"path": f"{dataset['path']}/test/{{0..2}}.tar", **lists}
    expected = measure(dataset)
    (tmp_path / "set" / "classnames.txt").unlink()
    assert measure(shards) == measure({**dataset, **lists}) == expected


def test_equal_scores_rank_by_number():
    scores = torch.tensor([[0.5, 0.7, 0.7, 0.5, 0.7, 0.1]])
    assert nearest_classes(scores).tolist() == [[1, 2, 4, 0, 3]]


def test_scores_that_are_not_finite_predict_nothing():
    scores = torch.tensor([[float("nan")] * 3, [0.1, float("nan"), 0.3]])
    assert nearest_classes(scores).tolist() == [[-1, -1, -1], [-1, 2, 0]]


def test_evaluation_leaves_random_numbers_and_gradients_alone(dataset, measure):
    before = torch.get_rng_state()
    measure(dataset, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"1"}, r"1\.tar: record 's0000012' has no image \(jpg, jpeg, png, webp\), only cls"),
        ({"png": "image"}, r"record 's0000012' has no label \(cls\), only png"),
        ({"png": "image", "cls": b"cat"}, r"record 's0000012': label 'cat' is not a number"),
        ({"png": "image", "cls": b"7"}, r"record 's0000012': label 7 is not in 0\.\.6; 7 class names are given"),
        ({"png": "image", "cls": b"-1"}, r"record 's0000012': label -1 is not in 0\.\.6"),
        ({"png": b"\x89PNG broken", "cls": b"1"}, r"1\.tar: record 's0000012': the image is unusable .* skips nothing"),
    ],
)
def test_a_bad_record_stops_every_rank_and_is_named(folder, records, png, measure, members, message, world_size):
    records[12] = ("s0000012", {key: png(12) if value == "image" else value for key, value in members.items()})
    path = folder(records, names=NAMES, templates=TEMPLATES)
    with pytest.raises(DataError, match=message):
        measure({"path": str(path)}, world_size=world_size)


def test_a_bad_record_is_one_clear_line_from_a_worker_too(folder, records, measure):
    records[12] = ("s0000012", {"png": b"?", "cls": b"1"})
    path = folder(records, names=NAMES, templates=TEMPLATES)
    with pytest.raises(DataError) as caught:
        measure({"path": str(path)}, workers=2)
    assert "record 's0000012'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, r"classnames\.txt does not exist; .*, or another file as class_names"),
        (
            "zeroshot_classification_templates.txt",
            None,
            r"templates\.txt does not exist; .*, or another file as templates",
        ),
        ("classnames.txt", "a\n\nb\n", r"classnames\.txt: line 2 is empty"),
        ("classnames.txt", "\n", r"classnames\.txt is empty; it must hold an entry per line"),
        ("classnames.txt", b"\xff\xfe", r"classnames\.txt is not UTF-8"),
        ("zeroshot_classification_templates.txt", "{c}\na photo\n", r"line 2, 'a photo', lacks \{c\}"),
        ("test/nshards.txt", None, r"test/nshards\.txt does not exist; .* is not in CLIP_benchmark's"),
        ("test/nshards.txt", "none", r"nshards\.txt holds 'none'; it must hold the number of shards"),
        ("test/nshards.txt", "0", r"nshards\.txt holds '0'; it must hold the number of shards, at least 1"),
        ("test/nshards.txt", "4", r"3\.tar does not exist"),
        ("test/1.tar", b"not a tar", r"1\.tar: the file is cut off at byte 0; restore it"),
    ],
)
def test_what_is_missing_from_the_folder_is_named(dataset, tmp_path, measure, file, content, message):
    path = tmp_path / "set" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        measure(dataset, world_size=2)


def test_a_missing_split_names_those_there_are(dataset, measure):
    with pytest.raises(DataError, match=r"val/nshards\.txt does not exist; set split to one of test"):
        measure({**dataset, "split": "val"})


def test_a_path_that_does_not_exist_is_named(measure):
    lists = {"class_names": "/nowhere/names", "templates": "/nowhere/templates"}
    with pytest.raises(DataError, match="/nowhere/names does not exist"):
        measure({"path": "/nowhere/set", **lists})


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_template_alone_is_measured_beside_the_ensemble(dataset, tmp_path, measure, world_size):
    ensemble = measure(dataset)
    assert ensemble.templates is None
    result = measure({**dataset, "per_template": True}, world_size=world_size)
    alone = {}
    for template in TEMPLATES:
        (tmp_path / "one").write_text(template)
        alone[template] = measure({**dataset, "templates": str(tmp_path / "one")}).metrics["top1"]
    assert result.templates == alone
    assert len(set(alone.values())) > 1
    values = sorted(alone.values())
    spread = {"min": values[0], "median": values[1], "max": values[2], "std": np.std(values)}
    assert result.metrics == pytest.approx(
        ensemble.metrics | {f"template_top1_{name}": value for name, value in spread.items()}
    )
    assert result.predictions == ensemble.predictions


def test_sets_of_equal_classes_share_one_classifier(dataset, counting, clip):
    encoder = counting()
    bench = open_bench(encoder, clip.config, Ranks(), batch=64, workers=0, max_image_pixels=10_000)
    config = ZeroShotDataset.model_validate({**dataset, "resize": "squash"})
    for other in (config, config.model_copy(update={"resize": "crop"})):
        evaluation.measure("set", other, bench, None, Similarity(10.0))
    assert [call for call in encoder.calls if call[0] == "text"] == [("text", len(NAMES) * len(TEMPLATES))]
    evaluation.measure("set", config.model_copy(update={"per_template": True}), bench, None, Similarity(10.0))
    assert sum(name == "text" for name, _ in encoder.calls) == 2
