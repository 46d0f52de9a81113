import io
import pickle
import random
import resource
import struct
import zlib

import numpy as np
import open_clip
import pytest
import simplejpeg
import torch
import torchvision
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from evaclip.config import AugmentConfig
from evaclip.data import images as module
from evaclip.data.images import (
    BadImageError,
    crop_box,
    decode,
    eval_crop,
    load_eval,
    min_decode_size,
    to_rgb,
    train_crop,
)
from evaclip.data.order import uniform

LIMIT = 10_000_000


def picture(height: int = 60, width: int = 80) -> Image.Image:
    """Smooth colours with some texture, no symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(25 * x * y + x)]
    return Image.fromarray((128 + 110 * np.stack(waves, axis=-1)).astype(np.uint8))


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BadImageError) as bad:
        decode(data, max_pixels=max_pixels)
    return bad.value.reason


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "a camera"
    return tags


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be large: a bomb of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------ JPEG


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}, {"quality": 20}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_full_jpeg_decode_gives_pillows_pixels(mode, options):
    data = encoded(picture(61, 83).convert(mode), "JPEG", **options)
    pixels = decode(data, max_pixels=LIMIT)
    assert (pixels.dtype, pixels.flags.c_contiguous, pixels.flags.writeable) == (np.uint8, True, True)
    np.testing.assert_array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_jpeg_with_four_inks_gives_pillows_pixels(transform):
    data = bytearray(encoded(picture().convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = transform  # how the inks are stored (Adobe TN 5116)
    assert simplejpeg.decode_jpeg_header(bytes(data))[2] == ["CMYK", None, "YCCK"][transform]
    np.testing.assert_array_equal(decode(bytes(data), max_pixels=LIMIT), by_pillow(bytes(data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_bad_also_with_its_end_marker_restored(mode, progressive):
    data = encoded(picture(200, 300).convert(mode), "JPEG", progressive=progressive)
    for share in (0.3, 0.6, 0.95):
        cut = data[: int(len(data) * share)]
        assert reason(cut) == "undecodable"
        restored = cut + b"\xff\xd9"
        assert reason(restored) == "undecodable"
    assert by_pillow(restored).shape == (200, 300, 3)  # the laxer decoder says nothing, which is why it is not asked
    assert reason(data[:-2]) == "undecodable"


def test_jpeg_is_known_by_its_first_bytes_and_never_handed_to_pillow(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Pillow was asked")

    data = encoded(picture(), "JPEG")
    monkeypatch.setattr(Image, "open", refuse)
    assert decode(data, max_pixels=LIMIT).shape == (60, 80, 3)
    assert reason(b"\xff\xd8\xff\xe0 no picture follows") == "undecodable"
    assert reason(b"\xff\xd8") == "undecodable"


def test_jpeg_with_rubbish_behind_its_end_is_fine():
    data = encoded(picture(), "JPEG")
    np.testing.assert_array_equal(decode(data + b"appended", max_pixels=LIMIT), by_pillow(data))


# ------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_size_limit_counts_pixels_and_is_inclusive(fmt):
    data = encoded(picture(60, 80), fmt)
    assert decode(data, max_pixels=4800).shape == (60, 80, 3)
    assert reason(data, max_pixels=4799) == "too_large"
    with pytest.raises(BadImageError, match="too_large: 80 x 60 pixels, more than 4799"):
        decode(data, max_pixels=4799)


def test_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded():
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)) == "too_large"


@pytest.mark.parametrize("side", [4000, 12_000, 60_000])
def test_png_bomb_is_refused_before_it_is_decoded(monkeypatch, side):
    def refuse(_: object) -> None:
        raise AssertionError("pixels were decoded")

    # 12,000 squared is where Pillow would warn, 60,000 squared where it would raise an error of its own.
    monkeypatch.setattr(PngImageFile, "load", refuse)
    assert reason(png_header(side, side)) == "too_large"


def test_webp_that_claims_a_huge_canvas_is_refused_without_allocating_it():
    data = bytearray(encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]))
    assert data[12:16] == b"VP8X"
    data[24:30] = (12_999).to_bytes(3, "little") * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(bytes(data)) == "too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the canvas has 660,000


def test_pillows_own_limit_neither_warns_nor_leaks(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # it warns above and raises above twice that
    assert decode(encoded(picture(60, 80), "PNG"), max_pixels=LIMIT).shape == (60, 80, 3)
    assert reason(encoded(picture(80, 90), "PNG")) == "too_large"
    assert reason(encoded(picture(80, 90), "WEBP")) == "too_large"


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30_000), (30_000, 1), (2, 3)])
def test_extreme_shapes_pass_through_training_and_evaluation(fmt, height, width):
    data = encoded(picture(height, width), fmt)
    image = decode(data, max_pixels=LIMIT, min_size=64)
    assert image.shape == (height, width, 3)
    assert train_crop(image, 32, AugmentConfig(), seed=1).shape == (3, 32, 32)
    for mode in ("crop", "squash"):
        assert eval_crop(load_eval(data, max_pixels=LIMIT), 32, mode).shape == (3, 32, 32)


# ------------------------------------------------------------------------------------------------------ no image


def test_no_bytes_are_reported_as_empty():
    assert reason(b"") == "empty"


@pytest.mark.parametrize(
    "data", [b"<html>404</html>", b"\x00" * 100, b"%PDF-1.4", b"P6 1 1 255 abc", b"8BPS\0\1" + bytes(40)]
)
def test_other_bytes_are_no_image(data):
    assert reason(data) == "not_an_image"


def test_postscript_is_not_read_though_pillow_could():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not_an_image"


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_image_is_bad_in_every_format(fmt):
    data = encoded(picture(200, 300), fmt)
    for share in (0.1, 0.5, 0.8):
        assert reason(data[: int(len(data) * share)]) == "undecodable"


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("shift", [0, 1])
def test_image_without_rows_or_columns_is_bad(fmt, shift):
    data = bytearray(png_header(80, 60) if fmt == "PNG" else encoded(picture(60, 80), fmt))
    start, size = {"JPEG": (data.find(b"\xff\xc0") + 5, 2), "PNG": (16, 4), "BMP": (18, 4)}[fmt]
    data[start + shift * size : start + (shift + 1) * size] = bytes(size)
    assert reason(bytes(data)) == "undecodable"


def test_damaged_bytes_raise_nothing_but_bad_image():
    draw = random.Random(11)
    whole = [encoded(picture(20, 30), fmt) for fmt in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    whole.append(encoded(picture(20, 30), "JPEG", exif=exif(6)))
    reasons = set()
    for data in whole * 150:
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 5)):
            damaged[draw.randrange(min(len(data), 300))] = draw.randrange(256)
        try:
            pixels = decode(bytes(damaged), max_pixels=100_000, min_size=draw.choice([None, 5]))
        except BadImageError as bad:
            reasons.add(bad.reason)
        else:
            assert pixels.size > 0
    assert reasons >= {"undecodable", "not_an_image", "too_large"}


def test_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadImageError("too_large", "9 x 9 pixels")))
    assert (error.reason, str(error)) == ("too_large", "too_large: 9 x 9 pixels")


# ------------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("P", "BMP"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LA", "TIFF"),
    ],
)
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode, fmt):
    image = picture().convert(mode)
    if "A" in mode:
        image.putalpha(picture().convert("L").rotate(180))
    data = encoded(image, fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), by_pillow(data))


def test_palette_with_several_transparencies_becomes_rgb_without_a_warning():
    data = encoded(picture().convert("P"), "PNG", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        expected = by_pillow(data)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), expected)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(fmt):
    deep = np.array([[0, 128, 129, 255, 256, 257], [300, 32_767, 32_768, 40_000, 65_406, 65_535]], dtype=np.uint16)
    data = encoded(Image.fromarray(deep), fmt)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    expected = np.round(deep / 65_535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused_and_not_clipped(dtype):
    data = encoded(Image.fromarray(np.full((4, 4), 1000, dtype=dtype)), "TIFF")
    assert reason(data) == "unsupported_mode"


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_stands_for_an_animation(fmt):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), np.asarray(frames[0]))


# ------------------------------------------------------------------------------------------------------ EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_in_training_and_evaluation(fmt, orientation):
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(picture(48, 64), fmt, exif=exif(orientation), **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    pixels = decode(data, max_pixels=LIMIT)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, upright)
    np.testing.assert_array_equal(np.asarray(load_eval(data, max_pixels=LIMIT)), upright)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(data)))), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_turns_the_image_too(orientation):
    data = encoded(picture(240, 320), "JPEG", exif=exif(orientation), quality=95)
    small = decode(data, max_pixels=LIMIT, min_size=60)
    full = load_eval(data, max_pixels=LIMIT)
    assert small.shape == ((60, 80, 3) if orientation < 5 else (80, 60, 3))
    # A wrong orientation differs by 60 levels and more on average; two ways to shrink smooth waves by about one.
    assert np.abs(small.astype(int) - np.asarray(full.reduce(4)).astype(int)).mean() < 3


def test_orientation_is_found_behind_other_segments_and_fill_bytes():
    data = encoded(picture(), "JPEG", exif=exif(6))
    comment = b"\xff\xfe" + struct.pack(">H", 40_002) + b"Exif\0\0MM\0*" + bytes(39_990)
    assert decode(data[:2] + comment * 3 + b"\xff\xff" + data[2:], max_pixels=LIMIT).shape == (80, 60, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "letter"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_orientation_is_read_in_both_byte_orders_and_all_whole_numbers(order, kind, letter):
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IHHHI{letter}", 8, 1, 0x0112, kind, 1, 8)
    assert decode(encoded(picture(), "JPEG", exif=b"Exif\0\0" + block), max_pixels=LIMIT).shape == (80, 60, 3)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"rubbish",
        b"MM\0*",
        b"MM\0*\xff\xff\xff\xff",
        b"MM\0*" + struct.pack(">IH", 8, 9),
        b"MM\0*" + struct.pack(">IHHHIH", 8, 1, 0x0112, 3, 1, 9),
        b"MM\0*" + struct.pack(">IHHHIH", 8, 1, 0x0112, 2, 1, 6),
    ],
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_unreadable_exif_leaves_the_image_as_it_is(fmt, block):
    data = encoded(picture(), fmt, exif=b"Exif\0\0" + block)
    assert b"Exif" in data or b"eXIf" in data
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT), by_pillow(encoded(picture(), fmt)))


# ------------------------------------------------------------------------------------------------------ scaled decoding


@pytest.mark.parametrize(
    ("min_size", "shape"),
    [
        (None, (301, 403)),
        (302, (301, 403)),
        (151, (301, 403)),
        (150, (151, 202)),
        (76, (151, 202)),
        (75, (76, 101)),
        (37, (38, 51)),
        (1, (38, 51)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_decoded_at_the_smallest_power_of_two_that_keeps_min_size(mode, min_size, shape):
    data = encoded(picture(301, 403).convert(mode), "JPEG")
    assert decode(data, max_pixels=LIMIT, min_size=min_size).shape == (*shape, 3)


def test_only_jpegs_are_decoded_scaled():
    assert decode(encoded(picture(), "PNG"), max_pixels=LIMIT, min_size=10).shape == (60, 80, 3)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.5, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.4, 2.0)])
@pytest.mark.parametrize("margin", [1.0, 2.0])
def test_crops_of_a_scaled_image_keep_the_margin(scale, ratio, margin):
    augment = AugmentConfig(crop_scale=scale, crop_ratio=ratio, decode_margin=margin)
    shorter = min_decode_size(64, augment)
    for seed in range(300):
        longer = shorter + int(uniform(seed, 1) * shorter)
        box = crop_box(shorter, longer, augment, seed)
        assert min(box.height, box.width) >= margin * 64 - 1  # rounded twice: the least side, and the box


def test_default_margin_covers_twice_the_output():
    assert min_decode_size(224, AugmentConfig()) == 498  # 2 * 224 / 0.9, rounded up
    assert min_decode_size(224, AugmentConfig(crop_scale=(0.08, 1.0))) == 1829  # 2 * 224 / sqrt(0.08 * 3 / 4)


def test_margin_of_zero_decodes_in_full():
    assert min_decode_size(224, AugmentConfig(decode_margin=0)) is None


# ------------------------------------------------------------------------------------------------------ training crops


class Draws:
    """torchvision's draws replaced by ours: share, ratio, top, left per attempt."""

    def __init__(self, seed: int) -> None:
        self.seed, self.count = seed, 0

    def number(self) -> float:
        attempt, place = divmod(self.count, 4)
        self.count += 1
        return uniform(self.seed, module._CROP, attempt, place)

    def uniform(self, tensor: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        if self.count % 4 == 2:
            self.count += 2  # the last attempt was thrown away before it was placed
        return tensor.fill_(low + (high - low) * self.number())

    def randint(self, low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.full(size, low + int(self.number() * (high - low)))


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 480), (500, 500), (33, 31), (7, 5), (100, 900), (1, 1)]
)
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_boxes_equal_torchvisions_for_the_same_random_numbers(monkeypatch, height, width, scale):
    monkeypatch.setattr(torch, "empty", lambda *size: torch.zeros(*size, dtype=torch.float64))
    image = torch.zeros(3, height, width)
    augment = AugmentConfig(crop_scale=scale)
    for seed in range(40):
        draws = Draws(seed)
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *args, draws=draws: draws.uniform(self, *args))
        monkeypatch.setattr(torch, "randint", lambda low, high, size, draws=draws: draws.randint(low, high, size))
        expected = torchvision.transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        assert tuple(crop_box(height, width, augment, seed)) == tuple(expected)


