"""The demo's pictures and captions: rendered scenes and handwritten digits.

A scene is one shape with a colour, a size, a position and a background. One combination in eight is never
trained on, while every pair of attribute values is. Digits are scikit-learn's ``load_digits`` (real handwriting, 1,797
images of 8 x 8), placed on canvases of many sizes; a fifth of the handwritten images is held out. All randomness comes
from the generator that a function is given, or from a fixed name. Which sets are written, ``make_demo_data`` decides.
"""

# ruff: noqa: S311  random numbers for pictures, not for secrets

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from evaclip.errors import DataError

HELD_OUT = 5  # one handwritten digit in this many
UNSEEN = 8  # one combination in this many
CAPTIONS_PER_IMAGE = 5
JPEG_QUALITY = 92
SUPERSAMPLING = 3

Colour = tuple[int, int, int]


def jpeg(image: Image.Image) -> bytes:
    """An image as the bytes of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def pair(image: Image.Image, caption: str) -> dict[str, bytes]:
    """The members of a training record."""
    return {"jpg": jpeg(image), "txt": caption.encode()}


# ------------------------------------------------------------------------------------------------------------- scenes


class Scene(NamedTuple):
    """A combination of attribute values, each by the first of its words in ``WORDS``."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    @property
    def class_name(self) -> str:
        """The plain description, which begins with a consonant and fits behind "a"."""
        return f"{self.size} {self.colour} {self.shape} {self.position} on a {self.background} background"


WORDS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "size": (("small", "little", "tiny"), ("large", "big", "huge")),
    "colour": (("red",), ("green",), ("blue",), ("yellow",)),
    "shape": (("circle", "disc"), ("ring", "hoop"), ("triangle",), ("cross", "plus sign"), ("bar", "stripe")),
    "position": (
        ("in the middle", "in the centre", "at the center"),
        ("on the left", "at the left edge", "on the left side"),
        ("on the right", "at the right edge", "on the right side"),
        ("at the top", "near the top", "in the upper part"),
        ("at the bottom", "near the bottom", "in the lower part"),
    ),
    "background": (("black",), ("brown",)),
}
"""Attribute -> its values, each a tuple of synonyms; none begins with a vowel where it may follow "a"."""

SYNONYMS = {name: {words[0]: words for words in values} for name, values in WORDS.items()}

SCENE_CAPTIONS = (
    "a {size} {colour} {shape} {position} on a {background} background",
    "a picture of a {size} {colour} {shape} {position} on a {background} background",
    "a drawing of a {colour} {shape}, {size}, {position}, on a {background} background",
    "{position}, a {size} {colour} {shape}; the background is {background}",
    "a {background} background with a {size} {colour} {shape} {position}",
    "on a {background} background there is a {size} {shape} in {colour} {position}",
    "the {colour} {shape} {position} is {size} and the background is {background}",
    "{colour} {shape}, {size}, {position}, {background} background",
    "a {size} {shape} {position}, {colour} on {background}",
    "there is a {colour} {shape} {position}, it is {size}, the background is {background}",
)
SCENE_TEMPLATES = ("a {c}", "a picture of a {c}", "there is a {c}")

RADIUS = {"small": 0.19, "large": 0.32}
"""Of the shapes, as a share of the shorter side of the canvas."""
CENTRE = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}
INK: Mapping[str, Colour] = {
    "red": (240, 60, 60),
    "green": (60, 215, 80),
    "blue": (90, 130, 255),
    "yellow": (250, 230, 60),
}
GROUND: Mapping[str, Colour] = {"black": (12, 12, 12), "brown": (78, 36, 18)}

