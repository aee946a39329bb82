"""A contact sheet: images that ask, one below the other, each with its neighbours beside it. Draws what it is given and computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.figures import CHANNEL, FAINT, GAP, HEADING, INK, MARGIN, SMALL, TILE, Page, enlarge, height_of, lines_of, own_settings, save
from pipeline.errors import BadRequest, printable


@dataclass(frozen=True)
class Strip:
    """One line of a sheet. query and neighbours: dicts as `figures.gallery` takes them; heading: how these neighbours were found, or nothing."""

    query: dict
    neighbours: list[dict]
    heading: str = ""


def draw(path: Path, strips: list[Strip], title: str) -> None:
    """Draw into `path`.png and .svg. Raises BadRequest if a file cannot be written."""
    with own_settings():
        page = Page()
        most = max(1, *(len(strip.neighbours) for strip in strips))
        right = MARGIN + TILE + CHANNEL
        width = right + most * (TILE + GAP) - GAP + MARGIN
        y, lines = MARGIN + lines_of(1, HEADING) + 0.16, []
        for strip in strips:
            own = page.caption(strip.query, TILE, SMALL)
            tiles = [(n, enlarge(n["thumbnail"], TILE), page.caption(n, TILE, SMALL)) for n in strip.neighbours]
            picture = enlarge(strip.query["thumbnail"], TILE)
            tallest = max([height_of(picture), *(height_of(pixels) for _, pixels, _ in tiles)])
            top = y + (lines_of(1, SMALL) + 0.05 if strip.heading else 0)
            lines.append((strip, y, top, tallest, picture, own, tiles))
            y = top + tallest + 0.07 + lines_of(1 + max([len(own), *(len(caption) for _, _, caption in tiles)]), SMALL) + GAP
        page.open(width, y - GAP + MARGIN)
        page.text(MARGIN, MARGIN, page.shorten(title, width - 2 * MARGIN, HEADING, "bold"), HEADING, weight="bold")
        for strip, y, top, tallest, picture, own, tiles in lines:
            if strip.heading:
                page.text(right, y, page.shorten(strip.heading, width - right - MARGIN, SMALL, "bold"), SMALL, INK, "bold")
            page.image(MARGIN, top, TILE, tallest, picture, INK, 0.6, "solid")
            y = top + tallest + 0.07
            for line, colour in own:
                y = page.text(MARGIN, y, line, SMALL, colour)
            for column, (neighbour, pixels, caption) in enumerate(tiles):
                page.tile(right + column * (TILE + GAP), top, tallest, neighbour, pixels, caption, column + 1)
            if not tiles:
                page.text(right, top, "no neighbours", SMALL, FAINT)
        for suffix in (".png", ".svg"):
            try:
                save(page.figure, path.with_name(path.name + suffix))
            except OSError as fault:
                raise BadRequest(f"{printable(path)}{suffix} cannot be written ({printable(fault)}): put that right and give the same command again") from None
