"""Images that are damaged, of another format than they say, of another kind than a photograph, or made to do harm: bytes, and what becomes of each."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import shards
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """content: the bytes; reason: a part of why it is set aside, empty if it is profiled; same: bytes of a plain image whose pixels it must then have, and with them its prediction."""

    id: str
    content: bytes
    reason: str = ""
    same: bytes = b""


def jpeg(image: Image.Image, **options) -> bytes:
    return shards.encoded(image, "JPEG", quality=95, **options)


def png(image: Image.Image, **options) -> bytes:
    return shards.encoded(image, "PNG", **options)


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) if checksum is None else checksum)


def raw_png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, pixels: bytes | None = None) -> bytes:
    """A PNG from its parts; without `pixels` black ones, as many as it claims."""
    data = zlib.compress(bytes(height * (1 + 3 * width))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + b"".join(chunks) + (chunk(b"IDAT", data) if data else b"") + chunk(b"IEND", b"")


def huge_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    content = bytearray(PHOTO)
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def frames(format: str) -> bytes:
    """Two frames, of which the first counts."""
    return shards.encoded(BASE, format, save_all=True, append_images=[BASE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)], **({"lossless": True} if format == "WEBP" else {}))


def rotated() -> bytes:
    """Turned by its EXIF, which training pipelines leave unread."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(BASE, exif=exif)


def pixels(mode: str) -> Image.Image:
    return shards.picture(3, mode=mode)


