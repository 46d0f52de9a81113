"""tools/make_demo_data.py: nothing held out is trained on, pictures show what captions say, equal bytes every time."""

import hashlib
import io
import itertools
import re
import sys
from collections import Counter
from random import Random

import demo_pictures as pictures
import make_demo_data
import numpy as np
import pytest
from PIL import Image

from evaclip.config import RetrievalDataset, ValidationLossDataset, ZeroShotDataset
from evaclip.data.shards import Shard
from evaclip.distributed import Ranks
from evaclip.evaluation.datasets import captions_of, class_names_of, label_of, open_records, templates_of

SCALE = 0.02


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main([str(out), "--scale", str(SCALE)]) == 0
    return out


def records(folder):
    shards = [Shard(path) for path in sorted(folder.glob("*.tar"))]
    return [shard.read(number) for shard in shards for number in range(shard.num_records)]


def opened(dataset):
    found = open_records(dataset, None, Ranks())
    return [found.read(number) for number in range(len(found))]


def image(members):
    return Image.open(io.BytesIO(members["jpg"]))


def scene_of(caption):
    """The combination that a full caption describes, found by its words."""
    values = {}
    for attribute, meanings in pictures.SYNONYMS.items():
        found = [
            value for value, words in meanings.items() if any(re.search(rf"\b{word}\b", caption) for word in words)
        ]
        values[attribute] = found
    assert all(len(found) == 1 for found in values.values()), (caption, values)
    return pictures.Scene(**{attribute: found[0] for attribute, found in values.items()})


# ------------------------------------------------------------------------------------------------------------- splits


def test_every_pair_of_attribute_values_is_trained_on_and_an_eighth_of_the_combinations_is_not():
    scenes = pictures.all_scenes()
    seen = pictures.seen_scenes("training")
    assert len(scenes) == len(set(scenes)) == 400
    assert set(scenes) - set(seen) == pictures.unseen_scenes()
    assert len(pictures.unseen_scenes()) == 50
    for first, second in itertools.combinations(range(5), 2):
        assert {(scene[first], scene[second]) for scene in seen} == {(scene[first], scene[second]) for scene in scenes}


def test_no_training_or_validation_caption_describes_an_unseen_combination(demo):
    captions = [record.members["txt"].decode() for record in records(demo / "scenes/train")]
    captions += [record.members["txt"].decode() for record in records(demo / "eval/validation")[1:4]]
    assert not pictures.unseen_scenes() & {scene_of(caption) for caption in captions}


def test_test_scenes_show_unseen_combinations_only_and_are_labelled_among_all(demo):
    dataset = ZeroShotDataset(path=str(demo / "eval/scenes_unseen"))
    names = class_names_of(dataset)
    labels = [label_of(record, len(names)) for record in opened(dataset)]
    assert names == [scene.class_name for scene in pictures.all_scenes()]
    assert {pictures.all_scenes()[label] for label in labels} <= pictures.unseen_scenes()
    assert len(labels) == round(make_demo_data.UNSEEN_PER_COMBINATION * 50 * SCALE)


def test_a_fifth_of_each_handwritten_digit_is_held_out_of_all_training_renderings():
    training, held_out = pictures.load_handwriting()
    inks = [{digit.ink.tobytes() for digit in part} for part in (training, held_out)]
    assert not inks[0] & inks[1]
    assert len(training) + len(held_out) == 1797
    there = Counter(digit.label for digit in training)
    for label, count in Counter(digit.label for digit in held_out).items():
        assert count / (count + there[label]) == pytest.approx(0.2, abs=0.005)


# ------------------------------------------------------------------------------------------------ pictures, captions


def foreground(drawn):
    """Places (x, y) from 0 to 1, and colours, of the pixels that are no background: those are dark."""
    pixels = np.asarray(drawn)
    rows, columns = np.nonzero(pixels.max(-1) > 150)
    return np.stack([columns / drawn.width, rows / drawn.height], 1), pixels[rows, columns]


@pytest.mark.parametrize("scene", Random(0).sample(pictures.all_scenes(), 40), ids=lambda scene: scene.class_name)
def test_scene_shows_its_colour_at_its_position_on_its_background(scene):
    def nearest(value, among):
        return min(among, key=lambda name: np.linalg.norm(np.asarray(among[name]) - value))

    drawn = pictures.render_scene(scene, Random("test"))
    places, colours = foreground(drawn)
    assert nearest(places.mean(0), pictures.CENTRE) == scene.position
    assert nearest(np.median(colours, 0), pictures.INK) == scene.colour
    for corner in ((1, 1), (drawn.width - 2, drawn.height - 2)):
        assert nearest(drawn.getpixel(corner), pictures.GROUND) == scene.background