@pytest.mark.parametrize(("height", "width"), [(1, 30_000), (30_000, 1), (40, 4000), (4000, 40), (50, 50)])
def test_a_shape_that_no_draw_fits_gets_torchvisions_central_box(height, width):
    tight = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.75, 0.76) if height == width else (3 / 4, 4 / 3))
    expected = torchvision.transforms.RandomResizedCrop.get_params(
        torch.zeros(1).expand(3, height, width), list(tight.crop_scale), list(tight.crop_ratio)
    )
    assert {tuple(crop_box(height, width, tight, seed)) for seed in range(10)} == {tuple(expected)}


def test_crop_is_the_box_resized_as_pillow_does():
    image = picture(300, 400)
    for seed in range(5):
        augment = AugmentConfig(crop_scale=(0.3, 1.0))
        top, left, height, width = crop_box(300, 400, augment, seed)
        box = (left, top, left + width, top + height)
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=box)).astype(int)
        crop = train_crop(np.asarray(image), 64, augment, seed)
        assert (crop.dtype, crop.shape, crop.is_contiguous()) == (torch.uint8, (3, 64, 64), True)
        # Pillow sees pixels beyond a box's edge, torch does not; elsewhere their fixed-point weights differ a little.
        difference = np.abs(crop.permute(1, 2, 0).numpy() - expected)[3:-3, 3:-3]
        assert difference.max() <= 3
        assert difference.mean() < 0.2