_ARM, _HALF = 1.2, 0.28  # length and half the width of a cross's arm, in radii
OUTLINES: Mapping[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0, -1.2), (1.25, 1), (-1.25, 1)),
    "cross": tuple(
        (x * cos - y * sin, x * sin + y * cos)
        for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for x, y in ((-_HALF, -_ARM), (_HALF, -_ARM), (_HALF, -_HALF))
    ),
    "bar": ((-1.3, -0.38), (1.3, -0.38), (1.3, 0.38), (-1.3, 0.38)),
}
"""Corners in radii from the centre, y pointing down."""
HOLE = 0.6  # inner radius of a ring


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every combination, in the order of the class names."""
    return tuple(Scene(*(words[0] for words in values)) for values in itertools.product(*WORDS.values()))


@cache
def unseen_scenes() -> frozenset[Scene]:
    """The combinations that are never trained on."""
    scenes = all_scenes()
    return frozenset(Random("unseen combinations").sample(scenes, len(scenes) // UNSEEN))


def seen_scenes(order: str) -> list[Scene]:
    """The combinations that are trained on, in the random order of that name."""
    scenes = [scene for scene in all_scenes() if scene not in unseen_scenes()]
    Random(order).shuffle(scenes)
    return scenes


def scene_caption(scene: Scene, rng: Random, template: str) -> str:
    """A caption that names all five attributes, in the template's order and in random synonyms."""
    chosen = {name: rng.choice(SYNONYMS[name][value]) for name, value in scene._asdict().items()}
    return template.format(**chosen)


def render_scene(scene: Scene, rng: Random) -> Image.Image:
    """Draw a scene with jittered place, size, turn, colours and canvas, 48 to 80 pixels a side."""
    side = rng.randint(48, 80)
    width, height = side, max(48, min(80, round(side * rng.uniform(0.95, 1.05))))
    radius = RADIUS[scene.size] * rng.uniform(0.9, 1.1) * min(width, height)
    x, y = CENTRE[scene.position]
    place = ((x + rng.uniform(-0.03, 0.03)) * width, (y + rng.uniform(-0.03, 0.03)) * height)
    mask = draw_shape(scene.shape, (width, height), place, radius, math.radians(rng.uniform(-3, 3)))
    corners = Image.new("RGB", (2, 2))
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a soft gradient between four shades of the background
        corners.putpixel(corner, jitter(GROUND[scene.background], 12, rng))
    image = corners.resize((width, height), Image.Resampling.BILINEAR)
    image.paste(jitter(INK[scene.colour], 20, rng), (0, 0), mask)
    return image


def draw_shape(
    shape: str, size: tuple[int, int], place: tuple[float, float], radius: float, turn: float
) -> Image.Image:
    """A shape as an antialiased 8-bit mask; ``turn`` in radians."""
    x, y, r = (SUPERSAMPLING * value for value in (*place, radius))
    mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    if shape in OUTLINES:
        cos, sin = r * math.cos(turn), r * math.sin(turn)
        draw.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in OUTLINES[shape]], fill=255)
    else:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            r *= HOLE
            draw.ellipse((x - r, y - r, x + r, y + r), fill=0)
    return mask.reduce(SUPERSAMPLING)