def test_large_shapes_cover_more_than_twice_as_many_pixels_as_small_ones():
    for shape in pictures.SYNONYMS["shape"]:
        scenes = [pictures.Scene(size, "red", shape, "in the middle", "black") for size in ("small", "large")]
        drawn = [pictures.render_scene(scene, Random("test")) for scene in scenes]
        small, large = (len(foreground(image)[0]) / (image.width * image.height) for image in drawn)
        assert large > 2 * small > 0.05


def test_every_shape_has_an_outline_of_its_own():
    masks = [
        np.asarray(pictures.draw_shape(shape, (60, 60), (30, 30), 20, 0)) > 127 for shape in pictures.SYNONYMS["shape"]
    ]
    for first, second in itertools.combinations(masks, 2):
        assert (first & second).sum() / (first | second).sum() < 0.7


@pytest.mark.parametrize("template", pictures.SCENE_CAPTIONS)
def test_full_caption_names_the_combination_in_any_synonym(template):
    for number, scene in enumerate(pictures.all_scenes()):
        caption = pictures.scene_caption(scene, Random(number), template)
        assert scene_of(caption) == scene
        assert not re.search(r"\ban? [aeiou]", caption)


def test_class_names_are_read_in_the_templates_as_captions_of_their_combination():
    for scene, template in itertools.product(pictures.all_scenes(), pictures.SCENE_TEMPLATES):
        assert scene_of(template.replace("{c}", scene.class_name)) == scene


def test_training_records_hold_jpegs_of_mixed_sizes_and_captions_of_mixed_forms(demo):
    for source, least, most in (("scenes", 48, 80), ("digits", 32, 96)):
        found = records(demo / source / "train")
        sizes = {image(record.members).size for record in found}
        assert len(sizes) > 30
        assert all(least <= side <= most for size in sizes for side in size)
        assert all(set(record.members) == {"jpg", "txt"} for record in found)
        assert len({record.members["txt"] for record in found}) > len(found) / 4
        assert [record.key for record in found] == [f"{number:09d}" for number in range(len(found))]


def test_digit_captions_name_the_digit_as_word_or_numeral(demo):
    names = [*pictures.DIGITS, *"0123456789"]
    for record in records(demo / "digits/train"):
        words = re.findall(r"\w+", record.members["txt"].decode())
        assert sum(word in names for word in words) == 1


# ------------------------------------------------------------------------------------------------------------ layout


def test_held_out_digits_are_in_clip_benchmarks_layout(demo):
    dataset = ZeroShotDataset(path=str(demo / "eval/digits"))
    assert class_names_of(dataset) == list(pictures.DIGITS)
    assert templates_of(dataset) == list(pictures.DIGIT_TEMPLATES)
    found = opened(dataset)
    assert len(found) == round(364 * SCALE) * make_demo_data.TEST_RENDERINGS
    assert {"jpg", "cls"} == set(found[0].members)
    assert all(0 <= label_of(record, 10) < 10 for record in found)
    train = opened(dataset.model_copy(update={"split": "train"}))
    assert len(train) == round(1433 * SCALE)
    assert not {record.members["jpg"] for record in train} & {record.members["jpg"] for record in found}


def test_retrieval_images_are_of_distinct_combinations_with_five_captions_each(demo):
    found = opened(RetrievalDataset(task="retrieval", path=str(demo / "eval/scenes_retrieval")))
    captions = [captions_of(record, per_line=True) for record in found]
    scenes = [{scene_of(caption) for caption in image} for image in captions]
    assert all(len(set(image)) == pictures.CAPTIONS_PER_IMAGE for image in captions)
    assert all(len(scene) == 1 for scene in scenes)
    assert len(set.union(*scenes)) == len(found)


def test_validation_pairs_are_read_as_shards(demo):
    pattern = str(demo / "eval/validation/00000.tar")
    found = opened(ValidationLossDataset(task="loss", path=pattern))
    assert len(found) == round(make_demo_data.NUM_VALIDATION * SCALE)
    assert all(captions_of(record, per_line=False) for record in found)


# ------------------------------------------------------------------------------------------------------------ writing


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_two_runs_write_equal_bytes_and_the_second_replaces_the_first(demo, tmp_path, capsys):
    out = tmp_path / "data"
    out.mkdir()
    (out / "contents.json").write_text("{}")
    (out / "old").write_text("of an earlier version")
    assert make_demo_data.main([str(out), "--scale", str(SCALE)]) == 0
    assert digests(out) == digests(demo)
    assert {name.split("/")[0] for name in digests(out)} == {"contents.json", "digits", "scenes", "eval"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert f"{out}/scenes/train: 240 records, " in capsys.readouterr().out


def test_folder_with_other_files_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert make_demo_data.main([str(tmp_path)]) == 1
    assert f"error: {tmp_path} exists and holds no demo data" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_missing_scikit_learn_is_named_with_its_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert make_demo_data.main([str(tmp_path / "data")]) == 1
    assert "error: the digits come with scikit-learn, which is missing; pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
