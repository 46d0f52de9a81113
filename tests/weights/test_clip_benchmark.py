"""CLIP_benchmark measures an export, through open_clip, to the same numbers as ``evaclip evaluate`` the checkpoint."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import clip_benchmark.datasets
import numpy as np
from PIL import Image
from weights.stored import stored

from evaclip import cli
from evaclip.data.shards import write_shards
from evaclip.weights.export import export

PACKAGED = Path(clip_benchmark.datasets.__file__).parent
CLASSES = ["circle", "square", "star", "cross", "ring", "moon", "ship"]
RECORDS = 60
RUN = """
import sys, torch
whole = torch.Tensor.numpy
# CLIP_benchmark 1.6 makes floats of arrays with one element, which numpy 2.4 no longer allows
torch.Tensor.numpy = lambda self: whole(self[0] if self.shape == (1,) else self)
from clip_benchmark.cli import main
sys.exit(main())
"""


def records(*, captions: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Pictures of random blobs, no two alike, with a class or several captions."""
    random = np.random.default_rng(0)
    for number in range(RECORDS):
        blobs = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((31, 45), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        blobs.save(buffer, "PNG")
        name = CLASSES[number % len(CLASSES)]
        texts = "\n".join(f"{name} number {number}, seen {how}" for how in ("twice", "from afar"))
        other = {"txt": texts.encode()} if captions else {"cls": str(number % len(CLASSES)).encode()}
        yield f"{number:04d}", {"png": buffer.getvalue(), **other}


def write_set(folder: Path, *, captions: bool) -> None:
    split = folder / "test"
    paths = write_shards(split, records(captions=captions), 25)
    for number, path in enumerate(paths):
        path.rename(split / f"{number}.tar")
    (split / "nshards.txt").write_text(f"{len(paths)}\n")
    if captions:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na drawing of a {c}.\n")


def write_class_folders(folder: Path) -> None:
    """The same pictures as CLIP_benchmark's fer2013, a folder of images per class; classes of unequal size."""
    for name, members in records(captions=False):
        label = int(members["cls"]) if int(name) % 2 else 0
        image = folder / "test" / f"{'gfdecba'[label]}_class" / f"{name}.PNG"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(members["png"])
    names = json.loads((PACKAGED / "en_classnames.json").read_text())["fer2013"]
    templates = json.loads((PACKAGED / "en_zeroshot_classification_templates.json").read_text())["fer2013"]
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


def test_the_numbers_of_clip_benchmark_are_those_of_evaclip(tmp_path: Path) -> None:
    for name in ("shapes", "flickr30k"):  # by the second name CLIP_benchmark knows a retrieval set
        write_set(tmp_path / name, captions=name == "flickr30k")
    write_class_folders(tmp_path / "fer2013")
    source = stored(tmp_path, {"name": "tiny-ViT"}, std=0.3)  # so that pictures differ in what they are taken for
    export(source, tmp_path / "out", "open_clip")
    options = {
        "--model": f"local-dir:{tmp_path / 'out'}",
        "--pretrained": "",
        "--dataset_root": f"{tmp_path}/{{dataset}}",
        "--output": f"{tmp_path}/{{dataset}}.json",
        "--num_workers": "0",
    }
    command = [sys.executable, "-c", RUN, "eval", "--dataset", "wds/shapes", "wds/flickr30k", "fer2013"]
    command += ["--recall_k", "5", "10", "--no_amp", "--quiet", *(part for pair in options.items() for part in pair)]
    subprocess.run(command, check=True, capture_output=True)
    classification = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
    same = {
        "shapes": classification,
        "fer2013": classification,
        "flickr30k": {
            f"{theirs}_recall@{k}": f"{ours}_recall@{k}"
            for theirs, ours in (("image_retrieval", "text_to_image"), ("text_retrieval", "image_to_text"))
            for k in (5, 10)
        },
    }
    for name, task in (("shapes", "zero_shot"), ("flickr30k", "retrieval"), ("fer2013", "zero_shot")):
        told = ["--dataset", str(tmp_path / name), "--task", task, "--output", str(tmp_path / f"ours-{name}")]
        cli.main(["evaluate", str(source), *told])
        ours = json.loads((tmp_path / f"ours-{name}" / "evaluation.json").read_text())[name]
        theirs = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        assert ours["num_records"] == RECORDS
        for their_name, our_name in same[name].items():
            per_sample = theirs[their_name] * RECORDS
            assert 0.05 < theirs[their_name] < 0.95
            assert abs(per_sample - ours["metrics"][our_name] * RECORDS) < 1e-3, their_name
