"""Folders of images per class, and videos: which files are a record, and what its feature is."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder

from evaclip.data.batch import PackedText
from evaclip.data.images import eval_crop, load_eval
from evaclip.errors import DataError
from evaclip.evaluation.image_folder import choose_frames, find_images

NAMES = ["cat", "dog", "red bicycle", "house", "tree at night", "boat"]
FOLDERS = ["n10", "n2", "B", "a", "_x", "é"]  # in no order
TEMPLATES = ["a photo of a {c}.", "{c}"]
LABELS = [(3 * i + i // 4) % 6 for i in range(23)]


def write_lists(folder, names=NAMES):
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))


@pytest.fixture
def class_folders(tmp_path, png):
    """The 23 pictures of ``LABELS``, some deeper than others, among files that are no images."""
    root = tmp_path / "folders"
    for i, label in enumerate(LABELS):
        name = sorted(FOLDERS)[label]
        deeper = "part 2/" if i % 5 == 0 else ""
        path = root / "test" / name / f"{deeper}{99 - i}.{'JPEG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        (path.parent / "notes.txt").write_text("no image")
    (root / "test" / "README.md").write_text("no class")
    write_lists(root)
    return root


def test_records_and_classes_are_those_of_torchvision(class_folders):
    theirs = ImageFolder(str(class_folders / "test"))
    ours = find_images(class_folders, "test", None)
    assert list(ours.classes) == theirs.classes
    assert [(str(ours.root / path), label) for label, (path,) in ours.records] == theirs.samples


def test_without_a_folder_of_the_split_the_classes_are_the_folders_themselves(class_folders):
    assert find_images(class_folders / "test", "test", None) == find_images(class_folders, "test", None)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_folder_of_images_measures_as_the_same_images_in_shards(class_folders, folder, measure, world_size):
    theirs = ImageFolder(str(class_folders / "test"))
    members = [
        (f"{i:03d}", {"png": Path(path).read_bytes(), "cls": str(label).encode()})
        for i, (path, label) in enumerate(theirs.samples)
    ]
    shards = folder(members, names=NAMES, templates=TEMPLATES)
    expected = measure({"path": str(shards)})
    assert 0 < expected.metrics["top1"] < 1
    assert measure({"path": str(class_folders)}, world_size=world_size, workers=world_size - 1) == expected


def test_class_names_must_be_as_many_as_folders(class_folders, measure):
    write_lists(class_folders, NAMES[:5])
    with pytest.raises(DataError, match=r"test has 6 class folders \(B, _x, a \.\.\.\), but 5 class names are given"):
        measure({"path": str(class_folders)}, world_size=2)


def test_splits_are_not_taken_for_classes(class_folders, measure):
    (class_folders / "test").rename(class_folders / "val")
    with pytest.raises(DataError, match=r"has 1 class folders \(val \.\.\.\), but 6 class names are given"):
        measure({"path": str(class_folders)})
    measure({"path": str(class_folders), "split": "val"})


def test_an_empty_class_is_refused(class_folders, measure):
    shutil.rmtree(class_folders / "test" / "a")
    (class_folders / "test" / "a").mkdir()
    with pytest.raises(DataError, match=r"/a holds no images \(1 of 6 class folders\)"):
        measure({"path": str(class_folders)}, world_size=2)


def test_numbered_folders_whose_order_is_not_that_of_their_names_are_refused(class_folders, tmp_path, measure):
    for number in range(11):
        shutil.copytree(class_folders / "test" / "B", tmp_path / "numbers" / str(number))
    write_lists(tmp_path / "numbers", [f"class {n}" for n in range(11)])
    with pytest.raises(DataError, match=r"in the order of text 10 comes before 2; rename them with leading zeros"):
        measure({"path": str(tmp_path / "numbers")})


def test_a_file_that_is_no_image_is_named(class_folders, measure):
    (class_folders / "test" / "a" / "broken.ppm").write_bytes(b"P6 ?")
    with pytest.raises(DataError, match=r"a/broken\.ppm: the image is unusable"):
        measure({"path": str(class_folders)}, workers=1)


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("frames", "count", "chosen"),
    [(9, 1, [4]), (10, 2, [2, 7]), (4, 4, [0, 1, 2, 3]), (3, 6, [0, 0, 1, 1, 2, 2]), (100, 3, [16, 50, 83])],
)
def test_frames_are_the_middles_of_equal_parts(frames, count, chosen):
    assert choose_frames(range(frames), count) == chosen


@pytest.fixture
def videos(png):
    """Per video: its frames, in order."""
    return [[png(100 * i + j) for j in range(3 + i % 9)] for i in range(len(LABELS))]


@pytest.fixture
def video_shards(videos, folder):
    members = [
        (f"v{i:03d}", {**{f"{j}.png": frame for j, frame in enumerate(video)}, "cls": str(label).encode()})
        for i, (video, label) in enumerate(zip(videos, LABELS, strict=True))
    ]
    return folder(members, names=NAMES, templates=TEMPLATES)


@pytest.mark.parametrize("count", [1, 3])
def test_a_video_is_the_mean_of_its_frames_features(clip, tokens, videos, video_shards, measure, count):
    def feature(video):
        squares = torch.stack([eval_crop(load_eval(f, max_pixels=10_000), 16, "crop") for f in video])
        return F.normalize(clip.encode_image(squares, normalize=True).mean(0), dim=0)

    prompts = [PackedText.pack(tokens([t.replace("{c}", name) for t in TEMPLATES])) for name in NAMES]
    weights = torch.stack([F.normalize(clip.encode_text(p, normalize=True).mean(0), dim=0) for p in prompts])
    features = torch.stack([feature(choose_frames(video, count)) for video in videos])
    expected = (features @ weights.T).argmax(1).tolist()
    assert len(set(expected)) > 1
    result = measure({"path": str(video_shards), "frames": count}, batch=8)
    assert result.predictions.predicted == tuple(expected)
    assert measure({"path": str(video_shards), "frames": count}, batch=2, world_size=3) == result


def test_folders_of_frames_measure_as_the_same_videos_in_shards(videos, video_shards, tmp_path, measure):
    order = sorted(range(len(LABELS)), key=lambda i: (LABELS[i], i))
    for i in order:
        clip_folder = tmp_path / "clips" / f"class{LABELS[i]}" / f"v{i:03d}"
        clip_folder.mkdir(parents=True)
        for j, frame in enumerate(videos[i]):
            (clip_folder / f"frame_{j + 1}.png").write_bytes(frame)  # 10 lies before 2 as text
    write_lists(tmp_path / "clips")
    shards = measure({"path": str(video_shards), "frames": 2})
    folders = measure({"path": str(tmp_path / "clips"), "frames": 2})
    assert folders.predictions.predicted == tuple(shards.predictions.predicted[i] for i in order)
    assert folders.metrics == shards.metrics


def test_a_video_without_frames_is_named(dataset_of_images, measure):
    with pytest.raises(DataError, match=r"record 's0' has no numbered frames \(jpg, jpeg, png, webp\), only cls, png"):
        measure({"path": str(dataset_of_images), "frames": 2})


@pytest.fixture
def dataset_of_images(png, folder):
    return folder([("s0", {"png": png(0), "cls": b"1"})], names=NAMES, templates=TEMPLATES)


# -------------------------------------------------------------------------------------------------------------- resize


def test_a_set_can_be_squashed_where_the_model_crops(clip, folder, png, measure):
    shards = folder([(f"s{i}", {"png": png(i), "cls": b"0"}) for i in range(40)], names=NAMES, templates=TEMPLATES)
    assert clip.config.image.resize == "crop"
    cropped, squashed = (measure({"path": str(shards), "resize": mode}) for mode in ("crop", "squash"))
    assert cropped == measure({"path": str(shards)})
    assert cropped.predictions != squashed.predictions
