"""A picture of training samples: each as the image tower sees it, above what is known of it.

Pillow alone draws it, with the font that it brings along, which is Latin, and for other captions with fonts of the
system, if there are any; what none of them has shows as boxes. Where samples come from is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from evaclip.picture import COLOURS

_LEAST_WIDTH = 180
"""Pixels that a tile has for its text; smaller images are shown larger, pixel by pixel."""
_GAP = 16
_BAR = 5
"""Height of the stripe in the source's colour."""
_TITLE_SIZE, _TEXT_SIZE, _LINE = 17, 13, 17
_FACT_LINES, _CAPTION_LINES = 3, 4
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc")
"""Of the system: Cyrillic, Greek, Arabic and others; Chinese, Japanese, Korean."""
_INK, _FAINT, _PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
_VEIL, _VEIL_SHARE = 208, 0.85
"""Grey that lies over dropped patches, and how thickly."""


class Tile(NamedTuple):
    """One sample."""

    pixels: UInt8[np.ndarray, "size size 3"]
    kept: Bool[np.ndarray, "grid grid"]
    """Which patches the image tower takes."""
    source: str
    facts: tuple[str, str]
    """Two lines below the source."""
    heading: str
    """What stands behind the source's name."""
    caption: str


class Layout(NamedTuple):
    """Where tiles stand."""

    columns: int
    zoom: int
    """Pixels of the sheet per pixel of an image."""
    width: int
    """Of a tile."""
    height: int
    top: int
    """Where the first row begins."""

    def corner(self, number: int) -> tuple[int, int]:
        """Left and top of a tile's image."""
        row, column = divmod(number, self.columns)
        return _GAP + column * (self.width + _GAP), self.top + row * (self.height + _GAP)


def layout(count: int, size: int) -> Layout:
    """Arrange so many images with sides of ``size`` pixels on about the shape of a screen."""
    zoom = max(1, math.ceil(_LEAST_WIDTH / size))
    width, height = zoom * size, zoom * size + _BAR + (_FACT_LINES + _CAPTION_LINES) * _LINE + _GAP // 2
    columns = round(math.sqrt(count * 1.6 * height / width))
    return Layout(max(2, min(count, columns)), zoom, width, height, _GAP + 2 * _TITLE_SIZE + _LINE)


def seen(tile: Tile) -> UInt8[np.ndarray, "size size 3"]:
    """The image with a grey veil over what the image tower does not take; kept patches are as they are."""
    size, grid = len(tile.pixels), len(tile.kept)
    taken = np.zeros((size, size, 1), bool)  # pixels beyond the last whole patch are never taken
    patches = np.kron(tile.kept, np.ones((size // grid, size // grid), bool))
    taken[: len(patches), : len(patches), 0] = patches
    grey = tile.pixels.mean(axis=2, keepdims=True) * (1 - _VEIL_SHARE) + _VEIL * _VEIL_SHARE
    return np.where(taken, tile.pixels, grey.astype(np.uint8))


def draw(title: str, subtitle: str, tiles: Sequence[Tile]) -> Image.Image:
    """The sheet; all images are of one size."""
    places = layout(len(tiles), len(tiles[0].pixels))
    rows = -(-len(tiles) // places.columns)
    size = _GAP + places.columns * (places.width + _GAP), places.corner(places.columns * rows)[1]
    sheet = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_SIZE)
    pen.text((_GAP, _GAP // 2), title, _INK, ImageFont.load_default(_TITLE_SIZE))
    pen.text((_GAP, _GAP // 2 + _TITLE_SIZE + 6), subtitle, _FAINT, font)
    fonts = [font, *system_fonts()]
    sources = sorted({tile.source for tile in tiles})
    for number, tile in enumerate(tiles):
        left, top = places.corner(number)
        image = Image.fromarray(seen(tile)).resize((places.width, places.width), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        top += places.width
        colour = COLOURS[sources.index(tile.source) % len(COLOURS)]
        pen.rectangle((left, top, left + places.width - 1, top + _BAR - 1), colour)
        top += _BAR + 3
        room = places.width - font.getlength(f"{tile.heading}   ")
        pen.text((left, top), shortened(tile.source, room, font.getlength), colour, font)
        pen.text((left + places.width, top), tile.heading, _FAINT, font, anchor="ra")
        for fact in tile.facts:
            top += _LINE
            pen.text((left, top), shortened(fact, places.width, font.getlength), _FAINT, font)
        letters = best_font(tile.caption, fonts)
        for line in wrapped(tile.caption, places.width, letters.getlength):
            top += _LINE
            pen.text((left, top), line, _INK, letters)
    return sheet


def system_fonts() -> Iterator[ImageFont.FreeTypeFont]:
    """Those of a few common fonts that are installed."""
    for name in _FONTS:
        with suppress(OSError):
            yield ImageFont.truetype(name, _TEXT_SIZE)


def best_font(text: str, fonts: Sequence[Any]) -> Any:
    """The first font that lacks the fewest letters of a text: they look like U+FFFF, which is none."""
    return min(fonts, key=lambda font: sum(bytes(font.getmask(c)) == bytes(font.getmask("\uffff")) for c in set(text)))


def shortened(text: str, width: float, length: Callable[[str], float]) -> str:
    """A text that fits, without its middle if need be: names differ at their ends."""
    short, kept = text, len(text)
    while kept > 2 and length(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}...{text[len(text) - (kept + 1) // 2 :]}"
    return short


def wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The first lines of a text; three dots where some is left out."""
    lines: list[str] = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".lstrip()
        if length(line) > width:
            line = shortened(word, width, length)
            if lines[-1]:
                lines.append("")
        lines[-1] = line
    if len(lines) <= _CAPTION_LINES:
        return lines
    last = lines[_CAPTION_LINES - 1]
    while last and length(f"{last} ...") > width:
        last = last[:-1]
    return [*lines[: _CAPTION_LINES - 1], f"{last} ..."]