def jitter(colour: Colour, amount: int, rng: Random) -> Colour:
    """A colour with each channel moved by at most ``amount``."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def training_scenes(count: int) -> Iterator[dict[str, bytes]]:
    """Training records, the seen combinations in turn."""
    seen = seen_scenes("training")
    for number in range(count):
        yield scene_pair(seen[number % len(seen)], Random(f"training scene {number}"))


def scene_pair(scene: Scene, rng: Random) -> dict[str, bytes]:
    """A scene with a caption."""
    return pair(render_scene(scene, rng), scene_caption(scene, rng, rng.choice(SCENE_CAPTIONS)))


def test_scenes(per_combination: int) -> Iterator[dict[str, bytes]]:
    """Images of the combinations that training never shows, labelled among all."""
    for number, (label, scene) in itertools.product(range(per_combination), enumerate(all_scenes())):
        if scene in unseen_scenes():
            image = render_scene(scene, Random(f"test scene {label} {number}"))
            yield {"jpg": jpeg(image), "cls": str(label).encode()}


def retrieval_scenes(count: int) -> Iterator[dict[str, bytes]]:
    """New images of distinct combinations, seen and unseen alike, with several captions each, one a line."""
    for number, scene in enumerate(Random("retrieval").sample(all_scenes(), count)):
        rng = Random(f"retrieval scene {number}")
        templates = rng.sample(SCENE_CAPTIONS, CAPTIONS_PER_IMAGE)
        captions = "\n".join(scene_caption(scene, rng, template) for template in templates)
        yield {"jpg": jpeg(render_scene(scene, rng)), "txt": captions.encode()}


# ------------------------------------------------------------------------------------------------------------- digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a photo of the digit {c}",
    "a handwritten {c}",
    "handwritten {c}",
    "the number {c} written by hand",
    "the digit {c} on a piece of paper",
    "somebody wrote the number {c}",
    "a scan of the handwritten digit {c}",
    "this is the digit {c}",
    "a blurry photo of the number {c}",
    "the figure {c}, written with a pen",
    "the number {c} from a form",
    "{c}",
)
DIGIT_TEMPLATES = ("a photo of the digit {c}", "the number {c} written by hand", "this is the digit {c}")


class Handwriting(NamedTuple):
    """A handwritten digit: ink as an 8-bit grey image, and which digit it is."""

    ink: Image.Image
    label: int


def load_handwriting() -> tuple[list[Handwriting], list[Handwriting]]:
    """The digits of scikit-learn as (training, held out), a fifth of each class held out.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  an optional dependency
    except ModuleNotFoundError as error:
        raise DataError("the digits come with scikit-learn, which is missing; pip install scikit-learn") from error
    bunch: Any = load_digits()
    training: list[Handwriting] = []
    held_out: list[Handwriting] = []
    for label in range(len(DIGITS)):
        members = np.flatnonzero(bunch.target == label).tolist()
        Random(f"split of digit {label}").shuffle(members)
        for rank, member in enumerate(members):
            ink = Image.fromarray(np.round(bunch.images[member] * (255 / 16)).astype(np.uint8))
            (training if rank % HELD_OUT else held_out).append(Handwriting(ink, label))
    Random("order of the digits").shuffle(training)
    Random("order of the held-out digits").shuffle(held_out)
    return training, held_out


def render_digit(digit: Handwriting, rng: Random) -> Image.Image:
    """Place a digit on a canvas of 32 to 96 pixels a side, light on dark, tinted, tilted and of varying contrast."""
    side = rng.randint(32, 96)
    width, height = side, max(32, min(96, round(side * rng.uniform(0.92, 1.08))))
    scale = rng.uniform(0.9, 1) * min(width, height)
    size = (round(scale * rng.uniform(0.94, 1)), round(scale * rng.uniform(0.95, 1)))
    mask = digit.ink.resize(size, Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-5, 5), Image.Resampling.BILINEAR)
    image = Image.new("RGB", (width, height), jitter((30, 30, 30), 25, rng))
    place = (rng.randint(0, width - size[0]), rng.randint(0, height - size[1]))
    image.paste(jitter((225, 225, 225), 30, rng), place, mask)
    return image


def digit_pair(digit: Handwriting, rng: Random) -> dict[str, bytes]:
    """A digit with a caption that names it as a word or as a numeral."""
    name = rng.choice((DIGITS[digit.label], str(digit.label)))
    return pair(render_digit(digit, rng), rng.choice(DIGIT_CAPTIONS).format(c=name))


def training_digits(digits: Sequence[Handwriting], renderings: int) -> Iterator[dict[str, bytes]]:
    """Training records: all digits once, then all again in another rendering."""
    for rendering, (number, digit) in itertools.product(range(renderings), enumerate(digits)):
        yield digit_pair(digit, Random(f"training digit {number} {rendering}"))


def labelled_digits(digits: Sequence[Handwriting], renderings: int, split: str) -> Iterator[dict[str, bytes]]:
    """Labelled renderings of each digit, others in each split."""
    for rendering, (number, digit) in itertools.product(range(renderings), enumerate(digits)):
        image = render_digit(digit, Random(f"{split} digit {number} {rendering}"))
        yield {"jpg": jpeg(image), "cls": str(digit.label).encode()}


def validation_pairs(digits: Sequence[Handwriting], count: int) -> Iterator[dict[str, bytes]]:
    """Held-out pairs of the kinds that are trained on: new scenes of seen combinations, and held-out digits."""
    seen = seen_scenes("validation")
    for number in range(count):
        rng = Random(f"validation pair {number}")
        if number % 4 == 0:
            yield digit_pair(digits[number // 4 % len(digits)], rng)
        else:
            yield scene_pair(seen[number % len(seen)], rng)
