"""Encoded bytes -> pixels that a network takes, and a thumbnail; what cannot be read comes back with its reason.

PIL alone does the work, exactly as torchvision's `convert("RGB")`, resize and centre crop do on PIL images (a test holds
it against them), so that a decode worker loads neither torch nor torchvision. Pixels stay uint8 until they are on the
device; `Preprocessing.normalise` ends the recipe there.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import BadRequest, printable
from pipeline.sources import RawSample

MOST_EXIF = 256  # of an image: PIL joins them in time that grows by their square, 18 s for 1,000
THUMBNAIL = 128  # longest side, pixels
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # not all of PIL's: for some (EPS) it starts another program
INTERPOLATIONS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize`, centre crop to `crop` (None: leave as it is), / 255, then (x - mean) / std per channel."""

    resize: int | None = 256
    crop: int | None = 224
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def parse(cls, text: str, base: Preprocessing | None) -> Preprocessing:
        """`imagenet`, `cifar` or nothing, then `key=value` parts: `resize=256,crop=224,mean=0.5/0.5/0.5,interpolation=bicubic`.

        `base` is what a model brings along; parts change it. Raises BadRequest naming the part.
        """
        settings = base or cls()
        for part in filter(None, text.split(",")):
            key, equals, value = part.strip().partition("=")
            try:
                if not equals:
                    settings = PRESETS[key]
                elif key in ("resize", "crop"):
                    size = None if value == "none" else int(value)
                    if size is not None and not 1 <= size <= 8192:
                        raise ValueError
                    settings = replace(settings, **{key: size})
                elif key in ("mean", "std"):
                    numbers = tuple(float(v) for v in value.split("/"))
                    if len(numbers) != 3 or not np.isfinite(numbers).all() or (key == "std" and min(numbers) <= 0):
                        raise ValueError
                    settings = replace(settings, **{key: numbers})
                elif key == "interpolation":
                    settings = replace(settings, interpolation=INTERPOLATIONS[value] and value)
                else:
                    raise KeyError
            except (KeyError, ValueError):
                raise BadRequest(
                    f"--preprocess: '{printable(part)}' is not understood; write imagenet, cifar, or parts such as resize=256,crop=224,"
                    f"interpolation={'|'.join(INTERPOLATIONS)},mean=0.5/0.5/0.5,std=0.5/0.5/0.5 (resize and crop may be none)"
                ) from None
        return settings

    def to_json(self) -> dict:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, settings: dict) -> Preprocessing:
        return cls(**settings | {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])})

    def pixels(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> uint8 [H, W, 3]. Raises DecompressionBombError for a sliver that resizing would blow up beyond all bounds."""
        if self.resize is not None:
            width, height = image.size
            short, long = sorted((width, height))
            size = self.resize, int(self.resize * long / short)
            if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if short != self.resize:
                image = image.resize(size if width <= height else size[::-1], INTERPOLATIONS[self.interpolation])
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels if self.crop is None else _centre_crop(pixels, self.crop)

    def normalise(self, pixels):
        """torch uint8 [B, H, W, 3] -> float32 [B, 3, H, W], on the device that holds it."""
        import torch

        images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
        mean, std = (torch.tensor(v, dtype=images.dtype).view(1, 3, 1, 1).to(images.device, non_blocking=True) for v in (self.mean, self.std))  # a GPU is not waited for
        return images.sub_(mean).div_(std)


PRESETS = {
    "imagenet": Preprocessing(),
    "cifar": Preprocessing(resize=None, crop=None),
    "pytorch-cifar": Preprocessing(resize=None, crop=None, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),  # kuangliu's, with whose recipe the wide ResNets are trained
}


def _centre_crop(pixels: np.ndarray, crop: int) -> np.ndarray:
    """As torchvision's: black borders where the image is smaller, offsets rounded half to even."""
    short = [max(0, crop - side) for side in pixels.shape[:2]]
    if any(short):
        pixels = np.pad(pixels, [(s // 2, (s + 1) // 2) for s in short] + [(0, 0)])
    top, left = (int(round((side - crop) / 2)) for side in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


@dataclass(frozen=True)
class Sample:
    """A sample ready for the network, or set aside: then `reason` says why and the rest is empty.

    pixels: uint8 [H, W, 3]; thumbnail: JPEG bytes of the whole image, longest side at most 128; whole: its height and width before it was resized and cropped, where that is known.
    """

    sample_id: str
    label: int = -1
    pixels: np.ndarray | None = None
    thumbnail: bytes = b""
    reason: str | None = None
    whole: tuple[int, int] | None = None


def decode(raw: RawSample, preprocessing: Preprocessing, classes: int) -> Sample:
    """One raw sample decoded. Nothing about an image or a label raises: it comes back as the sample's `reason`. Raises MemoryError where this machine is to blame."""
    size = (0, 0)
    if raw.fault:
        return Sample(raw.sample_id, reason=raw.fault)
    if not 0 <= raw.label < classes:
        shown = str(raw.label) if abs(raw.label) < 10**20 else f"of {len(str(abs(raw.label)))} digits"
        return Sample(raw.sample_id, reason=f"label {shown} is outside the network's classes 0..{classes - 1}")
    if not raw.image:
        return Sample(raw.sample_id, reason="the image is empty (0 bytes)")
    if raw.image.count(b"Exif\0\0") > MOST_EXIF:
        return Sample(raw.sample_id, reason=f"more than {MOST_EXIF} stretches of EXIF are in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(io.BytesIO(raw.image), formats=FORMATS) as image:
                if image.mode == "F":  # convert would clip them: of floats from 0 to 1 all is black
                    return Sample(raw.sample_id, reason="its pixels are floats (PIL's mode F): save it as 8 bits a colour")
                size = image.size
                image = image.convert("RGB")
        pixels = preprocessing.pixels(image)
        return Sample(raw.sample_id, raw.label, pixels, _thumbnail(image), whole=image.size[::-1])
    except UnidentifiedImageError:
        return Sample(raw.sample_id, reason="not an image in a format that is known here")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return Sample(raw.sample_id, reason="the image claims more pixels than are safe to unpack")
    except Exception as fault:  # PIL's decoders raise almost anything on a damaged file
        if (isinstance(fault, MemoryError) or "out of memory" in str(fault)) and not _have_memory(size):
            raise MemoryError(f"too little memory to decode {printable(raw.sample_id)} ({size[0]} x {size[1]})") from None
        return Sample(raw.sample_id, reason=f"the image cannot be decoded: {printable(fault)[:200] or type(fault).__name__}")


def _have_memory(size: tuple[int, int]) -> bool:
    """Whether an honest image of this width and height could be decoded now."""
    try:
        np.empty(64 * 1024**2 + 8 * size[0] * size[1], np.uint8)
    except MemoryError:
        return False
    return True


def _thumbnail(image: Image.Image) -> bytes:
    if max(image.size) > THUMBNAIL:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
