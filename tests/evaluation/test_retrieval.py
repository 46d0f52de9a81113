import pytest
import torch

from evaclip.data.batch import PackedText
from evaclip.data.images import eval_crop, load_eval
from evaclip.distributed import Ranks
from evaclip.errors import DataError
from evaclip.evaluation.retrieval import count_hits

COLOURS = ["red", "green", "blue", "black", "white", "pink"]
WORDS = [
    *COLOURS,
    "small",
    "large",
    "round",
    "left",
    "right",
    "above",
    "below",
    "boat",
    "tree",
    "house",
    "dog",
    "night",
]


def captions(i):
    return [" ".join(WORDS[(i * 7 + j * 5 + k * k * (i + 3)) % len(WORDS)] for k in range(5)) for j in range(1 + i % 4)]


@pytest.fixture
def records(png):
    return [(f"s{i:07d}", {"png": png(i), "txt": "\n".join(captions(i)).encode()}) for i in range(23)]


@pytest.fixture
def dataset(folder, records):
    return {"task": "retrieval", "path": str(folder(records))}


def test_recall_is_that_of_clip_benchmark(clip, tokens, dataset, records, measure):
    images = torch.stack([eval_crop(load_eval(r["png"], max_pixels=10_000), 16, "crop") for _, r in records])
    owner = torch.tensor([i for i in range(23) for _ in captions(i)])
    texts = PackedText.pack(tokens([text for i in range(23) for text in captions(i)]))
    scores = clip.encode_text(texts, normalize=True) @ clip.encode_image(images, normalize=True).T
    positive = owner[:, None] == torch.arange(23)
    expected = {}
    for k in (1, 5, 10):
        best = positive.T.gather(1, scores.T.topk(k).indices)  # any caption of the image among the k nearest
        expected[f"image_to_text_recall@{k}"] = best.any(1).double().mean().item()
        found = positive.gather(1, scores.topk(k).indices)
        expected[f"text_to_image_recall@{k}"] = found.any(1).double().mean().item()
    result = measure(dataset)
    assert result.metrics == pytest.approx(expected)
    assert result.num_records == 23
    assert len(set(expected.values())) == 6, "six different values show more"
    assert result.predictions is None


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_result_does_not_depend_on_the_number_of_ranks(dataset, measure, world_size, monkeypatch):
    whole = measure(dataset)
    monkeypatch.setattr("evaclip.evaluation.retrieval._TILE_NUMBERS", 100)  # several tiles per rank
    assert measure(dataset, world_size=world_size) == whole


def test_every_rank_calls_the_towers_equally_often(dataset, measure, counting):
    encoders = [counting() for _ in range(3)]
    measure(dataset, world_size=3, encoder=lambda rank: encoders[rank])
    assert encoders[0].calls == encoders[1].calls == encoders[2].calls


def test_each_of_an_images_captions_can_find_it():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 1, 1, 2]]
    one, _, _ = count_hits(images, texts, torch.tensor([[0, 0], [1, 2], [3, 3]]), Ranks())
    assert one == 3
    one, _, _ = count_hits(texts, images, torch.tensor([[0], [1], [1], [2]]), Ranks())
    assert one == 4


def test_equal_similarities_rank_by_number():
    same = torch.ones(12, 2)
    assert count_hits(same, same, torch.arange(12)[:, None], Ranks()) == [1, 5, 10]


def test_a_similarity_that_is_not_finite_is_never_a_hit():
    images, texts = torch.eye(3), torch.eye(3)
    texts[1] = float("nan")
    assert count_hits(images, texts, torch.arange(3)[:, None], Ranks()) == [0, 2, 2]
    assert count_hits(texts, images, torch.arange(3)[:, None], Ranks()) == [2, 2, 2]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"record 's0000005' has no caption \(txt\), only png"),
        ({"txt": b" \n\n"}, r"record 's0000005': txt is empty; give it a caption or remove the record"),
        ({"txt": b"\xff"}, r"record 's0000005': txt is not UTF-8"),
    ],
)
def test_a_record_without_captions_stops_every_rank(folder, records, measure, members, message, world_size):
    records[5] = ("s0000005", {"png": records[5][1]["png"], **members})
    with pytest.raises(DataError, match=message):
        measure({"task": "retrieval", "path": str(folder(records))}, world_size=world_size)
