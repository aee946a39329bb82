"""`faultline mask --region`: boxes that stick out, PNGs of the image's size and of what the network sees, and from which channel they are read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jobs.region import region_of
from pipeline.errors import BadRequest
from pipeline.samples import Preprocessing, Sample

RESIZED = Preprocessing(resize=32, crop=24)  # an image of 40 x 80 becomes 32 x 64, of which the middle 24 x 24 is seen
PIXELS = np.zeros((24, 24, 3), np.uint8)
SAMPLE = Sample("a", 0, PIXELS, whole=(40, 80))


def png(tmp_path, array: np.ndarray, mode: str | None = None) -> str:
    path = tmp_path / "region.png"
    Image.fromarray(array, mode).save(path)
    return str(path)


def test_a_box_is_cut_to_the_image_and_that_is_told(capsys):
    found = region_of("-3,2,6,99", SAMPLE, RESIZED)
    expected = np.zeros((24, 24), bool)
    expected[2:, :6] = True
    assert (found == expected).all()
    assert "--region: '-3,2,6,99' lies partly outside the 24 x 24 pixels that the network sees, and is cut to 0,2,6,24" in capsys.readouterr().err
    assert region_of("1,2,6,9", SAMPLE, RESIZED).sum() == 35 and capsys.readouterr().err == ""


@pytest.mark.parametrize("text, says", [("30,30,40,40", "covers none of the 24 x 24 pixels"), ("-9,-9,0,5", "covers none"), ("0,0,24,24", "covers all"), ("-1,-1,99,99", "covers all"), ("5,5,5,9", "is no box: RIGHT must be above LEFT"), ("9,1,5,9", "is no box")])
def test_boxes_that_are_refused(text, says):
    with pytest.raises(BadRequest, match=f"^--region: '{text}' {says}"):
        region_of(text, SAMPLE, RESIZED)


def test_a_png_of_the_images_size_goes_where_the_images_pixels_go(tmp_path):
    """It is resized and cropped, not stretched: a region beside what is cropped away keeps its shape."""
    drawn = np.zeros((40, 80), np.uint8)
    drawn[10:20, 30:50] = 255
    found = region_of(png(tmp_path, drawn), SAMPLE, RESIZED)
    image = np.asarray(Image.fromarray(np.repeat(drawn[..., None], 3, 2)).resize((64, 32), Image.Resampling.NEAREST))[4:28, 20:44, 0] > 127
    assert found.shape == (24, 24) and (found == image).all() and found.any()
    photograph = Preprocessing(resize=32, crop=24).pixels(Image.fromarray(np.repeat(drawn[..., None], 3, 2)))[..., 0] > 127
    assert (found != photograph).mean() < 0.05, "as the pixels of a photograph of the region"


def test_a_png_of_what_the_network_sees_is_taken_as_it_is(tmp_path):
    drawn = np.zeros((24, 24), np.uint8)
    drawn[3:5, 7:20] = 200
    assert (region_of(png(tmp_path, drawn), SAMPLE, RESIZED) == (drawn > 127)).all()


def test_where_both_sizes_are_the_same_it_is_told_which_is_meant(tmp_path, capsys):
    drawn = np.zeros((24, 24), np.uint8)
    drawn[3:5, 7:20] = 200
    found = region_of(png(tmp_path, drawn), Sample("a", 0, PIXELS, whole=(24, 24)), RESIZED)
    assert not (found == (drawn > 127)).all() and "is taken to be drawn on the image, and resized and cropped as that is" in capsys.readouterr().err
    plain = region_of(png(tmp_path, drawn), Sample("a", 0, PIXELS, whole=(24, 24)), Preprocessing(resize=None, crop=None))
    assert (plain == (drawn > 127)).all() and capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(48, 48), (80, 40), (32, 64)])
def test_a_png_of_another_size_is_refused_with_all_sizes(tmp_path, shape):
    drawn = np.zeros(shape, np.uint8)
    drawn[:9, :9] = 255
    with pytest.raises(BadRequest, match=f"region.png is {shape[1]} x {shape[0]} pixels: give one of 80 x 40 pixels as the image, or 24 x 24 that the network sees"):
        region_of(png(tmp_path, drawn), SAMPLE, RESIZED)


@pytest.mark.parametrize("bits", [8, 16])
def test_brightness_decides_where_alpha_says_nothing(tmp_path, bits):
    """An editor saves RGBA whatever was drawn: opaque everywhere, it must not cover everything."""
    drawn = np.zeros((24, 24, 4), np.uint8)
    drawn[..., 3] = 255
    drawn[4:9, 5:10, :3] = 255
    array = drawn if bits == 8 else drawn[..., 0].astype(np.uint16) * 257
    found = region_of(png(tmp_path, array), SAMPLE, RESIZED)
    assert found[4:9, 5:10].all() and found.sum() == 25
    drawn[..., 3] = 0
    drawn[1:3, 1:4, 3] = 255
    assert region_of(png(tmp_path, drawn), SAMPLE, RESIZED).sum() == 6, "alpha, where it says something"


def test_the_refusal_says_which_channel_was_read(tmp_path):
    array = np.zeros((24, 24, 4), np.uint8)
    with pytest.raises(BadRequest, match="covers none of .* .read from its alpha channel, where that is above 127"):
        region_of(png(tmp_path, array), SAMPLE, RESIZED)
    array[..., 3] = 255
    with pytest.raises(BadRequest, match="covers none of .* .read from its brightness, where that is above 127, its alpha being opaque everywhere"):
        region_of(png(tmp_path, array), SAMPLE, RESIZED)
    with pytest.raises(BadRequest, match="covers all of .* .read from its brightness, where that is above 127.$"):
        region_of(png(tmp_path, np.full((24, 24), 255, np.uint8)), SAMPLE, RESIZED)


def test_what_is_no_png(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    for text in (str(tmp_path / "a.png"), "1,2,3", "1,2,3,x", ""):
        with pytest.raises(BadRequest, match="is neither LEFT,TOP,RIGHT,BOTTOM in pixels nor a PNG"):
            region_of(text, SAMPLE, RESIZED)
