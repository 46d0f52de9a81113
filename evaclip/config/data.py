"""Options of what is read: training sources and evaluation sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    StrictStr,
    model_validator,
)

from evaclip.config.base import FilePath, Fraction, Name, Probability, Section, ShardPattern, ShardPatterns, tagged

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
"""Members that hold a record's image, in order of preference."""


class FieldFilter(Section):
    """What a field of a record's json member must be: a number in a range, or a word of a choice."""

    min: float | None = None
    """Smallest number; text that spells a number counts as one."""
    max: float | None = None
    """Largest number."""
    one_of: tuple[StrictBool | StrictStr, ...] | None = Field(default=None, min_length=1)
    """Words, or true and false, of which it must be one."""
    none_of: tuple[StrictBool | StrictStr, ...] | None = Field(default=None, min_length=1)
    """Words, or true and false, of which it must be another one."""

    @property
    def is_numeric(self) -> bool:
        """Whether it asks for a number."""
        return self.min is not None or self.max is not None

    @model_validator(mode="after")
    def _asks_for_something(self) -> FieldFilter:
        if self.is_numeric == (self.one_of is not None or self.none_of is not None):
            raise ValueError("give min, max or both for numbers, else one_of, none_of or both for words")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class FilterConfig(Section):
    """Which records are used: those that pass every condition."""

    fields: dict[Name, FieldFilter] = Field(default={})
    """Field of the json member, nested ones with dots -> condition; a record that lacks the field does not pass."""
    keys: FilePath | None = None
    """File with a record key per line; other records do not pass."""
    drop_keys: FilePath | None = None
    """File with a record key per line; these records do not pass."""

    @model_validator(mode="after")
    def _has_a_condition(self) -> FilterConfig:
        if not (self.fields or self.keys or self.drop_keys):
            raise ValueError("a filter needs fields, keys or drop_keys")
        return self


class ShardSource(Section):
    """Image-text pairs in WebDataset tars (img2dataset's layout: key.jpg, key.txt, key.json)."""

    kind: Literal["shards"] = "shards"
    """shards (read from tars) or synthetic."""
    shards: ShardPatterns
    """Tars: a path, an http(s), s3 or gs URL, or a list, with brace ranges such as ``/data/{00000..00099}.tar``."""
    weight: PositiveFloat = 1.0
    """Expected share of the samples, relative to the other sources' weights."""
    captions: dict[Name, PositiveFloat] = Field(default={"txt": 1.0}, min_length=1)
    """Member or json field -> probability: ``{txt: 0.5, json.recaption: 0.5}``; if empty, the first that is not."""
    filter: FilterConfig | None = None
    """Which records are used; null: all."""


class SyntheticSource(Section):
    """Noise images and random captions, for benchmarks and debugging; reads nothing."""

    kind: Literal["synthetic"]
    """shards (read from tars) or synthetic."""
    num_records: PositiveInt = 100_000
    """Distinct records."""
    weight: PositiveFloat = 1.0
    """Expected share of the samples, relative to the other sources' weights."""


Source = Annotated[ShardSource | SyntheticSource, Field(discriminator="kind"), tagged("kind", "shards")]


class AugmentConfig(Section):
    """How a training image is cut out of its picture."""

    crop_scale: tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]] = (0.9, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Narrowest and widest crop, width over height, before it is resized to the square."""
    flip: Probability = 0.0
    """Probability of a mirrored image; captions that speak of left and right suffer."""
    decode_margin: NonNegativeFloat = 2.0
    """JPEGs are decoded at 1/8, 1/4 or 1/2 where a crop still has this many pixels per output pixel; 0: in full."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] must ascend")
        return self