def test_crop_is_a_function_of_the_sample_seed():
    image = np.asarray(picture(90, 70))
    augment = AugmentConfig(crop_scale=(0.3, 1.0), flip=0.5)
    torch.manual_seed(0)
    crops = [train_crop(image, 16, augment, seed) for seed in range(20)]
    torch.manual_seed(1)
    assert all(torch.equal(crop, train_crop(image, 16, augment, seed)) for seed, crop in enumerate(crops))
    assert len({crop.numpy().tobytes() for crop in crops}) == 20


def test_flip_mirrors_the_same_crop_with_its_probability():
    image = np.asarray(picture(40, 40))
    plain, always, half = (AugmentConfig(flip=flip) for flip in (0.0, 1.0, 0.5))
    flipped = 0
    for seed in range(400):
        crop = train_crop(image, 8, plain, seed)
        mirrored = train_crop(image, 8, always, seed)
        assert torch.equal(mirrored, crop.flip(-1))
        assert mirrored.is_contiguous()
        flipped += torch.equal(train_crop(image, 8, half, seed), mirrored)
    assert 150 <= flipped <= 250  # five standard deviations around a half of 400


# ------------------------------------------------------------------------------------------------------ evaluation


def open_clip_square(image: Image.Image, size: int, mode: str) -> torch.Tensor:
    resize_mode = {"crop": "shortest", "squash": "squash"}[mode]
    transform = open_clip.transform.image_transform(
        size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize_mode
    )
    return (transform(image) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("size", [32, 37, 224])
@pytest.mark.parametrize(
    ("height", "width"),
    [(224, 224), (300, 400), (401, 301), (32, 37), (37, 33), (20, 27), (1, 1), (640, 33), (31, 997)],
)
def test_evaluation_square_equals_open_clips_pixel_by_pixel(mode, size, height, width):
    image = picture(height, width)
    square = eval_crop(image, size, mode)
    assert (square.dtype, square.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(square, open_clip_square(image, size, mode))


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_evaluation_of_a_jpeg_equals_open_clips_pixel_by_pixel(mode):
    data = encoded(picture(333, 517), "JPEG", quality=80)
    square = eval_crop(load_eval(data, max_pixels=LIMIT), 224, mode)
    assert torch.equal(square, open_clip_square(Image.open(io.BytesIO(data)), 224, mode))


def test_strip_loses_only_what_the_centre_crop_never_sees():
    # Just beyond the aspect at which ends are cut: 10 px of each go, which are 16 px resized, so the grids agree.
    image = picture(20, 1300)
    assert torch.equal(eval_crop(image, 32, "crop"), open_clip_square(image, 32, "crop"))
    upright = image.transpose(Image.Transpose.TRANSPOSE)
    assert torch.equal(eval_crop(upright, 32, "crop"), open_clip_square(upright, 32, "crop"))


def test_evaluation_takes_images_of_any_mode_upright():
    data = encoded(picture(48, 64).convert("P"), "PNG", exif=exif(6))
    expected = eval_crop(load_eval(data, max_pixels=LIMIT), 32, "crop")
    assert torch.equal(eval_crop(Image.open(io.BytesIO(data)), 32, "crop"), expected)
    with pytest.raises(BadImageError, match="unsupported_mode: the range of mode F"):
        eval_crop(Image.new("F", (8, 8)), 32, "crop")
