"""Pixels are torchvision's, bit for bit; what cannot be read comes back with its reason and never raises."""

import io
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import shards
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms._presets import ImageClassification

from pipeline.errors import BadRequest
from pipeline.samples import INTERPOLATIONS, PRESETS, THUMBNAIL, Preprocessing, decode
from pipeline.sources import RawSample

SMALL = Preprocessing(resize=20, crop=16)


def torchvision_pixels(image: bytes, recipe: Preprocessing) -> np.ndarray:
    """uint8 [H, W, 3] by torchvision's own steps on the PIL image."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    if recipe.resize is not None:
        picture = TF.resize(picture, [recipe.resize], InterpolationMode(recipe.interpolation), antialias=True)
    if recipe.crop is not None:
        picture = TF.center_crop(picture, [recipe.crop])
    return TF.pil_to_tensor(picture).permute(1, 2, 0).numpy()


def decoded(image: bytes, recipe: Preprocessing = SMALL, label: int = 0, classes: int = 10):
    return decode(RawSample("x", image, label), recipe, classes)


# ---- pixels --------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 70)


@given(width=SIZES, height=SIZES, resize=st.one_of(st.none(), st.integers(1, 40)), crop=st.one_of(st.none(), st.integers(1, 48)), how=st.sampled_from(sorted(INTERPOLATIONS)))
def test_pixels_are_torchvisions(width, height, resize, crop, how):
    """For any size, odd ones and such as are smaller than the crop among them, and any recipe."""
    recipe = Preprocessing(resize, crop, how)
    image = shards.encoded(shards.picture(width * 71 + height, (width, height)), "PNG")
    got = decoded(image, recipe)
    assert got.reason is None and got.pixels.dtype == np.uint8
    np.testing.assert_array_equal(got.pixels, torchvision_pixels(image, recipe))


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return shards.encoded(shards.picture(1, (40, 25)), "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    return shards.encoded(Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 50).reshape(30, 40)), "PNG")


def transparent_palette() -> bytes:
    return shards.encoded(shards.picture(2, (40, 30)).quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def rgba() -> bytes:
    image = shards.picture(3, (40, 30), "RGBA")
    image.putalpha(shards.picture(4, (40, 30), "L"))
    return shards.encoded(image, "PNG")


KINDS = {
    "grey": lambda: shards.encoded(shards.picture(1, (40, 30), "L")),
    "grey with alpha": lambda: shards.encoded(shards.picture(1, (40, 30), "LA"), "PNG"),
    "CMYK": lambda: shards.encoded(shards.picture(1, (40, 30), "CMYK")),
    "YCbCr": lambda: shards.encoded(shards.picture(1, (40, 30), "YCbCr")),
    "palette": lambda: shards.encoded(shards.picture(1, (40, 30), "P"), "PNG"),
    "palette with transparency": transparent_palette,
    "one bit": lambda: shards.encoded(shards.picture(1, (40, 30), "1"), "PNG"),
    "RGBA": rgba,
    "16-bit PNG": sixteen_bit,
    "rotated by EXIF": exif_rotated,
    "progressive": lambda: shards.encoded(shards.picture(1, (40, 30)), "JPEG", progressive=True),
    "WebP": lambda: shards.encoded(shards.picture(1, (40, 30)), "WEBP"),
    "BMP": lambda: shards.encoded(shards.picture(1, (40, 30)), "BMP"),
    "TIFF": lambda: shards.encoded(shards.picture(1, (40, 30)), "TIFF"),
    "PPM": lambda: shards.encoded(shards.picture(1, (40, 30)), "PPM"),
    "several in one JPEG": lambda: shards.encoded(shards.picture(1, (40, 30)), "MPO", save_all=True, append_images=[shards.picture(2, (40, 30))]),
    "GIF of two frames": lambda: shards.encoded(shards.picture(1, (40, 30)), "GIF", save_all=True, append_images=[shards.picture(2, (40, 30))]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_torchvisions(kind):
    """PNG among them under the name .jpg, since the bytes alone decide; EXIF turns nothing, as in torchvision's path."""
    image = KINDS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = torchvision_pixels(image, SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decoded(image)
    assert got.reason is None
    np.testing.assert_array_equal(got.pixels, truth)


def test_normalised_is_torchvisions_whole_recipe():
    """A batch of uint8 [B, H, W, 3] ends as the very floats of `ImageClassification`, and stays itself."""
    images = [shards.encoded(shards.picture(seed, (40, 30)), "PNG") for seed in range(3)]
    for recipe in (SMALL, Preprocessing(18, 17, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))):
        truth = ImageClassification(crop_size=recipe.crop, resize_size=recipe.resize, mean=recipe.mean, std=recipe.std, interpolation=InterpolationMode(recipe.interpolation))
        pixels = torch.from_numpy(np.stack([decoded(image, recipe).pixels for image in images]))
        before = pixels.clone()
        got = recipe.normalise(pixels)
        assert got.dtype == torch.float32 and torch.equal(pixels, before)
        for row, image in zip(got, images):
            assert torch.equal(row, truth(Image.open(io.BytesIO(image)).convert("RGB")))


