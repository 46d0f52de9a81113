"""Options of the towers and the loss: what the model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from evaclip.config.base import Colour, FilePath, Fraction, Level, Section, path_in, tagged
from evaclip.config.tokenizer_file import read_tokenizer
from evaclip.errors import ConfigError
from evaclip.models.registry import ALIASES, PRESETS


class ImageConfig(Section):
    """What all image towers have."""

    image_size: PositiveInt = 224
    """Side of the square input, in pixels."""
    token_drop: Fraction = 0.0
    """Fraction of patches left out of every training sample (FLIP, arXiv:2212.00794)."""
    drop_path: Fraction = 0.0
    """Probability that a sample skips a branch of the last block in training, growing linearly with depth."""
    mean: Level = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in 0..1, subtracted from the pixels; CLIP's. Weights of timm may expect others."""
    std: Colour = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue in 0..1, by which the pixels are divided; see mean."""
    resize: Literal["crop", "squash"] = "crop"
    """Evaluation images: resize the shorter side and crop the centre, or resize both sides to the square."""

    def kept_of(self, patches: int) -> int:
        """How many of an image's patches a training sample keeps: round(N (1 - token_drop)), at least one."""
        return max(1, round(patches * (1 - self.token_drop)))


class ImageTowerConfig(ImageConfig):
    """A vision transformer.

    EVA-01 with the defaults, EVA-02 with rope, swiglu and sub_norm, 8B and 18B with rms_norm and fewer biases, OpenAI's
    with embed_norm and its own biases.
    """

    kind: Literal["eva"] = "eva"
    """The tower: eva (vision transformers of EVA and OpenAI, by their shapes) or timm (a backbone of timm, by name)."""
    patch_size: PositiveInt = 16
    """Side of a square patch, in pixels."""
    width: PositiveInt = 768
    """Channels of a token."""
    depth: PositiveInt = 12
    """Blocks."""
    heads: PositiveInt = 12
    """Attention heads; they divide the width."""
    mlp: Literal["gelu", "quick_gelu", "swiglu"] = "gelu"
    """Feed-forward kind: two linear layers around a GELU or OpenAI's approximation of it (quick_gelu), or a gated SiLU
    (arXiv:2002.05202)."""
    mlp_width: PositiveInt = 3072
    """Hidden channels of the feed-forward."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of all norms of the tower: layer norm, or root mean square without bias (arXiv:1910.07467; 8B and 18B)."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance in norms."""
    embed_norm: bool = False
    """A norm before the first block (OpenAI's CLIP)."""
    qkv_bias: Literal["qv", "qkv", "none"] = "qv"
    """Which of queries, keys and values have a bias."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    head_bias: bool = True
    """Whether the projection to the features has a bias."""
    sub_norm: bool = False
    """Norms inside attention and feed-forward, before their last linear layer (EVA-02)."""
    rope: bool = False
    """Rotate queries and keys by their patch's row and column (EVA-02), beside the learned position embedding."""
    post_norm: bool = False
    """Norm after each branch instead of before it (EVA02-bigE)."""
    layer_scale: PositiveFloat | None = None
    """Initial value of a learned scale per channel on each branch; null leaves it out."""

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
        """Patches that a training sample keeps."""
        return self.kept_of(self.grid**2)


class TimmTowerConfig(ImageConfig):
    """A backbone of timm. What is not here is as ``timm.create_model`` has it; nothing is downloaded."""

    kind: Literal["timm"]
    """The tower: eva (vision transformers of EVA and OpenAI, by their shapes) or timm (a backbone of timm, by name)."""
    model: Annotated[str, Field(min_length=1)]
    """Name of a timm model, as vit_base_patch16_siglip_224; needed with kind timm only."""
    pool: str | None = None
    """How a timm model pools its tokens or positions, timm's global_pool (token, avg, map ...); null: its own way."""
    projection: Literal["head", "linear", "mlp", "none"] = "head"
    """What brings a timm model's features into the common space: its own classifier (head), a linear layer without bias
    or two layers behind it (linear, mlp), or nothing where it ends in embed_dim channels (none, as SigLIP)."""


AnyImageTower = Annotated[ImageTowerConfig | TimmTowerConfig, Field(discriminator="kind"), tagged("kind", "eva")]


CLIP_VOCABULARY = 49408
"""Ids of CLIP's own byte-pair encoding."""


