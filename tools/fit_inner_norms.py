"""Give MIM weights of an EVA-02 tower the inner norms that EVA-CLIP adds, fitted so that little changes.

    python tools/fit_inner_norms.py EVA02-CLIP-B-16 weights/EVA02_B_psz14to16.pt '/data/laion/00000.tar' B.safetensors

Drawn as one and zero, as EVA-CLIP does, the new norms change what the tower computes. The file that is written has the
same weights and the fitted norms under EVA's names; name it as ``init.image``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from evaclip.api import create_model
from evaclip.config import ValidationLossDataset
from evaclip.distributed import Ranks
from evaclip.errors import ConfigError, EvaclipError, writing
from evaclip.evaluation.datasets import image_of, open_records
from evaclip.models.vision import ImageTower
from evaclip.weights.export import renamed, write_tensors
from evaclip.weights.files import read_weights
from evaclip.weights.inner_norms import fit_inner_norms
from evaclip.weights.load import load_tower

_MAX_PIXELS = 100_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="named model whose tower has inner norms")
    parser.add_argument("weights", metavar="WEIGHTS", help="MIM checkpoint")
    parser.add_argument("shards", metavar="SHARDS", help="images such as the run will see; braces name several shards")
    parser.add_argument("out", metavar="OUT", type=Path, help="safetensors file to be written")
    parser.add_argument("--images", type=int, default=256, help="how many (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return fit(options.model, options.weights, options.shards, options.out, options.images)
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def fit(model: str, weights: str, shards: str, out: Path, count: int) -> int:
    """Load, fit, write."""
    if out.exists() or not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} is there already, or its folder is not; name a new file in a folder that is there")
    if count < 1:
        raise ConfigError(f"--images {count} fits nothing; some hundred are enough")
    tower = create_model(model).model.image
    assert isinstance(tower, ImageTower), "named models have towers of ours"
    if not tower.config.sub_norm:
        raise ConfigError(f"{model} has no inner norms, so nothing is missing; give {weights} to init.image as it is")
    tensors = {name: stored.read() for name, stored in read_weights(weights).items()}
    report = load_tower(tower, "image", tensors, weights, alone=True)
    if not any(".attn.norm." in name for name in report.initialised):
        raise ConfigError(f"{weights} holds inner norms; give it to init.image as it is")
    dataset = ValidationLossDataset(task="loss", path=shards, limit=count)
    records = open_records(dataset, None, Ranks())
    images = [image_of(records.read(number), tower.config, _MAX_PIXELS, dataset) for number in range(len(records))]
    for number, share in enumerate(fit_inner_norms(tower, torch.cat(images))):
        print(f"block {number}: {share:.2%} of the attention's variance is not kept")
    drawn = ("head.weight", "head.bias")
    tensors = {name: value for name, value in renamed(tower, "image", "eva") if name not in drawn}
    hidden = out.with_name(f".{out.name}.tmp")
    with writing(str(out)):
        write_tensors(hidden, tensors)
        hidden.replace(out)
    print(f"{out}: fitted on {len(records)} images; name it as init.image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
