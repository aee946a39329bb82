"""The pictures of a run. Draws what it is given and computes nothing.

Texts and thumbnails come from strangers: a text is drawn as it is, without mathematics or TeX, with what the fonts lack or what could reorder
the line as its escape; a thumbnail that cannot be decoded becomes a tile that says so.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image

from pipeline.atomic import replace_file
from pipeline.errors import BadRequest, printable

DPI = 200
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # suffix -> metadata that keep the bytes reproducible
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "Noto Sans Arabic", "Noto Sans Devanagari")
INK, FAINT, PAPER, MISSING = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"

# Of a pair: its mark, its name, its colour and weight, and the frame of the image: width in points, dashes. In grey, mark and frame still tell.
PAIRS = {
    "same": ("=", "same", "#1b5e9e", "bold", 2.6, "solid"),
    "reverse": ("\u21c4", "reverse", "#b3470b", "bold", 2.6, (0, (2.2, 1.2))),
    "other": ("\u2260", "other", FAINT, "normal", 0.6, "solid"),
}

# Inches. At 200 dots each, both boxes are whole multiples of 32, so that the smallest thumbnails are enlarged evenly.
TILE, QUERY = 1.44, 2.24
GAP, MARGIN, CHANNEL = 0.2, 0.24, 0.36  # between tiles, around everything, between the query and the tiles
LEADING = 1.3  # line height in font sizes
SMALL, LARGE, HEADING = 8, 9.5, 13  # font sizes in points


def check_gallery(path: Path, option: str = "--gallery") -> None:
    """Raises BadRequest unless a picture can be drawn into a file of this name."""
    if path.suffix.lower() not in FORMATS:
        raise BadRequest(f"{option}: {printable(path)} does not end in {', '.join(FORMATS)}: the ending chooses the format, .png where in doubt")
    if path.is_dir():
        raise BadRequest(f"{option}: {printable(path)} is a folder: name a file in it, for example {printable(path / 'gallery.png')}")


def gallery(path: Path, query: dict, neighbours: list[dict], title: str) -> None:
    """Draw an image and its K >= 0 neighbours, best first, into `path`, a .png, .svg or .pdf; it appears whole or not at all.

    Each dict has sample_id, dataset, label, prediction, label_name and prediction_name (None: the number is shown), confidence,
    and thumbnail (JPEG bytes); a neighbour also has similarity and pair (`same`, `reverse` or `other`).
    Raises BadRequest for another ending, or if the file cannot be written.
    """
    path = Path(path)
    check_gallery(path)
    with own_settings():
        figure = _gallery(query, neighbours, title)
        try:
            save(figure, path)
        except OSError as fault:
            raise BadRequest(f"--gallery: {printable(path)} cannot be written ({printable(fault)}): name a file in a folder that can be") from None


@contextmanager
def own_settings() -> Iterator[None]:
    """matplotlib as it comes: a user's own settings must not reach text.usetex, nor the layout; and texts of strangers are no formulas."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "gallery", "image.composite_image": False, "pdf.fonttype": 42, "text.parse_math": False})
        yield


def save(figure: Figure, path: Path) -> None:
    """Into a file of one of `FORMATS`, with the same bytes every time, whole or not at all. Raises OSError."""
    suffix = path.suffix.lower()
    replace_file(path, lambda partial: figure.savefig(partial, format=suffix[1:], dpi=DPI, metadata=FORMATS[suffix]))


def _gallery(query: dict, neighbours: list[dict], title: str) -> Figure:
    columns = _columns(len(neighbours))
    page = Page()
    left, right, top = MARGIN, MARGIN + QUERY + CHANNEL, MARGIN + lines_of(1, HEADING) + 0.16
    own, legend = page.caption(query, QUERY, LARGE), _legend(page, query, neighbours)
    own_image = enlarge(query["thumbnail"], QUERY)
    bottom = top + height_of(own_image) + 0.09 + lines_of(len(own), LARGE) + sum(lines_of(len(lines), SMALL) + 0.05 for _, lines in legend) + (0.15 if legend else 0)

    rows, y = [], top  # (top, height of its tallest image, [(neighbour, its image, its caption)])
    for first in range(0, len(neighbours), columns):
        row = [(n, enlarge(n["thumbnail"], TILE), page.caption(n, TILE, SMALL)) for n in neighbours[first : first + columns]]
        tallest = max(height_of(pixels) for _, pixels, _ in row)
        rows.append((y, tallest, row))
        y += tallest + 0.07 + lines_of(1 + max(len(lines) for _, _, lines in row), SMALL) + GAP
    bottom = max(bottom, y - GAP)
    width = right + columns * (TILE + GAP) - GAP + MARGIN
    page.open(width, bottom + MARGIN)

    page.text(left, MARGIN, page.shorten(title, width - 2 * MARGIN, HEADING, "bold"), HEADING, weight="bold")
    page.image(left, top, QUERY, height_of(own_image), own_image, INK, 0.6, "solid")
    y = top + height_of(own_image) + 0.09
    for line, colour in own:
        y = page.text(left, y, line, LARGE, colour)
    y += 0.2
    for pair, lines in legend:
        mark, _, colour, weight, _, _ = PAIRS[pair]
        page.text(left, y, mark, SMALL, colour, weight)
        for i, line in enumerate(lines):
            y = page.text(left + 0.17, y, line, SMALL, INK if i else colour, "normal" if i else weight)
        y += 0.05

    if not neighbours:
        page.text(right, top, "no neighbours", SMALL, FAINT)
    rank = 0
    for y, tallest, row in rows:
        for column, (neighbour, pixels, lines) in enumerate(row):
            rank += 1
            page.tile(right + column * (TILE + GAP), y, tallest, neighbour, pixels, lines, rank)
    return page.figure