# ---- set aside -----------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of this size."""
    image = bytearray(shards.encoded(Image.new("L", (8, 8)), "PNG"))
    image[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    image[29:33] = PngImagePlugin._crc32(bytes(image[12:29])).to_bytes(4, "big")
    return bytes(image)


BROKEN = {
    "zero bytes": (b"", "the image is empty (0 bytes)"),
    "text": (b"<html>404 Not Found</html>", "not an image in a format that is known here"),
    "PostScript, a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a format that is known here"),
    "truncated JPEG": (shards.photo(0, (200, 200))[:-300], "cannot be decoded: image file is truncated"),
    "truncated PNG": (shards.encoded(shards.picture(0, (64, 64)), "PNG")[:200], "cannot be decoded"),
    "JPEG header alone": (shards.photo()[:20], "not an image|cannot be decoded"),
    "decompression bomb": (bomb(60_000, 60_000), "the image claims more pixels than are safe to unpack"),
    "half a bomb": (bomb(10_000, 10_000), "the image claims more pixels than are safe to unpack"),
    "PNG without size": (bomb(0, 0), "not an image|cannot be decoded"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_has_a_reason(kind):
    image, reason = BROKEN[kind]
    got = decoded(image)
    assert any(part in got.reason for part in reason.split("|")), got.reason
    assert (got.sample_id, got.pixels, got.thumbnail) == ("x", None, b"") and "\n" not in got.reason


def test_memory_that_runs_out_is_not_the_images_fault():
    """The same image, in a process that may have a few MB more and in one that may have enough."""
    code = (
        "import resource; from pipeline.samples import decode, Preprocessing; from pipeline.sources import RawSample; image = open(%r, 'rb').read()\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + %d * 2**20,) * 2)\n"
        "try: print(decode(RawSample('large', image, 0), Preprocessing(), 10).reason)\n"
        "except MemoryError as fault: print('not decoded:', fault)"
    )
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.new("RGB", (4000, 4000)).save(file.name)
        said = [subprocess.run([sys.executable, "-c", code % (file.name, room)], capture_output=True, text=True, check=True).stdout for room in (16, 1024)]
    assert said == ["not decoded: too little memory to decode large (4000 x 4000)\n", "None\n"]


def test_sliver_is_not_blown_up():
    """1 x 30,000 pixels are no bomb, but scaled to a shorter side of 256 they would be 2 billion."""
    got = decoded(shards.encoded(Image.new("RGB", (30_000, 1)), "PNG"), Preprocessing())
    assert got.reason == "the image claims more pixels than are safe to unpack"


@pytest.mark.parametrize("label, shown", [(-1, "-1"), (10, "10"), (10**60, "of 61 digits")])
def test_label_out_of_range_is_set_aside(label, shown):
    assert decoded(shards.photo(), label=label).reason == f"label {shown} is outside the network's classes 0..9"
    assert decoded(shards.photo(), label=9).reason is None


def test_fault_of_the_source_is_the_reason():
    assert decode(RawSample("x", fault="no label"), SMALL, 10).reason == "no label"


@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400), png=st.booleans())
def test_no_damage_raises(position, value, cut, png):
    """A flipped byte and a cut anywhere: pixels or a reason, one of the two."""
    image = bytearray(shards.encoded(shards.picture(0, (24, 18)), "PNG" if png else "JPEG"))
    image[position % len(image)] = value
    got = decoded(bytes(image[: len(image) - cut % len(image)]))
    assert (got.pixels is None) == (got.reason is not None) == (got.thumbnail == b"")


# ---- thumbnails ----------------------------------------------------------------------------------------------------


@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_thumbnail_is_a_small_jpeg_of_the_whole_image(width, height):
    """Longest side at most 128, shape kept, small images as they are; the crop takes nothing from it."""
    got = decoded(shards.encoded(shards.picture(0, (width, height)), "PNG"))
    small = Image.open(io.BytesIO(got.thumbnail))
    assert small.format == "JPEG" and small.mode == "RGB"
    longest = max(width, height)
    expected = (width, height) if longest <= THUMBNAIL else tuple(max(1, side * THUMBNAIL / longest) for side in (width, height))
    assert max(small.size) <= THUMBNAIL and max(abs(a - b) for a, b in zip(small.size, expected)) <= 1


def test_thumbnail_shows_the_image():
    image = shards.picture(5, (64, 48))
    small = np.asarray(Image.open(io.BytesIO(decoded(shards.encoded(image, "PNG")).thumbnail)), dtype=float)
    assert np.abs(small - np.asarray(image, dtype=float)).mean() < 6


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", SMALL),
        ("imagenet", Preprocessing()),
        ("cifar", Preprocessing(resize=None, crop=None)),
        ("pytorch-cifar,resize=40", Preprocessing(resize=40, crop=None, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))),
        ("resize=30", Preprocessing(30, 16)),
        ("resize=none,crop=none", Preprocessing(None, None)),
        ("imagenet, crop=288 ,", Preprocessing(256, 288)),
        ("mean=0.5/0.25/0,std=1/2/0.5", Preprocessing(20, 16, mean=(0.5, 0.25, 0.0), std=(1.0, 2.0, 0.5))),
        ("interpolation=bicubic", Preprocessing(20, 16, "bicubic")),
    ],
)
def test_recipe_is_understood(text, expected):
    """Parts change what a model brings along, and a preset begins anew."""
    assert Preprocessing.parse(text, SMALL) == expected
    assert Preprocessing.from_json(expected.to_json()) == expected


BAD_PARTS = ["imagnet", "resize=0", "resize=-1", "resize=9000", "resize=big", "crop=", "crop=1.5", "mean=0.5", "mean=a/b/c", "mean=nan/0/0", "std=0/1/1", "std=-1/1/1"]
BAD_PARTS += ["interpolation=cubic", "size=3", "=", "std=inf/1/1"]


@pytest.mark.parametrize("part", BAD_PARTS)
def test_bad_part_is_named(part):
    with pytest.raises(BadRequest, match="^--preprocess: '") as fault:
        Preprocessing.parse(f"imagenet,{part}", None)
    assert f"'{part}' is not understood" in str(fault.value) and "resize=256,crop=224" in str(fault.value)


def test_presets_are_those_of_the_field():
    assert PRESETS["imagenet"].to_json() == {"resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert PRESETS["cifar"].resize is PRESETS["cifar"].crop is None
