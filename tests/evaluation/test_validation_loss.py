import pytest
import torch
import torch.nn.functional as F

from evaclip.data.batch import PackedText
from evaclip.data.images import eval_crop, load_eval
from evaclip.data.shards import write_shards
from evaclip.errors import DataError
from evaclip.loss import Similarity


def caption(i):
    return f"a thing\nnumber {i * 37 % 101}, {'large' if i % 2 else 'small'}"


@pytest.fixture
def records(png):
    return [(f"{i:09d}", {"png": png(i), "txt": caption(i).encode()}) for i in range(23)]


@pytest.fixture
def dataset(tmp_path, records):
    write_shards(tmp_path, records, 10)
    return {"task": "loss", "path": str(tmp_path / "{00000..00002}.tar")}


def reference(clip, tokens, records, texts, group, scale):
    """Mean over full groups of the symmetric cross-entropy."""
    losses = []
    for start in range(0, len(records) - group + 1, group):
        part = [r["png"] for _, r in records[start : start + group]]
        image = clip.encode_image(torch.stack([eval_crop(load_eval(p, max_pixels=10_000), 16, "crop") for p in part]))
        text = clip.encode_text(PackedText.pack(tokens(texts[start : start + group])))
        logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        target = torch.arange(group)
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [4, 5, 23])
def test_it_is_the_loss_of_consecutive_full_groups_on_any_ranks(
    clip, tokens, dataset, records, measure, world_size, batch
):
    result = measure(dataset, batch=batch, world_size=world_size, similarity=Similarity(20.0))
    expected = reference(clip, tokens, records, [caption(i) for i in range(23)], batch, 20.0)
    # fp32 features in batches of other sizes, times 20
    assert result.metrics == {"loss": pytest.approx(expected, rel=1e-5)}
    assert result.num_records == 23 // batch * batch
    assert [name for name, _ in result] == ["eval/set/loss"]


def test_in_clip_benchmarks_layout_the_first_line_is_the_caption(clip, tokens, folder, records, measure):
    result = measure({"task": "loss", "path": str(folder(records))}, batch=6, similarity=Similarity(20.0))
    expected = reference(clip, tokens, records, [caption(i).splitlines()[0] for i in range(23)], 6, 20.0)
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["loss"] != pytest.approx(
        reference(clip, tokens, records, [caption(i) for i in range(23)], 6, 20.0)
    )


def test_every_rank_calls_the_towers_equally_often(dataset, measure, counting):
    encoders = [counting() for _ in range(3)]
    measure(dataset, batch=4, world_size=3, encoder=lambda rank: encoders[rank])
    assert encoders[0].calls == encoders[1].calls == encoders[2].calls


def test_fewer_records_than_one_group_are_refused(dataset, measure):
    with pytest.raises(DataError, match=r"23 records do not fill one group of 24 pairs; lower the batch"):
        measure(dataset, batch=24)
