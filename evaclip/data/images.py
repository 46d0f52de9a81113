"""Bytes to pixels: which images are usable, how they are decoded, and how they become squares.

This module decides what a bad image is, and the pixels of training and evaluation squares. It does not know where the
bytes come from, how bad images are counted, or how pixels are normalised: squares leave as uint8.

Anything that starts like a JPEG is decoded by simplejpeg in its strict mode, and what that rejects is bad: laxer
decoders fill the missing part of a truncated file with grey and say nothing. PNG, WebP, GIF, BMP and TIFF go through
Pillow. Sizes are checked before anything is decoded, and every image is turned upright as its EXIF says.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from evaclip.config import AugmentConfig
from evaclip.data.order import uniform

BadImageReason = Literal["empty", "not_an_image", "too_large", "undecodable", "unsupported_mode"]

_CROP, _FLIP = 0x63726F70, 0x666C6970
"""What a sample's random numbers are drawn for (ASCII "crop" and "flip")."""

_PILLOW_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF")

_OTHER_MAGIC = (b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of those."""

_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""What Pillow's parsers raise on damaged bytes; all are functions of the bytes, which are in memory."""

_LONGEST_EVAL_ASPECT = 64
"""Wider or taller pictures lose their ends before they are resized: a 30000 x 1 strip would grow to gigapixels."""


class BadImageError(ValueError):
    """An image that cannot be used; the fault is a function of its bytes and of the size limit.

    Attributes:
        reason: Its kind, under which bad images are counted.
        detail: What exactly is wrong.
    """

    def __init__(self, reason: BadImageReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that the error can be pickled
        self.reason: BadImageReason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


# ------------------------------------------------------------------------------------------------------------ decode


def decode(data: bytes, *, max_pixels: int, min_size: int | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image, upright, first frame only, to RGB.

    Alpha is dropped without blending, as ``convert("RGB")`` does; 16-bit grey is scaled to 8 bits.

    Args:
        data: The encoded image.
        max_pixels: Images with more pixels are refused before they are decoded.
        min_size: Lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its sides (by smaller inverse DCTs) as long as its
            shorter side keeps this many pixels; None decodes in full. Scales between 1/2 and 1 are slower than 1.

    Returns:
        uint8, contiguous and writable.

    Raises:
        BadImageError: The bytes are no image, are damaged, or hold too many pixels.
    """
    if not data:
        raise BadImageError("empty", "there are no bytes")
    if data.startswith(b"\xff\xd8"):
        return _decode_jpeg(data, max_pixels, min_size)
    with _pillow_on_foreign_bytes():
        return np.array(_open_with_pillow(data, max_pixels))


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header of a usable image has them, before its EXIF turns it."""
    if data.startswith(b"\xff\xd8"):
        height, width, *_ = cast("tuple[int, int, str, str]", simplejpeg.decode_jpeg_header(data))
        return width, height
    with _pillow_on_foreign_bytes(), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
        return image.size


def load_eval(data: bytes, *, max_pixels: int) -> Image.Image:
    """The same pixels as ``decode`` in full, as a Pillow image in mode RGB.

    Raises:
        BadImageError: As ``decode``.
    """
    return Image.fromarray(decode(data, max_pixels=max_pixels))


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as upright RGB.

    Raises:
        BadImageError: The mode's range of values is not known (32-bit integers, floats), or the file behind it is
            damaged.
    """
    with _pillow_on_foreign_bytes():
        return _to_rgb(image)


def min_decode_size(size: int, augment: AugmentConfig) -> int | None:
    """Shorter side that ``decode`` must keep so that a crop has ``decode_margin`` pixels per output pixel and side.

    A crop of the share s of a picture w x h, with aspect ratio r, is at most w wide, so it is at least s h tall, and
    the other way round. It is also sqrt(s r w h) wide and sqrt(s w h / r) tall. Both bound its shorter side.

    Args:
        size: Side of the output square, in pixels.
        augment: What crops may be.

    Returns:
        Pixels, or None where JPEGs are decoded in full.
    """
    if not augment.decode_margin:
        return None
    share = augment.crop_scale[0]
    narrowest = min(1.0, augment.crop_ratio[0], 1 / augment.crop_ratio[1])
    return math.ceil(augment.decode_margin * size / max(share, math.sqrt(share * narrowest)))


def _decode_jpeg(data: bytes, max_pixels: int, min_size: int | None) -> UInt8[np.ndarray, "height width 3"]:
    try:
        height, width, space, _ = cast("tuple[int, int, str, str]", simplejpeg.decode_jpeg_header(data))
        _require_size(height, width, max_pixels)
        four = space in {"CMYK", "YCCK"}
        factor = 1 if min_size is None else _reduction(min(height, width), min_size)
        rows, columns = -(-height // factor), -(-width // factor)
        pixels = simplejpeg.decode_jpeg(data, "CMYK" if four else "RGB", min_height=rows, min_width=columns)
    except BadImageError:
        raise
    except (ValueError, LookupError) as error:  # a KeyError comes from samplings that libjpeg-turbo does not name
        raise BadImageError("undecodable", f"JPEG: {error}") from error
    if four:  # stored inverted, as Adobe does and as Pillow takes for granted
        inks = Image.frombytes("CMYK", (pixels.shape[1], pixels.shape[0]), np.bitwise_not(pixels).tobytes())
        pixels = np.array(inks.convert("RGB"))
    return _turn(pixels, _orientation(_jpeg_exif(data)))


def _reduction(shorter_side: int, min_size: int) -> int:
    """The largest factor, of those that libjpeg-turbo is fast at, that leaves ``min_size`` pixels."""
    return next((factor for factor in (8, 4, 2) if shorter_side >= factor * min_size), 1)


def _open_with_pillow(data: bytes, max_pixels: int) -> Image.Image:
    if not data.startswith(_OTHER_MAGIC):
        formats = ", ".join(_PILLOW_FORMATS)
        raise BadImageError("not_an_image", f"starts with {data[:8].hex(' ')}, unlike JPEG, {formats}")
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImageError(
            "undecodable", f"starts like an image, {data[:8].hex(' ')}, but its header is damaged"
        ) from error
    _require_size(image.height, image.width, max_pixels)
    return _to_rgb(image)


def _require_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImageError("too_large", f"{width} x {height} pixels, more than {max_pixels}")


@contextmanager
def _pillow_on_foreign_bytes() -> Iterator[None]:
    """Drop Pillow's warnings and make one error of its many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BadImageError:
            raise
        except Image.DecompressionBombError as error:
            raise BadImageError("too_large", str(error)) from error
        except _UNREADABLE as error:
            raise BadImageError("undecodable", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # a PNG may carry its EXIF behind the pixels
    orientation = _orientation(image.info.get("exif", b""))  # Pillow turns TIFFs by itself
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # round(grey * 255 / 65535)
    if image.mode in {"I", "F"}:
        raise BadImageError("unsupported_mode", f"the range of mode {image.mode} (32 bits per pixel) is not known")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if orientation == 1 else Image.fromarray(_turn(np.asarray(image), orientation))


# -------------------------------------------------------------------------------------------------------------- EXIF


def _jpeg_exif(data: bytes) -> bytes:
    """The EXIF block of a JPEG, empty if it has none: a walk over the segments before the pixels (ITU-T T.81, B.1)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            return data[at + 4 : at + 2 + length]
        at += 2 + length
    return b""


def _orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, of an EXIF block (CIPA DC-008, 4.6.4); 1, upright, where it is absent or unreadable."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}.get(kind, "0s"), tiff, at + 8)
                return value if value in range(1, 9) else 1
    except struct.error:
        pass
    return 1


def _turn(
    pixels: UInt8[np.ndarray, "height width 3"], orientation: int
) -> UInt8[np.ndarray, "turned_height turned_width 3"]:
    """Undo an EXIF orientation: 5 to 8 swap rows and columns; then 2, 3, 6, 7 mirror columns and 3, 4, 7, 8 rows."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    columns = -1 if orientation in {2, 3, 6, 7} else 1
    rows = -1 if orientation in {3, 4, 7, 8} else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


# ---------------------------------------------------------------------------------------------------------- training


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(height: int, width: int, augment: AugmentConfig, seed: int) -> Box:
    """Draw the part of a picture that a sample shows, as torchvision's RandomResizedCrop does (arXiv:1409.4842, 6).

    Ten times a share of the area and an aspect ratio (log-uniform) are drawn; the first rectangle that fits is placed
    uniformly. If none fits, the largest centred one with an allowed ratio is taken.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        augment: Ranges of share and ratio.
        seed: The sample's seed; the box is a function of it and of the other arguments.
    """
    (small, large), (narrow, wide) = augment.crop_scale, augment.crop_ratio
    for attempt in range(10):
        area = height * width * (small + (large - small) * uniform(seed, _CROP, attempt, 0))
        ratio = narrow * (wide / narrow) ** uniform(seed, _CROP, attempt, 1)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(uniform(seed, _CROP, attempt, 2) * (height - box_height + 1))
            left = int(uniform(seed, _CROP, attempt, 3) * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * wide)))
    box_height = min(height, max(1, round(width / narrow)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def train_crop(
    image: UInt8[np.ndarray, "height width 3"], size: int, augment: AugmentConfig, seed: int
) -> UInt8[Tensor, "3 size size"]:
    """A random crop, resized to a square (bicubic, antialiased), perhaps mirrored.

    Args:
        image: RGB pixels.
        size: Side of the square, in pixels.
        augment: What crops may be, and how often they are mirrored.
        seed: The sample's seed; nothing else is random.

    Returns:
        uint8, contiguous.
    """
    full_height, full_width, _ = image.shape
    top, left, height, width = crop_box(full_height, full_width, augment, seed)
    crop = torch.from_numpy(np.array(image[top : top + height, left : left + width]))
    channels_last = crop.permute(2, 0, 1)[None]  # 1 3 h w; torch's uint8 kernel is twice as fast in this layout
    square = F.interpolate(channels_last, size=(size, size), mode="bicubic", antialias=True)[0]
    if uniform(seed, _FLIP) < augment.flip:
        square = square.flip(-1)
    return square.contiguous()


# -------------------------------------------------------------------------------------------------------- evaluation


def eval_crop(image: Image.Image, size: int, mode: Literal["crop", "squash"]) -> UInt8[Tensor, "3 size size"]:
    """The square that evaluation shows, pixel by pixel that of open_clip and torchvision for an upright RGB image.

    Args:
        image: Of any mode; it is first turned upright and converted to RGB.
        size: Side of the square, in pixels.
        mode: ``crop``: the shorter side is resized and the centre cut out; ``squash``: both sides are resized.

    Returns:
        uint8, contiguous.

    Raises:
        BadImageError: As ``to_rgb``.
    """
    image = to_rgb(image)
    if mode == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = _cut_ends(image)
        shorter = min(image.size)
        width, height = (int(size * side / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _cut_ends(image: Image.Image) -> Image.Image:
    """Shorten a strip around its centre; what is left reaches far beyond the square that is cut out later."""
    longest = _LONGEST_EVAL_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
