"""Time the making of a zero-shot classifier: ours, and open_clip's ``build_zero_shot_classifier``, on the CPU.

    python tools/benchmark_classifier.py --classes 1000

Class names and templates are those of ImageNet (1000 and 80), the weights of both text towers are the same, the
tokenizers are each side's own. The script fails if any number of the two classifiers differs by more than 1e-5. Rounds
are interleaved; the figures are medians, the ratios medians of each round's ratio. Busy is processor time, which other
programs on the machine touch less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from evaclip.config import ModelConfig
from evaclip.data.tokenizer import Tokenizer
from evaclip.distributed import Ranks
from evaclip.evaluation.encoding import Bench
from evaclip.evaluation.zero_shot import classifier_of
from evaclip.models.clip import CLIP, create_model
from evaclip.weights.load import load_tower

AGREEMENT = 1e-5
"""Most difference of a number: components of unit vectors, which fp32 roundings of two ways to compute change."""


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100, help="the first of ImageNet's (default: %(default)s)")
    parser.add_argument("--templates", type=int, default=80, help="the first of OpenAI's (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the text tower (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4, help="of the text tower (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="our captions per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    names = open_clip.IMAGENET_CLASSNAMES[: arguments.classes]
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES[: arguments.templates]]
    clip, peer = _pair(arguments.width, arguments.depth)
    tokenizer, words = Tokenizer(), open_clip.get_tokenizer("ViT-B-32")

    def ours() -> Tensor:
        bench = Bench(clip, clip.config, tokenizer, Ranks(), arguments.batch, workers=0, max_image_pixels=1)
        return classifier_of(bench, names, templates, alone=False).ensemble

    def theirs() -> Tensor:
        calls = [template.replace("{c}", "{}") for template in templates]
        return open_clip.build_zero_shot_classifier(peer, words, names, calls).T

    taken: dict[str, list[float]] = {"ours": [], "open_clip": []}
    busy: dict[str, list[float]] = {"ours": [], "open_clip": []}
    made: dict[str, Tensor] = {}
    for _ in range(arguments.rounds):
        for name, make in (("ours", ours), ("open_clip", theirs)):
            start, start_busy = time.perf_counter(), time.process_time()
            made[name] = make()
            taken[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)

    print(
        f"{len(names)} classes, {len(templates)} templates, text tower {arguments.width} wide and {arguments.depth} "
        f"deep, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, seconds in taken.items():
        print(f"{name:9s} {statistics.median(seconds):8.3f} s, {statistics.median(busy[name]):8.3f} s busy")
    time_ratio, busy_ratio = (
        statistics.median(b / a for a, b in zip(*found.values(), strict=True)) for found in (taken, busy)
    )
    difference = float((made["ours"] - made["open_clip"]).abs().max())
    print(f"open_clip / ours: time {time_ratio:.2f}, busy {busy_ratio:.2f}; largest difference {difference:.1e}")
    if not difference <= AGREEMENT:
        print(f"error: that is more than {AGREEMENT}: the two do not do the same work", file=sys.stderr)
        return 1
    return 0


def _pair(width: int, depth: int) -> tuple[CLIP, open_clip.CLIP]:
    """Our model and open_clip's, with the same text tower of random weights."""
    torch.manual_seed(0)
    small = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=16, image_size=16)
    peer = open_clip.CLIP(width, small, CLIPTextCfg(width=width, heads=width // 64, layers=depth)).eval()
    image = {"image_size": 16, "patch_size": 16, "width": 64, "depth": 1, "heads": 1, "mlp_width": 64}
    text = {"width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width}
    tree = {"embed_dim": width, "image": image, "text": text}
    clip = create_model(ModelConfig.model_validate(tree), seed=0).eval()
    text_keys = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    state = {key: value for key, value in peer.state_dict().items() if key.startswith(text_keys)}
    load_tower(clip.text, "text", state, "open_clip's", alone=True)
    return clip, peer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
