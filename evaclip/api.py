"""What a script or a notebook needs: a model with weights, its preprocessing and its tokenizer.

``load`` always has weights, ``create_model`` never has trained ones. Nothing here trains, and nothing here knows ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from evaclip.config import LossConfig, ModelConfig
from evaclip.data.batch import PackedText
from evaclip.data.file_tokenizer import tokenizer_of
from evaclip.data.images import eval_crop
from evaclip.errors import ConfigError
from evaclip.models.clip import CLIP
from evaclip.models.clip import create_model as _create_towers
from evaclip.models.tokens import TextTokens, image_tokens, text_tokens
from evaclip.weights.stored import open_model


class Clip:
    """Images and texts to features of one space.

    Attributes:
        model: The two towers, a plain ``nn.Module``.
        config: What they were made from.
        logit_scale: Multiplier of cosine similarities before a softmax, or a sigmoid.
        logit_bias: Summand before a sigmoid; None for models that were not trained with the sigmoid loss.
    """

    def __init__(self, model: CLIP, logit_scale: float, logit_bias: float | None = None) -> None:
        self.model = model.eval()
        self.config = model.config
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self._tokenizer = tokenizer_of(model.config.text)

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are brought there."""
        return next(self.model.parameters()).device

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """A Pillow image of any mode and size as the image tower wants it: RGB, resized, cropped, normalised fp32.

        Raises:
            BadImageError: The image cannot be read as RGB.
            TypeError: Something else than a Pillow image.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"preprocess takes a Pillow image, not {type(image).__name__}; open it with PIL.Image.open")
        tower = self.config.image
        pixels = eval_crop(image, tower.image_size, tower.resize).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
        return (pixels - mean) / std

    def tokenize(self, texts: str | Sequence[str]) -> PackedText:
        """One text or several, packed without padding; longer texts than the context are cut.

        Raises:
            ValueError: There is no text.
        """
        return PackedText.pack(self._tokenizer([texts] if isinstance(texts, str) else texts))

    def encode_image(
        self,
        images: Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"],
        *,
        normalize: bool = False,
    ) -> Float[Tensor, "batch dim"]:
        """Features of images. Gradients flow; wrap in ``torch.no_grad()`` where none are wanted.

        Args:
            images: Stacked results of ``preprocess``, or uint8 pixels, which are normalised here.
            normalize: Scale every feature to length 1.

        Raises:
            ValueError: Another shape, or integers that are not uint8.
        """
        return self.model.encode_image(self._images(images), normalize=normalize)

    def encode_text(self, tokens: PackedText, *, normalize: bool = False) -> Float[Tensor, "texts dim"]:
        """Features of texts, in their order. Gradients flow; wrap in ``torch.no_grad()`` where none are wanted.

        Args:
            tokens: What ``tokenize`` returns.
            normalize: Scale every feature to length 1.

        Raises:
            TypeError: Something else than ``tokenize`` returns.
        """
        return self.model.encode_text(self._text(tokens), normalize=normalize)

    def image_tokens(
        self,
        images: Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"],
        layer: int = -2,
        *,
        prefix_tokens: bool = False,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Features of patches, row by row, behind a block; before the tower's last norm, as timm and transformers do.

        Args:
            images: As for ``encode_image``.
            layer: 0 is the first block, -1 the last. transformers' ``hidden_states[-2]`` is -2 here as well; from the
                front it counts one more, since its 0 is what goes into the first block.
            prefix_tokens: Also what stands before the patches: the class token, and the registers of some of timm's.

        Raises:
            ConfigError: The image tower is timm's, and has no ``forward_intermediates``.
            ValueError: There is no such layer, another shape, or integers that are not uint8.
        """
        return image_tokens(self.model.image, self._images(images), layer, prefix_tokens=prefix_tokens)

    def text_tokens(self, tokens: PackedText, layer: int = -2) -> TextTokens:
        """Features of the tokens of texts behind a block, before the tower's last norm, and where there are tokens.

        Args:
            tokens: What ``tokenize`` returns.
            layer: As for ``image_tokens``.

        Raises:
            TypeError: Something else than ``tokenize`` returns.
            ValueError: There is no such layer.
        """
        return text_tokens(self.model.text, self._text(tokens), layer)

    def _images(self, images: Tensor) -> Tensor:
        size = self.config.image.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images have shape {list(images.shape)}, not [batch, 3, {size}, {size}]; "
                "stack what preprocess returns: torch.stack([clip.preprocess(image), ...])"
            )
        return images.to(self.device)

    def _text(self, tokens: PackedText) -> PackedText:
        if not isinstance(tokens, PackedText):
            raise TypeError(f"the text tower takes what clip.tokenize(texts) returns, not {type(tokens).__name__}")
        return tokens.to(self.device)


def create_model(name_or_config: str | ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> Clip:
    """A model with random weights.

    Args:
        name_or_config: A named model (``EVA02-CLIP-B-16``; a wrong name lists all) or a configuration.
        seed: Of the weights.
        device: Where they go.

    Raises:
        ConfigError: No model has this name.
    """
    config = name_or_config
    if isinstance(config, str):
        try:
            config = ModelConfig.model_validate({"name": config})
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    return Clip(_create_towers(config, seed=seed, device=device), LossConfig().logit_scale)


def load(path: str | Path, *, device: torch.device | str = "cpu", ema: bool = False) -> Clip:
    """The model of a run directory's newest intact checkpoint, of the checkpoint at ``path``, or of an export there.

    Args:
        path: Where it is.
        device: Where it is to be.
        ema: Take the averaged weights of a run with ``optim.ema_decay``.

    Raises:
        CheckpointError: There is no intact checkpoint, or its weights are not those of its configuration.
        ConfigError: Its tokenizer needs a package that is not installed.
        WeightsError: The export is not whole, or holds an image tower alone.
    """
    stored = open_model(path, device, ema=ema)
    return Clip(stored.clip, *stored.loss.similarity)