BASE = shards.picture(3)
PHOTO, DRAWING = jpeg(BASE), png(BASE)
GREY, WHITE = png(BASE.convert("L").convert("RGB")), png(Image.new("RGB", (12, 10), "white"))
UNKNOWN, SAFE, CUT = "not an image in a format that is known here", "more pixels than are safe to unpack", "the image cannot be decoded: "
DAMAGED = [
    Picture("empty", b"", "the image is empty (0 bytes)"),
    Picture("one byte", PHOTO[:1], UNKNOWN),
    Picture("JPEG of 300 EXIF segments", PHOTO[:2] + (b"\xff\xe1\xff\xffExif\0\0" + b"x" * 65527) * 300 + PHOTO[2:], "more than 256 stretches of EXIF are in it"),
    Picture("JPEG of 300 EXIF segments after fill bytes", PHOTO[:2] + b"\xff" + (b"\xff\xe1\x00\x08Exif\0\0") * 300 + PHOTO[2:], "more than 256 stretches of EXIF are in it"),
    Picture("JPEG of 20 EXIF segments", PHOTO[:2] + (b"\xff\xe1\x00\x08Exif\0\0") * 20 + PHOTO[2:], same=PHOTO),
    Picture("JPEG's first bytes", PHOTO[:3], UNKNOWN),
    Picture("JPEG cut in its tables", PHOTO[:150], CUT),
    Picture("JPEG cut after its header", PHOTO[: PHOTO.index(b"\xff\xda")], CUT),
    Picture("JPEG cut in half", PHOTO[: len(PHOTO) // 2 + 200], CUT),
    Picture("JPEG without its end", PHOTO[:-20], CUT),
    Picture("JPEG of zeros", bytes(len(PHOTO)), UNKNOWN),
    Picture("JPEG with zeros before it", b"\0" * 16 + PHOTO, UNKNOWN),
    Picture("JPEG with more after its end", PHOTO + b"more" * 1000, same=PHOTO),
    Picture("JPEG with tables that are garbage", PHOTO[:30] + b"\xaa" * 200 + PHOTO[230:], UNKNOWN),
    Picture("PNG's first bytes", DRAWING[:8], UNKNOWN),
    Picture("PNG cut in its header", DRAWING[:20], CUT),
    Picture("PNG cut after its header", DRAWING[:33], UNKNOWN),
    Picture("PNG cut in half", DRAWING[: len(DRAWING) // 2], CUT),
    Picture("PNG with a wrong checksum", DRAWING.replace(b"IEND\xaeB`\x82", b"IEND\xaeB`\x83").replace(DRAWING[29:33], b"\0\0\0\0"), UNKNOWN),
    Picture("PNG whose pixels are garbage", raw_png(12, 10, pixels=b"garbage" * 30), CUT),
    Picture("PNG with too few pixels", raw_png(12, 10, pixels=zlib.compress(bytes(100))), CUT),
    Picture("PNG without pixels", raw_png(12, 10, pixels=b""), CUT),
    Picture("PNG without width", raw_png(0, 10, pixels=zlib.compress(b"")), UNKNOWN),
    Picture("PNG of depth 3", raw_png(12, 10, depth=3), UNKNOWN),
    Picture("GIF cut", shards.encoded(BASE, "GIF")[:-40], CUT),
    Picture("WebP cut", shards.encoded(BASE, "WEBP")[:60], CUT),
    Picture("TIFF cut", shards.encoded(BASE, "TIFF")[:200], CUT),
    Picture("BMP cut", shards.encoded(BASE, "BMP")[:100], CUT),
    Picture("PPM of a million digits", b"P6\n" + b"1" * 1_000_000, CUT),
    Picture("PPM with too few pixels", b"P6 12 10 255\n" + bytes(20), CUT),
]
def as_pil(content: bytes) -> bytes:
    """What torchvision makes of it: PIL's own conversion, which clips what is beyond 8 bits."""
    return png(Image.open(io.BytesIO(content)).convert("RGB"))


SIXTEEN = png(Image.fromarray(np.asarray(pixels("L"), np.uint16) * 257))
FORMATS = [
    Picture("PNG", DRAWING, same=DRAWING),
    Picture("BMP", shards.encoded(BASE, "BMP"), same=DRAWING),
    Picture("TIFF", shards.encoded(BASE, "TIFF"), same=DRAWING),
    Picture("WebP", shards.encoded(BASE, "WEBP", lossless=True), same=DRAWING),
    Picture("PPM", shards.encoded(BASE, "PPM"), same=DRAWING),
    Picture("TIFF of two pages", frames("TIFF"), same=DRAWING),
    Picture("animated WebP", frames("WEBP"), same=DRAWING),
    Picture("animated PNG", frames("PNG"), same=DRAWING),
    Picture("animated GIF", frames("GIF"), same=png(Image.open(io.BytesIO(frames("GIF"))).convert("RGB"))),
    Picture("JPEG that is progressive", jpeg(BASE, progressive=True), same=PHOTO),
    Picture("JPEG turned by EXIF", rotated(), same=PHOTO),
    Picture("JPEG with EXIF that is garbage", PHOTO[:2] + b"\xff\xe1\x00\x20Exif\0\0" + b"\xff" * 24 + PHOTO[2:], same=PHOTO),
    Picture("JPEG with a profile that is garbage", jpeg(BASE, icc_profile=b"garbage" * 50), same=PHOTO),
    Picture("JPEG in CMYK", jpeg(BASE.convert("CMYK")), same=png(Image.open(io.BytesIO(jpeg(BASE.convert("CMYK")))).convert("RGB"))),
    Picture("JPEG in grey", jpeg(BASE.convert("L")), same=png(Image.open(io.BytesIO(jpeg(BASE.convert("L")))).convert("RGB"))),
    Picture("PNG in grey", png(pixels("L")), same=GREY),
    Picture("PNG in grey with transparency", png(pixels("LA")), same=GREY),
    Picture("PNG in black and white", png(pixels("1")), same=png(pixels("1").convert("RGB"))),
    Picture("PNG with transparency", png(pixels("RGBA")), same=DRAWING),
    Picture("PNG of a palette", png(pixels("P")), same=png(pixels("P").convert("RGB"))),
    Picture("PNG of a palette with transparency", png(pixels("P"), transparency=0), same=png(pixels("P").convert("RGB"))),
    Picture("PNG of a palette without one", raw_png(12, 10, colour=3, pixels=zlib.compress(bytes(10 * 13))), same=raw_png(12, 10)),
    Picture("PNG of 16 bits in grey", SIXTEEN, same=as_pil(SIXTEEN)),
    Picture("PNG of 16 bits in colour", raw_png(12, 10, depth=16, pixels=zlib.compress(b"".join(b"\0" + row.repeat(2).tobytes() for row in np.asarray(BASE).reshape(10, 36)))), same=DRAWING),
    Picture("TIFF of 32 bits", shards.encoded(pixels("I"), "TIFF"), same=as_pil(shards.encoded(pixels("I"), "TIFF"))),
    Picture("TIFF of floats", shards.encoded(pixels("F"), "TIFF"), "its pixels are floats (PIL's mode F): save it as 8 bits"),
    Picture("1 x 1", png(BASE.crop((0, 0, 1, 1))), "the network fails on it: "),
    Picture("1 x 500", png(BASE.resize((1, 500))), "the network fails on it: "),
]
HOSTILE = [
    Picture("PNG of 20,000 x 20,000", raw_png(20_000, 20_000, pixels=zlib.compress(bytes(100_000))), SAFE),
    Picture("PNG of 65,000 x 65,000 without pixels", raw_png(65_000, 65_000, pixels=b""), SAFE),
    Picture("PNG of 2 to the 31st", raw_png(2**31 - 1, 2**31 - 1, pixels=b""), SAFE),
    Picture("PNG of 9,000 x 9,000 without pixels", raw_png(9_000, 9_000, pixels=b""), CUT),
    Picture("JPEG of 65,000 x 65,000", huge_jpeg(65_000, 65_000), SAFE),
    Picture("JPEG of no height", huge_jpeg(12, 0), UNKNOWN),
    Picture("GIF of 60,000 x 60,000", b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0,\0\0\0\0" + struct.pack("<HH", 60_000, 60_000) + b"\0\x02\x01\0\0;", SAFE),
    Picture("BMP of 60,000 x 60,000", shards.encoded(BASE, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + shards.encoded(BASE, "BMP")[26:], SAFE),
    Picture("WebP of garbage", b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f" + bytes(100), CUT),
    Picture("TIFF whose directory is itself", b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x0c\0\0\0\x08\0\0\0", UNKNOWN),
    Picture("PNG with text that unpacks without end", raw_png(12, 10, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000), 9))), CUT),
    Picture("PNG with many texts", raw_png(12, 10, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9))] * 70), CUT),
    Picture("PNG with a profile that unpacks without end", raw_png(12, 10, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(80_000_000), 9))), CUT),
    Picture("PNG with pixels that unpack without end", raw_png(12, 10, pixels=zlib.compress(bytes(200_000_000), 9)), same=raw_png(12, 10)),
    Picture("PNG with a chunk beyond its end", raw_png(12, 10)[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(50), CUT),
    Picture("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>1</script></svg>', UNKNOWN),
    Picture("HTML", b"<!DOCTYPE html><html><title>404 Not Found</title></html>", UNKNOWN),
    Picture("text", "keine Ahnung\n".encode() * 9, UNKNOWN),
    Picture("a pointer of git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n", UNKNOWN),
    Picture("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 10\n(%pipe%touch /tmp/ran) (w) file\n%%EOF\n", UNKNOWN),
    Picture("PDF", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", UNKNOWN),
    Picture("an icon", b"\0\0\x01\0\x01\0" + bytes(100), UNKNOWN),
    Picture("PSD", b"8BPS\0\x01" + bytes(100), UNKNOWN),
    Picture("gzip of a PNG", __import__("gzip").compress(DRAWING), UNKNOWN),
    Picture("a pickle", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.", UNKNOWN),
    Picture("video", b"\0\0\0\x20ftypisom" + bytes(100), UNKNOWN),
]
PICTURES = [*DAMAGED, *FORMATS, *HOSTILE]
