"""The training loss on held-out pairs, over consecutive groups of ``eval.batch`` pairs.

It depends on the number of pairs it is taken over, so every group is full and what remains behind the last full
group is left out. Groups are consecutive records whatever the number of ranks. Values of different ``eval.batch`` do
not compare, nor do they with the training loss unless ``eval.batch`` is the global batch.
"""

from __future__ import annotations

from functools import partial

import torch

from evaclip.config import ValidationLossDataset
from evaclip.distributed import Ranks
from evaclip.errors import DataError
from evaclip.evaluation.datasets import captions_of, open_records
from evaclip.evaluation.encoding import Bench, in_order
from evaclip.evaluation.results import Result
from evaclip.loss import Similarity, info_nce, sigmoid_loss
from evaclip.metrics import EVAL_METRICS


def measure_loss(
    name: str, dataset: ValidationLossDataset, bench: Bench, index_dir: str | None, similarity: Similarity
) -> Result:
    """Mean loss of the full groups: sigmoid where the similarity has a bias, else InfoNCE.

    In shards, the whole ``txt`` is the caption, as in training; in CLIP_benchmark's layout its first line.

    Communicates the features of one group per rank at a time; every rank computes every group.

    Raises:
        DataError: There are fewer records than one group, or, on every rank, an image or a caption cannot be used.
    """
    records = open_records(dataset, index_dir, bench.ranks)
    if len(records) < bench.batch:
        raise DataError(
            f"{dataset.path}: {len(records)} records do not fill one group of {bench.batch} pairs; "
            f"lower the batch (eval.batch, --batch), raise --limit, or add records"
        )
    records = records.first(len(records) // bench.batch * bench.batch)
    alone, scale = Ranks(device=bench.ranks.device), torch.tensor(similarity.scale, device=bench.ranks.device)
    loss = partial(info_nce, scale=scale, ranks=alone)
    if similarity.bias is not None:
        loss = partial(sigmoid_loss, scale=scale, bias=torch.tensor(similarity.bias, device=scale.device), ranks=alone)
    losses: list[torch.Tensor] = []
    done = 0
    for images, captions in bench.images(records, partial(captions_of, per_line=records.caption_per_line)):
        # The ranks' batches interleave to consecutive records: item i belongs to rank i % world_size.
        count = min(len(images) * bench.ranks.world_size, len(records) - done)
        done += count
        all_images = in_order(images, count, bench.ranks)
        all_texts = in_order(bench.texts([texts[0] for texts in captions]), count, bench.ranks)
        groups = zip(all_images.split(bench.batch), all_texts.split(bench.batch), strict=True)
        losses += [loss(image, text).loss for image, text in groups]
    value = float(torch.stack(losses).double().mean())
    return Result(name, "loss", dict(zip(EVAL_METRICS["loss"], [value], strict=True)), len(records))
