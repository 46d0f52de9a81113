"""``evaclip inspect``: what it draws and counts, against what training takes."""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import SYNTHETIC, colour_records, jpeg, merged, tiny_config, tiny_tree

from evaclip import cli
from evaclip.config import ModelConfig
from evaclip.contact_sheet import best_font, layout, shortened, wrapped
from evaclip.data.order import SlotCursor, choose_slots
from evaclip.data.pipeline import make_plan
from evaclip.data.shards import Shard, write_shards
from evaclip.distributed import Ranks
from evaclip.errors import ConfigError
from evaclip.inspection import first_rank, inspect, kept_grids, pass_of, read, tiles_of
from evaclip.models import timm_parts, vision
from evaclip.models.timm_tower import TimmTower
from evaclip.sources import open_sources
from evaclip.train import train


def opened(config):
    """Plan and sources of a configuration."""
    sources = open_sources(config, Ranks())
    return make_plan(config, sources, choose_slots(config.train.global_batch, 1, config.data.slots)), sources


def test_the_sheet_shows_the_pixels_and_the_kept_patches_that_training_takes(tmp_path, colour_shards, monkeypatch):
    batches, kept = [], {}
    plain_step, plain_kept = train.__globals__["forward_backward"], vision.kept_patches

    def step(engine, loss, micro_batches, ranks):
        batches.extend(micro_batches)
        return plain_step(engine, loss, micro_batches, ranks)

    def keep(seeds, *sizes):
        found = plain_kept(seeds, *sizes)
        kept.update(zip(seeds.tolist(), found.tolist(), strict=True))
        return found

    monkeypatch.setattr("evaclip.train.forward_backward", step)
    monkeypatch.setattr(vision, "kept_patches", keep)
    sources = {"a": {"shards": str(colour_shards / "{00000..00001}.tar"), "weight": 2}, "b": SYNTHETIC}
    options = {"data__sources": sources, "train__steps": 2, "train__micro_batch": 8, "data__workers": 2}
    config = tiny_config(tmp_path / "run", **options)
    train(config)
    monkeypatch.undo()
    inspect(config, batches=2, samples=32, output=tmp_path / "x.png")

    images, seeds = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "seeds"))
    assert len(images) == 32
    sheet, places = np.array(Image.open(tmp_path / "x.png")), layout(32, 16)
    for number, (image, seed) in enumerate(zip(images, seeds.tolist(), strict=True)):
        left, top = places.corner(number)
        drawn = sheet[top : top + places.width, left : left + places.width]
        assert (drawn == np.kron(drawn[:: places.zoom, :: places.zoom], np.ones((places.zoom, places.zoom, 1)))).all()
        drawn = drawn[:: places.zoom, :: places.zoom]
        for patch in range(16):
            rows, columns = (slice(4 * at, 4 * at + 4) for at in divmod(patch, 4))
            if patch in kept[seed]:
                assert np.array_equal(drawn[rows, columns], image[:, rows, columns].permute(1, 2, 0))
            else:
                assert (np.ptp(drawn[rows, columns], axis=2) == 0).all()  # grey
        assert len(kept[seed]) == 8


def test_captions_passes_and_records_are_those_of_the_samples(tmp_path, colour_shards):
    source = {"shards": str(colour_shards / "00000.tar")}  # 30 records: the second step begins another pass
    config = tiny_config(tmp_path, source, model__text__context_length=5)
    plan, sources = opened(config)
    reading = read(config, plan, sources, batches=6, samples=96)
    sizes = [(24, 24)] * 96
    tiles = tiles_of(reading.shown, sizes, config.model, plan, sources)
    shard = Shard(colour_shards / "00000.tar")
    texts = {shard.key(number): shard.read(number).members["txt"].decode() for number in range(30)}
    cursors = [SlotCursor(plan, slot) for slot in range(16)]
    passes = set()
    for number, (sample, tile) in enumerate(zip(reading.shown, tiles, strict=True)):
        pick = cursors[number % 16].take(0)
        cursors[number % 16].deliver(0)
        passes.add(pick.pass_number)
        assert pass_of(sample, plan) == pick.pass_number
        assert tile.facts == (f"00000.tar:{shard.key(pick.record)}", "stored 24 x 24, 5 tokens")
        assert tile.heading == f"pass {pick.pass_number}, step {number // 16 + 1}, no. {number % 16 + 1}"
        assert tile.caption == texts[shard.key(pick.record)]
    assert {0, 1, 2} <= passes