class TextTowerConfig(Section):
    """A causal transformer over a text's tokens; the feature is read at the end token."""

    tokenizer: FilePath | None = None
    """A Hugging Face tokenizer.json, for other languages than English; null: CLIP's byte-pair encoding. A run copies
    it and goes on without the original."""
    tokenizer_digest: str | None = None
    """Checksum (xxh3) that the tokenizer's file must have; null: it is taken from the file, and stays with the model.
    """
    context_length: Annotated[int, Field(ge=3)] = 77
    """Most tokens of a caption, start and end included; longer captions are cut and keep the end token."""
    vocab_size: PositiveInt = CLIP_VOCABULARY
    """Rows of the token embedding, at least as many as the tokenizer has ids; with a tokenizer.json, left out: as many.
    """
    width: PositiveInt = 512
    """Channels of a token."""
    depth: PositiveInt = 12
    """Blocks."""
    heads: PositiveInt = 8
    """Attention heads; they divide the width."""
    mlp: Literal["gelu", "quick_gelu"] = "gelu"
    """Feed-forward kind: two linear layers around a GELU, or around OpenAI's approximation of it."""
    mlp_width: PositiveInt = 2048
    """Hidden channels of the feed-forward."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_tokenizer(cls, given: Any) -> Any:
        """Read the tokenizer's file, unless that was done before: the section of a checkpoint needs none."""
        path = path_in(given, "tokenizer")
        if path is None or given.get("tokenizer_digest") is not None:
            return given
        section = cast("Mapping[str, Any]", given)
        rows = section.get("vocab_size")
        try:
            found = read_tokenizer(path, vocab_size=rows if isinstance(rows, int) else None)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return {"vocab_size": found.vocab_size, **section, "tokenizer_digest": found.digest}

    @model_validator(mode="after")
    def _sizes_fit(self) -> TextTowerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.tokenizer is None and self.tokenizer_digest is not None:
            raise ValueError(f"tokenizer_digest {self.tokenizer_digest} belongs to a tokenizer; name its file too")
        if self.tokenizer is None and self.vocab_size < CLIP_VOCABULARY:
            raise ValueError(
                f"vocab_size {self.vocab_size} is less than the {CLIP_VOCABULARY} ids of CLIP's tokenizer; leave it "
                f"out, or name another tokenizer"
            )
        return self


class ModelConfig(Section):
    """Two towers and the space they share."""

    name: str | None = None
    """A named model (EVA02-CLIP-B-16 ...) that gives the defaults of this section; other keys override it."""
    embed_dim: PositiveInt = 512
    """Channels of the features that both towers end in."""
    image: AnyImageTower = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        section = cast("Mapping[str, Any]", given)
        if not isinstance(section.get("name"), str):
            return section
        name = ALIASES.get(section["name"], section["name"])
        if name not in PRESETS:
            raise ValueError(f"no model is named {name!r}; there are {', '.join(PRESETS)}")
        if _kind(section.get("image")) == "timm":
            raise ValueError(
                f"{name} has an image tower of its own; leave model.name out with model.image.kind timm, "
                f"and give model.embed_dim and model.text"
            )
        return _merge(PRESETS[name], {**section, "name": name})

    def with_tokenizer(self, path: Path) -> ModelConfig:
        """The same model, whose tokenizer's file is at another place; itself where it needs none."""
        if self.text.tokenizer is None:
            return self
        return self.model_copy(update={"text": self.text.model_copy(update={"tokenizer": str(path)})})


def _kind(image: object) -> object:
    """Of an image tower's section, given as plain data or not."""
    return (
        cast("Mapping[str, object]", image).get("kind") if isinstance(image, Mapping) else getattr(image, "kind", None)
    )


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
    """The temperature, which every loss has."""

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


class InfoNceConfig(LossConfig):
    """Symmetric InfoNCE (arXiv:2103.00020)."""

    name: Literal["info_nce"] = "info_nce"
    """The loss: info_nce or sigmoid."""


class SigmoidConfig(LossConfig):
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343)."""

    name: Literal["sigmoid"]
    """The loss: info_nce or sigmoid."""
    logit_scale: PositiveFloat = 10.0
    """Initial multiplier of the cosine similarities; its logarithm is the parameter."""
    logit_bias: float = -10.0
    """Initial summand of the logits."""
    learn_logit_bias: bool = True
    """Whether the summand is trained."""


Loss = Annotated[InfoNceConfig | SigmoidConfig, Field(discriminator="name"), tagged("name", "info_nce")]
