"""Every option of a run, typed, with its documentation and default.

This module decides what a valid configuration is; ``config_file`` turns YAML and command-line text into one. It
imports no torch, so a mistake is reported before anything heavy starts. A field's docstring is its help text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from evaclip.models.registry import ALIASES, PRESETS

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Colour = tuple[PositiveFloat, PositiveFloat, PositiveFloat]

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
"""Members that hold a record's image, in order of preference."""


def _expand(value: object) -> object:
    """Expand ``~`` and ``${NAME}``; a name that is not set is an error."""
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", replace, value))  # noqa: PTH111  a pattern, not only a path


def _local(value: str) -> str:
    if value.startswith("pipe:") or "://" in value:
        raise ValueError("only local paths are read; copy or mount the shards first")
    return value


FilePath = Annotated[str, BeforeValidator(_expand)]
ShardPattern = Annotated[str, BeforeValidator(_expand), AfterValidator(_local)]


class Section(BaseModel):
    """A part of the configuration: immutable, closed to unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- model


class ImageTowerConfig(Section):
    """An EVA image tower: EVA-01 with the defaults, EVA-02 with rope, swiglu and sub_norm."""

    image_size: PositiveInt = 224
    """Side of the square input, in pixels."""
    patch_size: PositiveInt = 16
    """Side of a square patch, in pixels."""
    width: PositiveInt = 768
    """Channels of a token."""
    depth: PositiveInt = 12
    """Blocks."""
    heads: PositiveInt = 12
    """Attention heads; they divide the width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward kind: two linear layers around a GELU, or a gated SiLU (arXiv:2002.05202)."""
    mlp_width: PositiveInt = 3072
    """Hidden channels of the feed-forward."""
    sub_norm: bool = False
    """Norms inside attention and feed-forward, before their last linear layer (EVA-02)."""
    rope: bool = False
    """Rotate queries and keys by their patch's row and column (EVA-02), beside the learned position embedding."""
    post_norm: bool = False
    """Norm after each branch instead of before it (EVA02-bigE)."""
    layer_scale: PositiveFloat | None = None
    """Initial value of a learned scale per channel on each branch; null leaves it out."""
    token_drop: Fraction = 0.0
    """Fraction of patches left out of every training sample (FLIP, arXiv:2212.00794)."""
    drop_path: Fraction = 0.0
    """Probability that a sample skips a branch of the last block in training, growing linearly with depth."""
    mean: Colour = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in 0..1, subtracted from the pixels."""
    std: Colour = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue in 0..1, by which the pixels are divided."""
    resize: Literal["crop", "squash"] = "crop"
    """Evaluation images: resize the shorter side and crop the centre, or resize both sides to the square."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> ImageTowerConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"rope needs a head width divisible by 4, not {self.width // self.heads}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def kept_patches(self) -> int:
        """Patches that a training sample keeps: round(N (1 - token_drop)), at least one."""
        return max(1, round(self.grid**2 * (1 - self.token_drop)))


class TextTowerConfig(Section):
    """A causal transformer over byte-pair tokens; the feature is read at the end token."""

    context_length: Annotated[int, Field(ge=3)] = 77
    """Most tokens of a caption, start and end included; longer captions are cut and keep the end token."""
    vocab_size: Annotated[int, Field(ge=49408)] = 49408
    """Rows of the token embedding; CLIP's tokenizer uses 49408."""
    width: PositiveInt = 512
    """Channels of a token."""
    depth: PositiveInt = 12
    """Blocks."""
    heads: PositiveInt = 8
    """Attention heads; they divide the width."""
    mlp_width: PositiveInt = 2048
    """Hidden channels of the feed-forward."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextTowerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ModelConfig(Section):
    """Two towers and the space they share."""

    name: str | None = None
    """A named model (EVA02-CLIP-B-16 ...) that gives the defaults of this section; other keys override it."""
    embed_dim: PositiveInt = 512
    """Channels of the features that both towers end in."""
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        section = cast("Mapping[str, Any]", given)
        if section.get("name") is None:
            return section
        name = ALIASES.get(section["name"], section["name"])
        if name not in PRESETS:
            raise ValueError(f"no model is named {name!r}; there are {', '.join(PRESETS)}")
        return _merge(PRESETS[name], {**section, "name": name})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` on top, sections merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merge(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value))  # noqa: PLW2901
        merged[key] = value
    return merged


class LossConfig(Section):
    """Symmetric InfoNCE (arXiv:2103.00020) and its temperature."""

    logit_scale: PositiveFloat = 1 / 0.07
    """Initial multiplier of the cosine similarities (1 / temperature); its logarithm is the parameter."""
    max_logit_scale: PositiveFloat = 100.0
    """Upper bound of the multiplier, applied to the parameter after every update."""
    learn_logit_scale: bool = True
    """Whether the multiplier is trained; the published 8B and 18B runs fix it at 100."""

    @model_validator(mode="after")
    def _starts_below_its_bound(self) -> LossConfig:
        if self.logit_scale > self.max_logit_scale:
            raise ValueError(f"logit_scale {self.logit_scale} is above max_logit_scale {self.max_logit_scale}")
        return self


# ----------------------------------------------------------------------------------------------------------- data


class ShardSource(Section):
    """Image-text pairs in WebDataset tars (img2dataset's layout: key.jpg, key.txt, key.json)."""

    kind: Literal["shards"] = "shards"
    """shards (read from tars) or synthetic."""
    shards: ShardPattern | tuple[ShardPattern, ...]
    """Local tars: a path or a list, with brace ranges such as ``/data/{00000..00099}.tar``."""
    weight: PositiveFloat = 1.0
    """Expected share of the samples, relative to the other sources' weights."""
    captions: dict[Name, PositiveFloat] = Field(default={"txt": 1.0}, min_length=1)
    """Member or json field -> probability: ``{txt: 0.5, json.recaption: 0.5}``; if empty, the first that is not."""


class SyntheticSource(Section):
    """Noise images and random captions, for benchmarks and debugging; reads nothing."""

    kind: Literal["synthetic"]
    """shards (read from tars) or synthetic."""
    num_records: PositiveInt = 100_000
    """Distinct records."""
    weight: PositiveFloat = 1.0
    """Expected share of the samples, relative to the other sources' weights."""


def tagged(field: str, default: str) -> BeforeValidator:
    """Give a section of several kinds its default kind when the tag is left out."""

    def fill(value: object) -> object:
        if not isinstance(value, Mapping) or field in value:
            return cast("object", value)
        return {field: default, **cast("Mapping[str, object]", value)}

    return BeforeValidator(fill)


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


# ------------------------------------------------------------------------------------------- optimizer and schedule


class TowerOptimConfig(Section):
    """What one tower has for itself; null takes the value of ``optim``."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the tower's last layer."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of matrices; vectors and position embeddings have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer towards the input."""


class OptimConfig(Section):
    """What LAMB and AdamW share."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and the second moment."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; vectors and position embeddings have none."""
    clip_norm: PositiveFloat | None = None
    """The gradient is scaled down to this global L2 norm; null does not clip."""
    image: TowerOptimConfig = TowerOptimConfig()
    text: TowerOptimConfig = TowerOptimConfig()


class LambConfig(OptimConfig):
    """LAMB (arXiv:1904.00962), bias-corrected."""

    name: Literal["lamb"] = "lamb"
    """The optimizer: lamb or adamw."""
    trust_ratio: Literal["decayed", "all"] = "decayed"
    """Which tensors take a trust ratio: those with weight decay (as timm does), or all but the logit scale."""


class AdamWConfig(OptimConfig):
    """AdamW (arXiv:1711.05101)."""

    name: Literal["adamw"]
    """The optimizer: lamb or adamw."""


Optim = Annotated[LambConfig | AdamWConfig, Field(discriminator="name"), tagged("name", "lamb")]


class ScheduleConfig(Section):
    """Linear warm-up, then half a cosine."""

    warmup_steps: NonNegativeInt = 0
    """Steps until the peak learning rate."""
    final_fraction: Probability = 0.0
    """Share of the peak learning rate that is left at the last step."""


# -------------------------------------------------------------------------------------------------- engine and train


class TorchEngineConfig(Section):
    """Plain PyTorch: one process, or data parallel with everything replicated."""

    name: Literal["torch"] = "torch"
    """The engine: torch or deepspeed."""


class DeepSpeedEngineConfig(Section):
    """DeepSpeed ZeRO (arXiv:1910.02054): optimizer state (1), gradients (2) and parameters (3) sharded over ranks."""

    name: Literal["deepspeed"]
    """The engine: torch or deepspeed."""
    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too."""


Engine = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="name"), tagged("name", "torch")]


class TrainConfig(Section):
    """How long, how much at once, in which precision."""

    steps: PositiveInt
    """Optimizer updates in the whole run."""
    global_batch: Annotated[int, Field(ge=2)]
    """Samples of one update, over all ranks; the same on any number of ranks."""
    micro_batch: PositiveInt | None = None
    """Most samples a rank takes through the towers at once; null: its whole share."""
    precision: Literal["bf16", "bf16_weights", "fp16", "fp32"] = "bf16"
    """bf16, fp16: fp32 weights under autocast; bf16_weights: 16-bit weights with an fp32 master; fp32."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in backward instead of storing them."""
    compile: bool = False
    """Compile each block with torch.compile."""
    max_consecutive_skipped_steps: PositiveInt = 100
    """The run stops after this many updates in a row were skipped for a non-finite loss or gradient."""


class CheckpointConfig(Section):
    """When state is saved and what is kept; the newest checkpoint always is."""

    every_steps: PositiveInt = 1000
    """Steps between checkpoints; one is also written at the end and when the run is interrupted."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""
    keep_best: str | None = None
    """Metric whose best checkpoint is kept, for instance ``eval/imagenet/top1``."""
    best_is: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of ``keep_best`` is the best."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where an API key is found, offline otherwise; never a prompt."""
    project: str = "evaclip"
    """Project name."""
    entity: str | None = None
    """Team or user; null: the key's default."""
    name: str | None = None
    """Run name; null: the run directory's name."""
    group: str | None = None
    """Group of runs."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class LogConfig(Section):
    """What is published, and how often."""

    every_steps: PositiveInt = 10
    """Steps between rows of metrics; each publication waits for the device once."""
    wandb: WandbConfig = WandbConfig()


# ------------------------------------------------------------------------------------------------------- evaluation


class EvalDataset(Section):
    """A labelled or captioned set on disk."""

    path: ShardPattern
    """A folder in CLIP_benchmark's WebDataset layout, or shards as in ``data.sources``."""
    split: str = "test"
    """Folder of the split, for CLIP_benchmark's layout."""
    limit: PositiveInt | None = None
    """Only the first records; null: all."""


class ZeroShotDataset(EvalDataset):
    """Classification by the nearest caption; each record holds an image and ``cls``."""

    task: Literal["zero_shot"] = "zero_shot"
    """What is measured: zero_shot, retrieval or loss."""
    class_names: FilePath | None = None
    """File with a class name per line; null: ``classnames.txt`` of the folder."""
    templates: FilePath | None = None
    """File with a template per line, in which ``{c}`` stands for the name; null: the folder's own file."""


class RetrievalDataset(EvalDataset):
    """Image-text retrieval; each record holds an image and ``txt`` with a caption per line."""

    task: Literal["retrieval"]
    """What is measured: zero_shot, retrieval or loss."""


class ValidationLossDataset(EvalDataset):
    """The training loss on records that are not trained on; each holds an image and ``txt``."""

    task: Literal["loss"]
    """What is measured: zero_shot, retrieval or loss."""


Dataset = Annotated[
    ZeroShotDataset | RetrievalDataset | ValidationLossDataset,
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
    datasets: dict[Name, Dataset] = {}
    """Name -> dataset; results are published as ``eval/NAME/METRIC``."""


# -------------------------------------------------------------------------------------------------------------- run


class RunConfig(Section):
    """Everything that defines a run."""

    run_dir: FilePath
    """Folder of the run: config, metrics, log, checkpoints. A run in it is continued."""
    seed: NonNegativeInt = 0
    """Of initial weights, data order, crops and dropped patches."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    train: TrainConfig
    optim: Optim = LambConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: Engine = TorchEngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))  # reported one by one
        return self


def _disagreements(run: RunConfig) -> list[str]:
    """Rules between sections: what is refused, why, and what to do."""
    found: list[str] = []
    batch, slots = run.train.global_batch, run.data.slots
    if slots is not None and batch % slots:
        found.append(f"data.slots {slots} does not divide train.global_batch {batch}")
    if run.schedule.warmup_steps >= run.train.steps:
        found.append(
            f"schedule.warmup_steps {run.schedule.warmup_steps} leaves nothing of train.steps {run.train.steps}"
        )
    if isinstance(run.optim, LambConfig) and run.optim.trust_ratio == "decayed" and not _decays(run.optim):
        found.append(
            "optim.name lamb with optim.trust_ratio decayed and no weight decay would be plain Adam; "
            "set optim.trust_ratio=all, or optim.name=adamw"
        )
    if isinstance(run.engine, DeepSpeedEngineConfig):
        if isinstance(run.optim, LambConfig):
            found.append(
                "optim.name lamb is not exact under engine.name deepspeed yet: ZeRO hands the optimizer flat slices, "
                "so a trust ratio would be that of a slice; use engine.name=torch or optim.name=adamw"
            )
        if run.engine.zero_stage == 3 and run.train.compile:
            found.append(
                "train.compile breaks ZeRO-3's fetching of parameters block by block; "
                "use engine.zero_stage=2 or train.compile=false"
            )
        if run.train.precision == "fp16":
            found.append(
                "train.precision fp16 runs on engine.name torch only so far; use bf16, which needs no loss scaling"
            )
    if run.eval.every_steps and not run.eval.datasets:
        found.append("eval.every_steps is set, but eval.datasets is empty")
    best = run.checkpoint.keep_best
    if best and best.split("/")[1:2] != [name for name in run.eval.datasets if best.startswith(f"eval/{name}/")][:1]:
        found.append(f"checkpoint.keep_best {best} names no dataset of eval.datasets ({', '.join(run.eval.datasets)})")
    return found


def _decays(optim: OptimConfig) -> bool:
    """Whether any tower has weight decay."""
    own = (optim.image.weight_decay, optim.text.weight_decay)
    return any(optim.weight_decay if decay is None else decay for decay in own)
