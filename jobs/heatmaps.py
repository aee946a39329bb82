"""What in an image made its filters fail, as one picture: the image, the map, both; the filters, the profile, the neighbours. Draws what it is given and computes nothing."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from jobs.charts import STYLES
from jobs.figures import DPI, FAINT, GAP, HEADING, INK, LARGE, MARGIN, PAPER, QUERY, SMALL, TILE, Page, enlarge, lines_of, own_settings, save
from pipeline.errors import BadRequest, printable

COLOURS = "inferno"  # its brightness grows with its number, so that it is read in grey
LIST = 2.9  # inches, of the list of filters
PROFILE = 1.5  # inches, height of the profile
SHOWN = 10  # filters in the list
SIDE = 1.6  # inches, the longer side of an image on a sheet


def draw(path: Path, found: dict, pixels: np.ndarray, profile: list[tuple[str, np.ndarray]], neighbours: list[dict] | None, title: str) -> None:
    """Draw into `path`, a .png, .svg or .pdf.

    found: as `jobs.explain.explain` gives it; pixels: uint8 [H, W, 3], as the network sees them; profile: (layer, ŝ of its filters), shallow to deep;
    neighbours: dicts as `figures.gallery` takes them, or None where nobody could be asked. Raises BadRequest if the file cannot be written.
    """
    with own_settings():
        page = Page()
        width = MARGIN + 3 * (QUERY + GAP) + LIST + MARGIN
        pictures = _pictures(pixels, found["heat"])
        tall = max(p.shape[0] for p in pictures) / DPI
        own = page.caption(found | {"dataset": found["dataset"] or "file"}, QUERY, SMALL)
        top = MARGIN + lines_of(1, HEADING) + 0.16
        under = top + tall + 0.09 + max(lines_of(len(own), SMALL), lines_of(SHOWN + 3, SMALL) - tall, 0) + GAP
        foot = under + PROFILE + 0.55
        tiles = [(n, enlarge(n["thumbnail"], TILE), page.caption(n, TILE, SMALL)) for n in neighbours or []]
        tallest = max([TILE / 2, *(p.shape[0] / DPI for _, p, _ in tiles if p is not None)]) if tiles else 0
        bottom = foot + (lines_of(1, LARGE) + 0.08 + tallest + 0.07 + lines_of(1 + max(len(c) for _, _, c in tiles), SMALL) if tiles else 0)
        page.open(width, bottom + MARGIN)
        page.text(MARGIN, MARGIN, page.shorten(title, width - 2 * MARGIN, HEADING, "bold"), HEADING, weight="bold")
        for at, (picture, words) in enumerate(zip(pictures, ("what the network sees", f"input saliency of {_count(found['filters'])}", "both"))):
            x = MARGIN + at * (QUERY + GAP)
            page.image(x, top, QUERY, picture.shape[0] / DPI, picture, INK, 0.6, "solid")
            y = top + tall + 0.09
            for line, colour in own if not at else [(words, FAINT)]:
                y = page.text(x, y, line, SMALL, colour)
        _list(page, MARGIN + 3 * (QUERY + GAP), top, found)
        _profile(page, MARGIN, under, width, bottom + MARGIN, profile, found)
        if tiles:
            y = page.text(MARGIN, foot, f"The {len(tiles)} errors whose filters failed most alike", LARGE, INK, "bold") + 0.08
            for column, (neighbour, picture, caption) in enumerate(tiles):
                page.tile(MARGIN + column * (TILE + GAP), y, tallest, neighbour, picture, caption, column + 1)
        try:
            save(page.figure, path)
        except OSError as fault:
            raise BadRequest(f"--out: {printable(path)} cannot be written ({printable(fault)}): name a file in a folder that can be") from None


def sheet(path: Path, tiles: list[tuple[dict, np.ndarray, np.ndarray]], title: str) -> None:
    """Images and their maps in pairs, two pairs a line, into `path`.png and .svg. tiles: (sample_id, dataset, label_name ... as `figures.Page.caption` takes them, pixels
    uint8 [H, W, 3], heat 0..1 [H, W]). Raises BadRequest if a file cannot be written."""
    with own_settings():
        page, pair = Page(), 2 * SIDE + 0.06
        width = 2 * MARGIN + 2 * pair + 2 * GAP
        drawn = [(_pictures(pixels, heat, SIDE), page.caption(about | {"confidence": None}, pair, SMALL)) for about, pixels, heat in tiles]
        y, lines = MARGIN + lines_of(1, HEADING) + 0.16, []
        for line in (drawn[at : at + 2] for at in range(0, len(drawn), 2)):
            tall = max(pictures[0].shape[0] for pictures, _ in line) / DPI
            lines.append((y, tall, line))
            y += tall + 0.07 + lines_of(max(len(caption) for _, caption in line), SMALL) + GAP
        page.open(width, y - GAP + MARGIN)
        page.text(MARGIN, MARGIN, page.shorten(title, width - 2 * MARGIN, HEADING, "bold"), HEADING, weight="bold")
        for y, tall, line in lines:
            for column, (pictures, caption) in enumerate(line):
                x = MARGIN + column * (pair + 2 * GAP)
                for at, picture in enumerate((pictures[0], pictures[2])):
                    page.image(x + at * (SIDE + 0.06), y, SIDE, tall, picture, INK, 0.6, "solid")
                below = y + tall + 0.07
                for text, colour in caption:
                    below = page.text(x, below, text.replace(" (?)", ""), SMALL, colour)
        for suffix in (".png", ".svg"):
            try:
                save(page.figure, path.with_name(path.name + suffix))
            except OSError as fault:
                raise BadRequest(f"{printable(path)}{suffix} cannot be written ({printable(fault)}): put that right and give the same command again") from None


def _pictures(pixels: np.ndarray, heat: np.ndarray, side: float = QUERY) -> list[np.ndarray]:
    """The image, the map, and the map laid over the image in grey, uint8 [h, w, 3] each, the longer side `side` inches."""
    scale = side * DPI / max(heat.shape)
    size = tuple(max(1, round(n * scale)) for n in heat.shape[::-1])
    method = Image.Resampling.NEAREST if max(heat.shape) <= 48 else Image.Resampling.BILINEAR
    image = np.asarray(Image.fromarray(pixels).resize(size, method))
    grown = np.clip(np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, method)), 0, 1)
    coloured = (matplotlib.colormaps[COLOURS](grown)[..., :3] * 255).astype(np.uint8)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] * 0.85 + 38
    weight = 0.75 * np.sqrt(grown)[..., None]
    return [image, coloured, ((1 - weight) * grey + weight * coloured).astype(np.uint8)]


def _list(page: Page, x: float, y: float, found: dict) -> None:
    """The filters, most salient first, and how far they are from what is usual."""
    y = page.text(x, y, "filters, most salient first", SMALL, INK, "bold")
    right = x + LIST
    page.text(right, y, "standardised saliency", SMALL, FAINT, align="right")
    y = page.text(x, y, "layer : channel", SMALL, FAINT)
    for one in found["filters"][:SHOWN]:
        page.text(right, y, f"{one['standardised']:+.1f}", SMALL, INK, align="right")
        y = page.text(x, y, page.shorten(one["layer"], LIST - 1.1, SMALL) + f" : {one['filter']}", SMALL)
    if len(found["filters"]) > SHOWN:
        page.text(x, y, f"and {len(found['filters']) - SHOWN} more", SMALL, FAINT)


def _profile(page: Page, x: float, y: float, width: float, height: float, profile: list[tuple[str, np.ndarray]], found: dict) -> None:
    """ŝ of all filters, layers of equal width, filters in their order; the chosen ones marked."""
    axes = page.figure.add_axes(((x + 0.45) / width, 1 - (y + PROFILE) / height, (width - 2 * x - 0.45) / width, PROFILE / height))
    axes.set_facecolor(PAPER)
    colour, mark = STYLES[1][0], STYLES[0][0]
    places = {name: (at, len(values)) for at, (name, values) in enumerate(profile)}
    for at, (_, values) in enumerate(profile):
        axes.vlines(at + (np.arange(len(values)) + 0.5) / len(values), 0, values, color=colour, linewidth=0.4)
    across = [places[f["layer"]][0] + (f["filter"] + 0.5) / places[f["layer"]][1] for f in found["filters"]]
    axes.plot(across, [f["standardised"] for f in found["filters"]], linestyle="none", marker="v", markersize=4.5, color=mark)
    axes.axhline(0, color=FAINT, linewidth=0.5)
    axes.set_xlim(0, len(profile))
    axes.spines[["top", "right"]].set_visible(False)
    shown = np.unique(np.linspace(0, len(profile) - 1, min(6, len(profile))).round().astype(int))
    axes.set_xticks(shown + 0.5, [page.shorten(profile[at][0], 1.6, SMALL) for at in shown])
    axes.get_xticklabels()[-1].set_horizontalalignment("right" if len(shown) > 1 else "center")  # it ends at the page's edge
    axes.tick_params(labelsize=SMALL - 1, length=2)
    axes.set_ylabel("standardised saliency", fontsize=SMALL)
    for text in axes.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
        text.set_fontfamily(page.families)


def _count(filters: list[dict]) -> str:
    return "1 filter" if len(filters) == 1 else f"{len(filters)} filters"