def test_numbers_are_those_of_the_samples_read(tmp_path):
    records = [
        (key, {**m, "jpg": jpeg((9, 9, 9), size=8 + int(key)), "txt": b"x " * 30}) for key, m in colour_records(40)
    ]
    records[::8] = [(key, {**m, "jpg": b"no image"}) for key, m in records[::8]]
    write_shards(tmp_path, records, 40)
    sources = {"own": {"shards": str(tmp_path / "00000.tar"), "weight": 3}, "noise": SYNTHETIC}
    config = tiny_config(tmp_path / "run", data__sources=sources)
    text = inspect(config, batches=6, samples=5, output=tmp_path / "x.png")
    assert "6 steps from step 1, all 16 samples of each: 96" in text
    counts = dict(re.findall(r"source (\w+): (\d+) samples", text))
    assert sum(map(int, counts.values())) == 96
    assert f"source own: {counts['own']} samples, {int(counts['own']) / 96:.1%}; its weight asks for 75.0%; 40" in text
    plan, opened_sources = opened(config)
    reading = read(config, plan, opened_sources, batches=6, samples=96)
    lengths = sorted(len(sample.tokens) for sample in reading.shown)
    assert f"min {lengths[0]}, median {lengths[47]}, p95 {lengths[91]}, max 16;" in text
    assert f"{np.mean(np.array(lengths) == 16):.1%} fill the context of 16" in text
    number = len(reading.skipped)
    assert number > 3
    assert f"skipped as unusable: {number} not_an_image; first {tmp_path}/00000.tar:0000" in text
    assert re.search(
        r"loader: [\d,]+ samples/s by the training process itself .*, in steps 3 to 6; the first step", text
    )


def test_stored_sizes_are_those_of_the_drawn_records(tmp_path):
    pairs = ((f"{n:02d}", {"jpg": jpeg((n, n, n), size=30 + n), "txt": b"x"}) for n in range(20))
    write_shards(tmp_path, pairs, 20)
    config = tiny_config(tmp_path / "run", {"shards": str(tmp_path / "00000.tar")})
    plan, sources = opened(config)
    sides = sorted(30 + sample.place.record for sample in read(config, plan, sources, batches=1, samples=7).shown)
    text = inspect(config, batches=1, samples=7, output=tmp_path / "x.png")
    assert f"shorter side of the 7 stored images drawn: min {sides[0]}, median {sides[3]}, p95 {sides[6]}" in text
    assert "its rate takes --batches 4 or more" in text


def test_no_run_directory_and_no_weights_are_needed_even_for_the_largest_model(tmp_path):
    tree = merged(tiny_tree(tmp_path / "run", SYNTHETIC), init__image="/nowhere/weights.pt", train__global_batch=4)
    tree["model"] = {"name": "EVA-CLIP-18B", "image": {"token_drop": 0.5}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--batches", "1", "--samples", "2", "--output", str(tmp_path / "x.png")]
    cli.main(["inspect", str(tmp_path / "config.yaml"), "seed=3", *arguments])
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "x.png"}


def test_another_format_than_png_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"x\.jpg is no \.png"):
        inspect(tiny_config(tmp_path), batches=1, samples=1, output=tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("batch", "slots", "workers", "least", "read_of_each"),
    [
        (16, 16, 4, 256, 16),
        (4096, 256, 4, 256, 256),
        (32768, 256, 4, 256, 512),
        (4096, 256, 100, 256, 2048),
        (96, 6, 0, 20, 32),
    ],
)
def test_of_large_batches_as_many_slots_are_read_as_workers_and_numbers_need(
    tmp_path, batch, slots, workers, least, read_of_each
):
    config = tiny_config(tmp_path, train__global_batch=batch, data__workers=workers)
    assert batch // first_rank(config, slots, least).world_size == read_of_each