class DataConfig(Section):
    """What is read, and in which order."""

    sources: dict[Name, Source] = Field(min_length=1)
    """Name -> source; the names appear in metrics and are part of the data order."""
    augment: AugmentConfig = AugmentConfig()
    workers: NonNegativeInt = 4
    """Decoding processes per rank; 0 decodes in the training process. Has no influence on the batches."""
    slots: PositiveInt | None = None
    """Independent streams that fill a batch; null takes the smallest divisor of the global batch from 256 up."""
    block_records: PositiveInt = 64
    """Most consecutive records of a shard that stay together when a pass is shuffled."""
    window_blocks: PositiveInt = 16
    """Blocks among which a slot shuffles records."""
    max_image_pixels: PositiveInt = 100_000_000
    """Larger images are counted as bad, before they are decoded."""
    max_bad_fraction: Fraction = 0.05
    """The run stops when a larger share of the records is unusable."""
    index_dir: FilePath | None = None
    """Where shard indexes are kept; null: beside each shard."""
    cache_dir: FilePath | None = None
    """Folder on a fast disk where pieces of remote shards are kept; null: every read goes to the storage."""
    cache_gib: PositiveInt = 100
    """Most that the folder holds, in GiB; what was not used for longest goes first."""


# ---------------------------------------------------------------------------------------------------------- evaluation


class EvalDataset(Section):
    """A labelled or captioned set on disk."""

    path: ShardPattern
    """A folder in CLIP_benchmark's WebDataset layout or with a folder of images per class, or shards as in
    ``data.sources``."""
    split: str = "test"
    """Folder of the split; a folder of class folders need not have it."""
    limit: PositiveInt | None = None
    """Only the first records; null: all."""
    resize: Literal["crop", "squash"] | None = None
    """How images become squares; null: as ``model.image.resize`` says."""
    frames: PositiveInt | None = None
    """A record is a video, of which so many evenly spaced frames count, by the mean of their features; null: an image.
    Members are ``0.jpg``, ``1.jpg`` ...; below a class folder, a video is a folder of frames."""


class ZeroShotDataset(EvalDataset):
    """Classification by the nearest caption; each record holds an image and ``cls``."""

    task: Literal["zero_shot"] = "zero_shot"
    """What is measured: zero_shot, linear_probe, retrieval or loss."""
    class_names: FilePath | None = None
    """File with a class name per line; null: ``classnames.txt`` of the folder."""
    templates: FilePath | None = None
    """File with a template per line, in which ``{c}`` stands for the name; null: the folder's own file."""
    per_template: bool = False
    """Also classify by each template alone: how much the result hangs on the prompt."""


class LinearProbeDataset(EvalDataset):
    """Classification by a logistic regression on features of a training split; each record holds an image and ``cls``.

    Both splits are folders of ``path``; ``limit`` counts for each of them.
    """

    task: Literal["linear_probe"]
    """What is measured: zero_shot, linear_probe, retrieval or loss."""
    train_split: str = "train"
    """Folder of the split that the regression is fitted to."""
    shots: PositiveInt | None = None
    """So many images of each class are fitted to (k-shot); null: all."""
    draws: PositiveInt = 3
    """How often the shots are drawn; results are means over the draws. Of no account without ``shots``."""

    @model_validator(mode="after")
    def _splits_differ(self) -> LinearProbeDataset:
        if self.train_split == self.split:
            raise ValueError(f"train_split and split are both {self.split}; a probe is measured on other images")
        return self


class RetrievalDataset(EvalDataset):
    """Image-text retrieval; each record holds an image and ``txt`` with a caption per line."""

    task: Literal["retrieval"]
    """What is measured: zero_shot, linear_probe, retrieval or loss."""


class ValidationLossDataset(EvalDataset):
    """The training loss on records that are not trained on; each holds an image and ``txt``."""

    task: Literal["loss"]
    """What is measured: zero_shot, linear_probe, retrieval or loss."""


Dataset = Annotated[
    ZeroShotDataset | LinearProbeDataset | RetrievalDataset | ValidationLossDataset,
    Field(discriminator="task"),
    tagged("task", "zero_shot"),
]


class EvalConfig(Section):
    """What is measured during training on data that is not trained on."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations; null: only at the end, and at the start if asked."""
    at_start: bool = True
    """Evaluate before the first step: a bad initialisation shows before a day is lost."""
    batch: PositiveInt = 256
    """Images per rank and forward pass; also the number of pairs in one validation loss."""
    datasets: dict[Name, Dataset] = Field(default={})
    """Name -> dataset; results are published as ``eval/NAME/METRIC``."""
