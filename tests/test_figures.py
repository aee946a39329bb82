"""The gallery: it opens, it differs where its input differs, and no text or thumbnail of a stranger breaks it."""

import io
import os
import stat
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from jobs import figures
from pipeline.errors import BadRequest

HOSTILE = [
    "$x^2$ and $\\frac{1}{",
    "two\nlines\ttab\x1b[31m\x00",
    "right \u202e to left \u05d0\u05d1 \u0627\u0644",
    "\u732b \U0001f600 \u0915\u094d\u0937 e\u0301\u0301\u0301",
    "\ud800 lone",
    "<svg onload='x'>&amp;\"",
    "n" * 5000,
    "a b " * 2000,
    "_" * 300,
    "",
    " ",
]


def jpeg(width=32, height=32, seed=0):
    out = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def image(i=0, **changes):
    own = dict(sample_id=f"cat_{i:04d}", dataset="val", similarity=0.9 - i / 100, label=3, prediction=5, label_name="cat", prediction_name="dog")
    return own | dict(confidence=0.75, pair=("same", "reverse", "other")[i % 3], thumbnail=jpeg(seed=i)) | changes


def draw(path, query=None, neighbours=None, title="title"):
    """The drawn file as bytes; a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.gallery(path, image() if query is None else query, [image(i) for i in range(3)] if neighbours is None else neighbours, title)
    return path.read_bytes()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


@pytest.fixture
def drawn(monkeypatch):
    """Every text given to the page, as (x, y, text, size, weight, align), and the page."""
    seen = []
    text = figures.Page.text

    def spy(page, x, y, line, size, colour=figures.INK, weight="normal", align="left"):
        seen.append((page, x, y, line, size, weight, align))
        return text(page, x, y, line, size, colour, weight, align)

    monkeypatch.setattr(figures.Page, "text", spy)
    return seen


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_ending_chooses_the_format_and_the_bytes_are_reproducible(tmp_path, suffix, magic):
    first = draw(tmp_path / f"a{suffix}")
    assert first.startswith(magic) and first == draw(tmp_path / f"b{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


@pytest.mark.parametrize("name", ["a.jpg", "a", ".png", "a.png.gz", "png"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(BadRequest, match=r"--gallery: .* does not end in \.png, \.svg, \.pdf"):
        figures.gallery(tmp_path / name, image(), [], "title")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadRequest, match="--gallery: .*folder.png is a folder"):
        draw(tmp_path / "folder.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadRequest, match="--gallery: .* cannot be written"):
        draw(tmp_path / "file" / "a.png")
    (tmp_path / "whole.png").write_bytes(b"old")
    with pytest.raises(KeyError):
        figures.gallery(tmp_path / "whole.png", {}, [], "title")
    assert (tmp_path / "whole.png").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png", "whole.png"]


@pytest.mark.parametrize("count", [0, 1, 2, 6, 10, 50])
def test_texts_lie_in_the_page_and_apart(tmp_path, drawn, count):
    names = ["dog", "American_Staffordshire_terrier", "a name of many short words, longer than two lines can hold", "x" * 90]
    neighbours = [image(i, label_name=names[i % 4], prediction_name=names[(i // 2) % 4], sample_id="ILSVRC2012_val_00000293" * (1 + i % 3), thumbnail=jpeg(128, 30 + i)) for i in range(count)]
    picture = pixels(draw(tmp_path / "a.png", neighbours=neighbours, title="A title that is long, " * 12))
    height, width = (n / figures.DPI for n in picture.shape[:2])
    boxes = []
    for page, x, y, line, size, weight, align in drawn:
        if line.strip():
            wide = page.width(line, size, weight)
            left = x - {"left": 0, "right": wide, "center": wide / 2}[align]
            boxes.append((left, y, left + wide, y + figures.lines_of(1, size), line))
    assert all(a >= 0.2 and c <= width - 0.2 and b >= 0.2 and d <= height - 0.2 for a, b, c, d, _ in boxes)
    for i, (a, b, c, d, one) in enumerate(boxes):
        for e, f, g, h, two in boxes[:i]:
            assert not (a < g and e < c and b < h - 1e-6 and f < d - 1e-6), (one, two)
    edge = round(0.15 * figures.DPI)
    frame = np.ones(picture.shape[:2], bool)
    frame[edge:-edge, edge:-edge] = False
    assert (picture[frame] == 255).all()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_hostile_texts_are_drawn_as_text(tmp_path, drawn, text, suffix):
    stranger = dict(sample_id=text, dataset=text, label_name=text, prediction_name=text)
    draw(tmp_path / f"a{suffix}", image(**stranger), [image(i, **stranger) for i in range(2)], text)
    lines = [line for _, _, _, line, *_ in drawn]
    assert not {c for line in lines for c in line} & set("\n\t\x1b\x00\u202e\u05d0\u0627")


def test_a_text_is_never_read_as_mathematics_or_tex(tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight"}):
        plain = draw(tmp_path / "a.png", title="$x$")
        assert matplotlib.rcParams["text.usetex"]
    assert plain == draw(tmp_path / "b.png", title="$x$")
    assert plain != draw(tmp_path / "c.png", title="x")


def test_what_is_said_of_an_image(tmp_path, drawn):
    query = image(sample_id="q", label_name=None, prediction_name=None)
    draw(tmp_path / "a.png", query, [image(0, dataset="v2", similarity=0.12345), image(1, similarity=-0.5, confidence=None)])
    lines = [line for _, _, _, line, *_ in drawn]
    for expected in ("val:q", "true 3,", "predicted 5 (0.75)", "v2:cat_0000", "0.123", "-0.500", "true cat,", "predicted dog (?)", "= same", "\u21c4 reverse", "same: 1 of 2", "reverse: 1 of 2"):
        assert expected in lines


def test_a_long_id_keeps_both_ends(tmp_path, drawn):
    draw(tmp_path / "a.png", neighbours=[image(sample_id="begin" + "m" * 400 + "end")])
    assert any(line.startswith("val:begin") and line.endswith("end") and "\u2026" in line for _, _, _, line, *_ in drawn)


def test_different_inputs_give_different_pictures(tmp_path):
    base = [image(i) for i in range(3)]
    changes = [dict(pair="other"), dict(similarity=0.1), dict(sample_id="x"), dict(dataset="v2"), dict(label_name="fox"), dict(prediction_name="fox"), dict(confidence=0.1), dict(thumbnail=jpeg(seed=9))]
    pictures = [draw(tmp_path / "a.png", neighbours=[image(0, **change), *base[1:]]) for change in [{}, *changes]]
    pictures += [draw(tmp_path / "a.png", image(7), base), draw(tmp_path / "a.png", neighbours=base[::-1]), draw(tmp_path / "a.png", title="other")]
    assert len(set(pictures)) == len(pictures)


def test_the_pair_is_told_without_colour(tmp_path):
    grey = {pair: np.asarray(Image.open(io.BytesIO(draw(tmp_path / "a.png", neighbours=[image(pair=pair)]))).convert("L")).astype(int) for pair in figures.PAIRS}
    right = round((figures.MARGIN + figures.QUERY + figures.CHANNEL) * figures.DPI) - 4  # the left edge of the tile's frame
    top = round((figures.MARGIN + figures.lines_of(1, figures.HEADING) + 0.16) * figures.DPI)
    dark = {pair: (g[top : top + 280, right - 2 : right + 3].min(1) < 140).mean() for pair, g in grey.items()}
    assert dark["same"] > 0.95 and 0.3 < dark["reverse"] < 0.85 and dark["other"] < 0.05


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (128, 96), (1, 1), (128, 1), (1, 128)])
def test_thumbnails_of_any_shape_fill_their_box(size):
    enlarged = figures.enlarge(jpeg(*size), figures.TILE)
    assert enlarged.dtype == np.uint8 and max(enlarged.shape[:2]) == round(figures.TILE * figures.DPI) and min(enlarged.shape) >= 1


def test_tiny_images_keep_their_pixels_and_larger_ones_are_smooth():
    tiny, larger = (figures.enlarge(jpeg(n, n, seed=3), figures.TILE) for n in (32, 96))
    assert (tiny.reshape(32, 9, 32, 9, 3) == tiny[::9, ::9][:, None, :, None]).all()
    assert not (larger.reshape(96, 3, 96, 3, 3) == larger[::3, ::3][:, None, :, None]).all()


def bomb():
    """A JPEG whose header claims 60,000 x 60,000 pixels."""
    content = jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + (60000).to_bytes(2, "big") * 2 + content[at + 4 :]


def postscript():
    """An image for which PIL would start another program."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("broken", [b"", b"no image", jpeg()[:300], None, bomb(), postscript()], ids=["empty", "text", "truncated", "none", "bomb", "postscript"])
def test_a_broken_thumbnail_becomes_a_tile_that_says_so(tmp_path, drawn, broken):
    draw(tmp_path / "a.png", image(thumbnail=broken), [image(0, thumbnail=broken), image(1, thumbnail=jpeg(128, 20))])
    assert [line for _, _, _, line, *_ in drawn].count("cannot be shown") == 2


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_others_may_read_the_file_as_the_umask_allows(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_drawing_leaves_no_global_state(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}  # asking for the backend imports pyplot
    before = settings()
    draw(tmp_path / "a.png")
    assert settings() == before
    assert "matplotlib.pyplot" not in sys.modules