def test_a_part_of_a_batch_is_its_beginning(tmp_path):
    config = tiny_config(tmp_path, {**SYNTHETIC, "num_records": 3000}, train__global_batch=1024)
    plan, sources = opened(config)
    part = read(config, plan, sources, batches=2, samples=10_000)
    whole = read(config, plan, sources, batches=1, samples=1024)
    assert (part.per_step, whole.per_step) == (1024, 1024)
    half = read(config, plan, sources, batches=2, samples=600)
    assert half.per_step == 512
    places = {(sample.step, sample.number): sample.place for sample in part.shown}
    assert all(places[sample.step, sample.number] == sample.place for sample in half.shown)
    assert {sample.step for sample in half.shown} == {1, 2}


def test_a_repeated_batch_is_shown_as_it_repeats(tmp_path):
    config = tiny_config(tmp_path, train__overfit_one_batch=True)
    shown = read(config, *opened(config), batches=3, samples=48).shown
    assert [sample.place for sample in shown[:16]] == [sample.place for sample in shown[32:]]
    assert "repeats it (train.overfit_one_batch)" in inspect(config, batches=3, samples=2, output=tmp_path / "x.png")


def test_patches_of_a_timm_tower_are_those_that_it_keeps(monkeypatch):
    image = {"kind": "timm", "model": "vit_tiny_patch16_224", "image_size": 48, "token_drop": 0.6}
    model = ModelConfig.model_validate({"embed_dim": 8, "image": image})
    tower, seeds, found = TimmTower(model.image, 8).to_empty(device="cpu"), torch.tensor([5, 77, 123456789]), []
    plain = timm_parts.kept_patches
    monkeypatch.setattr(timm_parts, "kept_patches", lambda *given: found.append(plain(*given)) or found[-1])
    tower.initialise(0)
    with torch.no_grad():
        tower(torch.zeros(3, 3, 48, 48, dtype=torch.uint8), seeds)
    kept = found[-1].tolist()
    grids = kept_grids(model, seeds)
    assert grids.shape == (3, 3, 3)
    assert [np.flatnonzero(grid).tolist() for grid in grids] == kept


class Letters:
    """A font with some letters."""

    def __init__(self, letters):
        self.letters = letters

    def getmask(self, letter):
        return (letter if letter in self.letters else "box").encode()


@pytest.mark.parametrize(("text", "number"), [("ab", 0), ("", 0), ("aж", 1), ("狗", 2), ("a狗ж", 1), ("ü", 0)])
def test_a_caption_is_written_in_the_first_font_that_lacks_least_of_it(text, number):
    fonts = [Letters("ab"), Letters("abж"), Letters("a狗")]
    assert best_font(text, fonts) is fonts[number]


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("short", 5, "short"),
        ("0001.tar:000123", 11, "0001...0123"),
        ("abcdef", 6, "abcdef"),
        ("abcdefgh", 7, "ab...gh"),
    ],
)
def test_a_long_name_loses_its_middle(text, width, short):
    assert shortened(text, width, len) == short


def test_a_long_caption_is_broken_between_words_and_ends_in_dots():
    assert wrapped("one two three", 7, len) == ["one two", "three"]
    assert wrapped("", 7, len) == [""]
    assert wrapped("a b c d e f", 3, len) == ["a b", "c d", "e f"]
    assert wrapped("aa bb cc dd ee", 5, len) == ["aa bb", "cc dd", "ee"]
    assert wrapped("aaaa bbbb cccc dddd eeee", 8, len) == ["aaaa", "bbbb", "cccc", "dddd ..."]
    assert wrapped("donaudampfschiff ahoi", 8, len) == ["do...iff", "ahoi"]
