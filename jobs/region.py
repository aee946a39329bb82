"""`faultline mask --region`: pixels of one's own in one image, as a box or as a PNG."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from jobs.progress import say
from pipeline.errors import BadRequest, printable
from pipeline.samples import Preprocessing, Sample

LARGEST = 2**26  # pixels of a PNG


def region_of(text: str, sample: Sample, preprocessing: Preprocessing) -> np.ndarray:
    """bool [H, W], of the pixels that the network sees, of `LEFT,TOP,RIGHT,BOTTOM` in these pixels, or of a PNG that is bright (or opaque) where the region is: of the image's own
    size, which is then resized and cropped as the image was, or of the size that the network sees.

    Says what was cut off a box, and which of the two sizes was meant where they are the same. Raises BadRequest for a region that is empty, everything, or beside the image,
    and for a PNG of another size.
    """
    shape = sample.pixels.shape[:2]
    numbers = text.split(",")
    if len(numbers) == 4 and all(_whole(part) for part in numbers):
        found, how = _box(text, *map(int, numbers), shape), ""
    else:
        found, how = _drawn(text, sample, preprocessing)
    if not found.any() or found.all():
        raise BadRequest(f"--region: '{printable(text)}' covers {'none' if not found.any() else 'all'} of the {shape[1]} x {shape[0]} pixels that the network sees{how}")
    return found


def _whole(text: str) -> bool:
    """Whether it is a whole number, with or without a minus."""
    digits = text.strip().removeprefix("-")
    return digits.isdecimal() and digits.isascii()


def _box(text: str, left: int, top: int, right: int, bottom: int, shape: tuple[int, int]) -> np.ndarray:
    """The part of a box that lies in the image."""
    if right <= left or bottom <= top:
        raise BadRequest(f"--region: '{printable(text)}' is no box: RIGHT must be above LEFT, and BOTTOM above TOP")
    inside = max(0, left), max(0, top), min(shape[1], right), min(shape[0], bottom)
    found = np.zeros(shape, bool)
    found[inside[1] : max(0, inside[3]), inside[0] : max(0, inside[2])] = True
    if found.any() and inside != (left, top, right, bottom):
        say(f"--region: '{printable(text)}' lies partly outside the {shape[1]} x {shape[0]} pixels that the network sees, and is cut to {','.join(map(str, inside))}")
    return found


def _drawn(text: str, sample: Sample, preprocessing: Preprocessing) -> tuple[np.ndarray, str]:
    """(the region of a PNG; which channel it was read from, for a refusal)."""
    try:
        with Image.open(text, formats=("PNG",)) as image:
            if image.width * image.height > LARGEST:
                raise BadRequest(f"--region: {printable(text)} has more than {LARGEST:,} pixels: give it as large as the image")
            image.load()
            channel, how = _channel(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise BadRequest(f"--region: '{printable(text)}' is neither LEFT,TOP,RIGHT,BOTTOM in pixels nor a PNG that can be read ({printable(fault)})") from None
    seen, size = sample.pixels.shape[1::-1], channel.size
    own = sample.whole[::-1] if sample.whole else seen
    if size == own:
        bright = channel.point(lambda value: 255 * (value > 127)).convert("RGB")
        found = replace(preprocessing, interpolation="nearest").pixels(bright)[..., 0] > 127
        if own == seen and not (found == (np.asarray(channel) > 127)).all():
            say(f"--region: the image is {own[0]} x {own[1]} pixels, and so is what the network sees of it; {printable(text)} is taken to be drawn on the image, and resized and cropped as that is")
    elif size == seen:
        found = np.asarray(channel) > 127
    else:
        sizes = f"{own[0]} x {own[1]} pixels as the image, or" if own != seen else "the"
        raise BadRequest(f"--region: {printable(text)} is {size[0]} x {size[1]} pixels: give one of {sizes} {seen[0]} x {seen[1]} that the network sees")
    return found, how


def _channel(image: Image.Image) -> tuple[Image.Image, str]:
    """(one channel, 8 bits, which says where the region is; its name in words). Alpha, unless that is the same everywhere and says nothing."""
    transparent = "A" in image.getbands() or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    if alpha is not None and alpha.getextrema() != (255, 255):
        return alpha, " (read from its alpha channel, where that is above 127)"
    note = ", its alpha being opaque everywhere" if transparent else ""
    if image.mode.startswith("I"):  # 16 bits, which convert("L") would clip
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)), " (read from its brightness, where that is above half)"
    return image.convert("RGB").convert("L"), f" (read from its brightness, where that is above 127{note})"