def _columns(neighbours: int) -> int:
    """Tiles in a row: at most 5 for a page of two rows, 10 for more than thirty."""
    return min(max(neighbours, 1), 5 if neighbours <= 10 else 7 if neighbours <= 28 else 10)


def _legend(page: Page, query: dict, neighbours: list[dict]) -> list[tuple[str, list[str]]]:
    """(pair, lines) of the pairs that occur: how many, and what the pair is."""
    counts = {pair: sum(PAIRS.get(n["pair"], PAIRS["other"]) is PAIRS[pair] for n in neighbours) for pair in PAIRS}
    label, prediction = _name(query, "label"), _name(query, "prediction")
    meaning = {"same": (label, prediction), "reverse": (prediction, label)}
    room, legend = QUERY - 0.17, []
    for pair in (p for p, count in counts.items() if count):
        lines = [f"{pair}: {counts[pair]} of {len(neighbours)}"]
        if pair in meaning:
            true, predicted = meaning[pair]
            lines += [page.shorten(true, room, SMALL, before="true "), page.shorten(predicted, room, SMALL, before="predicted ")]
        legend.append((pair, lines))
    return legend


class Page:
    """A figure measured in inches from its top left corner, and the texts that fit into it."""

    def __init__(self):
        known = set(font_manager.get_font_names())
        self.families = [name for name in FONTS if name in known]
        self.fonts: dict[tuple[float, str], FontProperties] = {}
        self.glyphs: dict[str, set[int]] = {}
        self.figure = Figure(dpi=DPI, facecolor=PAPER)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def open(self, width: float, height: float) -> None:
        """Fix the size, in whole pixels. Measuring works before, drawing after."""
        width, height = (round(inches * DPI) / DPI for inches in (width, height))
        self.figure.set_size_inches(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self.axes.set_autoscale_on(False)

    # ---- text ----------------------------------------------------------------------------------------------------

    def safe(self, text: object, weight: str = "normal") -> str:
        """One line that every font here can draw: control and right-to-left characters, and those without a glyph, as their escapes."""
        if weight not in self.glyphs:
            fonts = (font_manager.get_font(font_manager.findfont(FontProperties(family=family, weight=weight))) for family in self.families)
            self.glyphs[weight] = {code for font in fonts for code in font.get_charmap()}
        drawn = self.glyphs[weight]
        return "".join(c if ord(c) in drawn and unicodedata.bidirectional(c) not in ("R", "AL") else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in printable(text))

    def font(self, size: float, weight: str) -> FontProperties:
        return self.fonts.setdefault((size, weight), FontProperties(family=self.families, size=size, weight=weight))

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Inches."""
        return self.renderer.get_text_width_height_descent(text, self.font(size, weight), ismath=False)[0] / DPI

    def wrap(self, text: str, room: float, size: float, weight: str, most: int) -> list[str] | None:
        """At most `most` lines, broken after spaces, `_` and `-`, or None if that is not enough."""
        lines = [""]
        for word in re.findall(r"[^ _-]*[ _-]*", text):
            if self.width((lines[-1] + word).rstrip(), size, weight) <= room:
                lines[-1] += word
            elif lines[-1] and len(lines) < most and self.width(word.rstrip(), size, weight) <= room:
                lines.append(word)
            else:
                return None
        return [line.rstrip() for line in lines]

    def fit(self, text: object, room: float, size: float, weight: str = "normal", before: str = "", after: str = "", most: int = 1) -> list[str]:
        """`before`, `text`, `after` in at most `most` lines of `room` inches; of `text` as much as fits, shortened in the middle."""
        text = self.safe(str(text)[:2000], weight)
        if lines := self.wrap(before + text + after, room, size, weight, most) if len(text) <= 400 else None:
            return lines
        low, high = 0, min(len(text), 400)  # of `low` characters it is known that they fit
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.wrap(before + _middle(text, middle) + after, room, size, weight, most) else (low, middle)
        return self.wrap(before + _middle(text, low) + after, room, size, weight, most) or [_middle(text, 0)]

    def shorten(self, text: object, room: float, size: float, weight: str = "normal", before: str = "") -> str:
        """`before` and as much of `text` as one line of `room` inches holds."""
        return self.fit(text, room, size, weight, before)[0]

    def caption(self, image: dict, room: float, size: float) -> list[tuple[str, str]]:
        """(line, colour) of what is said under an image: where it is from, true and predicted class, each class in at most two lines."""
        own = [(self.shorten(image["sample_id"], room, size, before=self.shorten(image["dataset"], room / 3, size) + ":"), FAINT)]
        true = self.fit(_name(image, "label"), room, size, before="true ", after=",", most=2)
        predicted = self.fit(_name(image, "prediction"), room, size, before="predicted ", after=f" ({_number(image['confidence'], 2)})", most=2)
        return own + [(line, INK) for line in true + predicted]

    def text(self, x: float, y: float, text: str, size: float, colour: str = INK, weight: str = "normal", align: str = "left") -> float:
        """One line with its top at y; returns the top of the next."""
        line = lines_of(1, size)
        baseline = y + 0.76 * line
        self.axes.text(x, baseline, text, color=colour, fontproperties=self.font(size, weight), ha=align, va="baseline", parse_math=False, usetex=False)
        return y + line

    # ---- images --------------------------------------------------------------------------------------------------

    def tile(self, x: float, y: float, height: float, neighbour: dict, pixels: np.ndarray | None, lines: list[tuple[str, str]], rank: int) -> None:
        """A neighbour: its image in a box of that height, its pair marked by frame, sign and word, then similarity and caption."""
        mark, name, colour, weight, thick, dashes = PAIRS.get(neighbour["pair"], PAIRS["other"])
        self.image(x, y, TILE, height, pixels, colour, thick, dashes)
        y += height + 0.07
        self.text(x + TILE, y, f"{mark} {name}", SMALL, colour, weight, "right")
        self.text(x, y, f"{rank}", SMALL, FAINT)
        y = self.text(x + self.width(f"{rank}  ", SMALL), y, _number(neighbour["similarity"], 3), SMALL, weight="bold")
        for line, tint in lines:
            y = self.text(x, y, line, SMALL, tint)

    def image(self, x: float, y: float, width: float, height: float, pixels: np.ndarray | None, colour: str, thick: float, dashes) -> None:
        """An image in the middle of a box at (x, y), and a frame around the image; a grey tile where there is none."""
        if pixels is None:
            y, width, height = y + (height - TILE) / 2, TILE, TILE
            self.axes.add_patch(Rectangle((x, y), width, height, facecolor=MISSING, edgecolor="none"))
            for i, line in enumerate(("this image", "cannot be shown")):
                self.text(x + width / 2, y + height / 2 + lines_of(i - 1, SMALL), line, SMALL, INK, align="center")
        else:
            tall, wide = (n / DPI for n in pixels.shape[:2])
            x, y = (round(v * DPI) / DPI for v in (x + (width - wide) / 2, y + (height - tall) / 2))
            width, height = wide, tall
            self.axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="none", aspect="auto")
        out = thick / 72 / 2 - 1 / DPI  # the frame covers the outermost pixel: no paper shows between them
        self.axes.add_patch(Rectangle((x - out, y - out), width + 2 * out, height + 2 * out, fill=False, edgecolor=colour, linewidth=thick, linestyle=dashes, joinstyle="miter"))


def lines_of(count: int, size: float) -> float:
    """Inches that so many lines of text take."""
    return count * size * LEADING / 72


def _middle(text: str, keep: int) -> str:
    """`keep` characters of a text, from both ends, with an ellipsis between."""
    head = keep // 2
    return text[:head] + "\u2026" + text[len(text) - (keep - head) :]


def _name(image: dict, which: str) -> str:
    name = image[f"{which}_name"]
    return str(image[which] if name is None else name)


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def height_of(pixels: np.ndarray | None) -> float:
    """Inches of an enlarged image; a missing one is as tall as a tile."""
    return TILE if pixels is None else pixels.shape[0] / DPI


def enlarge(encoded: bytes, side: float) -> np.ndarray | None:
    """uint8 [H, W, 3] whose longer side is `side` inches, or None if it is no JPEG. Up to 48 pixels stay visible as squares, more are interpolated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as file:
                image = file.convert("RGB")
    except Exception:  # PIL's decoders raise almost anything on a damaged file
        return None
    scale = side * DPI / max(image.size)
    method = Image.Resampling.NEAREST if max(image.size) <= 48 else Image.Resampling.LANCZOS
    return np.asarray(image.resize(tuple(max(1, round(n * scale)) for n in image.size), method))
