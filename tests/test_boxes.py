"""ImageNet's annotation files, made here, for none of the real ones is at hand: where the object is not, as the network sees the image; and what is no annotation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from pipeline import boxes
from pipeline.errors import BadRequest
from pipeline.samples import PRESETS, Preprocessing
from pipeline.wnids import IDS

WHOLE = Preprocessing(resize=None, crop=None)


def xml(objects: list[tuple], width: object = 500, height: object = 375, extra: str = "") -> str:
    """As ImageNet writes them: name and box of each object."""
    inside = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    return f"<annotation>\n\t<folder>val</folder><filename>x</filename><source><database>ILSVRC_2012</database></source><size><width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>0</segmented>{extra}{inside}</annotation>\n"


def read(tmp_path, text: str | bytes) -> boxes.Annotation:
    path = tmp_path / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return boxes.read(path)


def covered(annotation, label, classes, preprocessing, shape, whole=None) -> np.ndarray:
    try:
        return ~boxes.outside(annotation, label, classes, preprocessing, shape, whole or shape)
    except boxes.Unusable as fault:
        assert fault.reason == "its boxes cover all that the network sees"
        return np.ones(shape, bool)


def test_several_objects_and_boxes_of_other_classes(tmp_path):
    annotation = read(tmp_path, xml([(IDS[3], 0, 0, 50, 75), (IDS[3], 250, 300, 500, 375), (IDS[4], 100, 0, 500, 100)]))
    found = covered(annotation, 3, 1000, WHOLE, (375, 500))
    expected = np.zeros((375, 500), bool)
    expected[:75, :50] = expected[300:, 250:] = True
    assert (found == expected).all()
    every = covered(annotation, 3, 10, WHOLE, (375, 500))  # of other classes than ImageNet's the names say nothing
    expected[:100, 100:] = True
    assert (every == expected).all()
    with pytest.raises(boxes.Unusable, match=f"no box of its class .{IDS[9]}"):
        boxes.outside(annotation, 9, 1000, WHOLE, (375, 500), (375, 500))


@pytest.mark.parametrize("box, expected", [((40, 60, 20, 30), (20, 30, 40, 60)), ((40, 30, 20, 60), (20, 30, 40, 60)), ((7, 9, 7, 9), (7, 9, 8, 10)), ((20, 30, 20, 60), (20, 30, 21, 60))])
def test_swapped_and_degenerate_boxes(tmp_path, box, expected):
    """Corners in any order; a box of no width is one pixel wide."""
    found = covered(read(tmp_path, xml([(IDS[0], *box)], 100, 100)), 0, 1000, WHOLE, (100, 100))
    x1, y1, x2, y2 = expected
    assert found[y1:y2, x1:x2].all() and found.sum() == (y2 - y1) * (x2 - x1)


def test_coordinates_are_relative_to_the_sizes_of_the_file(tmp_path):
    """An image at half the size that the annotation states."""
    found = covered(read(tmp_path, xml([(IDS[0], 100, 200, 300, 375)])), 0, 1000, WHOLE, (188, 250))
    assert found[101:187, 51:149].all() and not found[:99].any() and not found[:, :50].any() and not found[:, 150:].any()


@given(st.integers(230, 700), st.integers(230, 700), st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)), st.sampled_from([PRESETS["imagenet"], Preprocessing(resize=256, crop=None), Preprocessing(resize=None, crop=300), Preprocessing(resize=64, crop=80)]), st.data())
def test_boxes_go_where_the_pixels_go(width, height, stated, preprocessing, data):
    """A white box on a black image, prepared as for the network: what is white is covered, and hardly more, whatever size and shape the annotation states."""
    x1, y1 = data.draw(st.integers(0, width - 40)), data.draw(st.integers(0, height - 40))
    x2, y2 = data.draw(st.integers(x1 + 30, width)), data.draw(st.integers(y1 + 30, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    pixels = preprocessing.pixels(Image.fromarray(image))[..., 0]
    across, down = stated
    annotation = boxes.Annotation(width * across, height * down, ((IDS[0], x1 * across + 1e-6, y1 * down + 1e-6, x2 * across - 1e-6, y2 * down - 1e-6),))
    found = covered(annotation, 0, 1000, preprocessing, pixels.shape, (height, width))
    bright = pixels > 127
    assert not (bright & ~found).any()
    grown = np.zeros(found.shape, bool)
    rows, columns = np.where(bright.any(1))[0], np.where(bright.any(0))[0]
    if len(rows):
        grown[max(0, rows[0] - 2) : rows[-1] + 3, max(0, columns[0] - 2) : columns[-1] + 3] = True
        assert not (found & ~grown).any()


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>'


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no XML"),
        ("<annotation><size>", "no XML"),
        ("\x00\x01", "no XML"),
        (BOMB + "<annotation>&y;</annotation>", "a DTD, which is not read"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "a DTD"),
        ("<annotation/>", "states no size"),
        (xml([(IDS[0], 1, 1, 9, 9)], 0, 375), "states no size"),
        (xml([]), "no object with a box"),
        (xml([(IDS[0], 1, 1, 9, "nine")]), "no number where there should be one .'nine'"),
        (xml([(IDS[0], 1, 1, 9, "inf")]), "no number where there should be one .'inf'"),
        (xml([(IDS[0], 1, 1, 9, 9)], extra="<object><name>x</name></object>"), "an object without a name or a whole box"),
    ],
)
def test_what_is_no_annotation(tmp_path, text, reason):
    with pytest.raises(boxes.Unusable, match=reason):
        read(tmp_path, text)


def test_an_annotation_is_found_by_the_name_of_its_image(tmp_path):
    for name in ("val/ILSVRC2012_val_00000293.xml", "val/n01440764/b.XML"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = boxes.find(tmp_path)
    for sample in ("ILSVRC2012_val_00000293", "val/ILSVRC2012_val_00000293", "n01440764/ILSVRC2012_val_00000293", "ILSVRC2012_val_00000293_n01440764"):
        assert boxes.annotation_of(sample, files) == tmp_path / "val/ILSVRC2012_val_00000293.xml"
    assert boxes.annotation_of("n01440764/b", files) and boxes.annotation_of("ILSVRC2012_val_00000294", files) is None
    (tmp_path / "other").mkdir()
    with pytest.raises(BadRequest, match="^--boxes: there is no .xml below .*other; give the folder of the annotations"):
        boxes.find(tmp_path / "other")


def test_boxes_that_leave_nothing_and_reasons_that_many_share(tmp_path):
    with pytest.raises(boxes.Unusable, match="^its boxes cover all that the network sees$"):
        boxes.outside(read(tmp_path, xml([(IDS[0], 0, 0, 500, 375)])), 0, 1000, PRESETS["imagenet"], (224, 224), (375, 500))
    reasons = set()
    for text in ("<a", "<b><c/>"):
        with pytest.raises(boxes.Unusable) as fault:
            read(tmp_path, text)
        reasons.add(fault.value.reason)
    assert reasons == {"its annotation is no XML"}
