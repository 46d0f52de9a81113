"""Options of fine-tuning a classifier; their defaults are ours, for vision transformers and 10^4 images and more."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from evaclip.config.base import FilePath, Fraction, Probability, Section
from evaclip.config.data import AugmentConfig


class FinetuneAugment(AugmentConfig):
    """As in CLIP training, with smaller crops and mirrored images."""

    crop_scale: tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    flip: Probability = 0.5
    """Probability of a mirrored image; set it to 0 where classes are letters, digits or directions."""


class FinetuneConfig(Section):
    """What ``evaclip finetune`` takes as key=value."""

    epochs: PositiveInt = 10
    """Passes over the training split; after each the test split is measured. The last one counts, none is chosen."""
    batch: PositiveInt = 256
    """Images of one update, over all ranks; a multiple of their number."""
    micro_batch: PositiveInt | None = None
    """Most images that a rank takes through the tower at once: memory and time, not the update; null: its whole share.
    """
    lr: PositiveFloat = 1e-4
    """Peak learning rate of the head and of the norm before it."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Factor on the learning rate per layer towards the input."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; vectors and position embeddings have none."""
    warmup: Fraction = 0.1
    """Share of the updates in which the rate rises to its peak; then it falls to 0 as half a cosine."""
    label_smoothing: Fraction = 0.1
    """Share of the target that is spread over all classes."""
    drop_path: Fraction = 0.1
    """Probability that an image skips a branch of the last block, growing linearly with depth."""
    augment: FinetuneAugment = FinetuneAugment()
    head: Literal["zero", "zero_shot"] = "zero"
    """What the head begins as: zeros, or the classes' prompts, so that the first result is the zero-shot accuracy
    (WiSE-FT, arXiv:2109.01903)."""
    train_split: str = "train"
    """Folder of the split that is trained on."""
    test_split: str = "test"
    """Folder of the split that is measured."""
    class_names: FilePath | None = None
    """File with a class name per line; null: classnames.txt of the set, or the names of its class folders."""
    templates: FilePath | None = None
    """File with a template per line, for head zero_shot; null: zeroshot_classification_templates.txt of the set."""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16 (autocast) or fp32; null: bf16 on a GPU, fp32 without one."""
    seed: NonNegativeInt = 0
    """Of the order, crops and skipped branches."""
    workers: NonNegativeInt = 4
    """Processes per rank that read and decode, one per core at most; 0: this one does."""
