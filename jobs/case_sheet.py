"""A masked image as one picture: what was masked, what the network then thinks, what becomes of the filters that failed, and the region pasted elsewhere. Draws what it is given and computes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from jobs.charts import STYLES
from jobs.figures import DPI, FAINT, GAP, HEADING, INK, LARGE, MARGIN, PAPER, SMALL, Page, lines_of, own_settings, save
from pipeline.errors import BadRequest, printable

SIDE = 1.72  # inches, the longer side of a picture
CHART = 1.7  # inches, height of the two charts
HOSTS = 6  # pasted images that are drawn, at most


def draw(path: Path, found: dict, pictures: list[np.ndarray], hosts: list[np.ndarray]) -> None:
    """Draw into `path`, a .png, .svg or .pdf.

    found: as `jobs.case_study.study` gives it; pictures: uint8 [H, W, 3] of each step; hosts: of each image that was pasted into. Raises BadRequest if the file
    cannot be written.
    """
    with own_settings():
        page, steps = Page(), found["steps"]
        tiles, shown = [_grown(p) for p in pictures], [_grown(p) for p in hosts[:HOSTS]]
        true, wrong = (str(found[f"{key}_name"] or found[key]) for key in ("label", "wrong"))
        captions = [_caption(page, step) for step in steps]
        tall = max(t.shape[0] for t in tiles) / DPI
        width = 2 * MARGIN + max(len(tiles), 5, len(shown)) * (SIDE + GAP) - GAP
        top = MARGIN + lines_of(1, HEADING) + 0.16
        charts = top + tall + 0.08 + lines_of(max(map(len, captions)), SMALL) + 0.42
        foot = charts + CHART + 0.5
        bottom = foot + (lines_of(1, LARGE) + 0.08 + max(t.shape[0] for t in shown) / DPI + 0.08 + lines_of(2, SMALL) if shown else 0)
        page.open(width, bottom + MARGIN)
        verb = "was taken for" if steps[0]["prediction"] != found["label"] else "is told from"
        page.text(MARGIN, MARGIN, page.shorten(f"What is left of it when pixels are masked: {true}, which {verb} {wrong}", width - 2 * MARGIN, HEADING, "bold"), HEADING, weight="bold")
        for at, (tile, caption) in enumerate(zip(tiles, captions)):
            x = MARGIN + at * (SIDE + GAP)
            page.image(x, top, SIDE, tall, tile, INK, 0.6, "solid")
            y = top + tall + 0.08
            for line, colour, weight in caption:
                y = page.text(x, y, line, SMALL, colour, weight)
        half = (width - 2 * MARGIN - 0.9) / 2
        _bars(page, MARGIN + 0.35, charts, half - 0.35, width, bottom + MARGIN, "confidence", {f"true: {true}": [s["true_confidence"] for s in steps], f"wrong: {wrong}": [s["wrong_confidence"] for s in steps]}, steps)
        _bars(page, MARGIN + half + 0.9, charts, half, width, bottom + MARGIN, "mean standardised saliency", {f"the {len(found['filters'])} filters of the image as it is": [s["filters_standardised"] for s in steps], "all live filters": [s["all_standardised"] for s in steps]}, steps)
        if shown:
            _hosts(page, found["transplant"], shown, foot, width, wrong)
        try:
            save(page.figure, path)
        except OSError as fault:
            raise BadRequest(f"--out: {printable(path)} cannot be written ({printable(fault)}): name a file in a folder that can be") from None


def _caption(page: Page, step: dict) -> list[tuple[str, str, str]]:
    """(line, colour, weight) under a picture."""
    prediction = step["prediction_name"] if step["prediction_name"] is not None else step["prediction"]
    lines = page.fit(step["what"], SIDE, SMALL, "bold", most=2)
    return [(line, INK, "bold") for line in lines] + [(line, FAINT, "normal") for line in page.fit(prediction, SIDE, SMALL, before="predicted ", most=2)]


def _grown(pixels: np.ndarray) -> np.ndarray:
    """The longer side SIDE inches; up to 48 pixels stay visible as squares."""
    scale = SIDE * DPI / max(pixels.shape[:2])
    method = Image.Resampling.NEAREST if max(pixels.shape[:2]) <= 48 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(tuple(max(1, round(n * scale)) for n in pixels.shape[1::-1]), method))


def _bars(page: Page, x: float, y: float, wide: float, width: float, height: float, title: str, values: dict[str, list[float]], steps: list[dict]) -> None:
    """Two bars a step, told apart by colour and hatching, their names above."""
    axes = page.figure.add_axes((x / width, 1 - (y + CHART) / height, wide / width, CHART / height))
    axes.set_facecolor(PAPER)
    places = np.arange(len(steps))
    for at, ((name, bars), (colour, _, _), hatch) in enumerate(zip(values.items(), STYLES, ("", "////"))):
        axes.bar(places + (at - 0.5) * 0.38, bars, 0.36, color=colour if not hatch else PAPER, edgecolor=colour, hatch=hatch, linewidth=0.8)
        page.axes.scatter([x + 0.05 + at * wide / 2], [y - 0.13], marker="s", s=26, color=colour if not hatch else PAPER, edgecolor=colour, hatch=3 * hatch[:2])
        page.text(x + 0.15 + at * wide / 2, y - 0.21, page.shorten(name, wide / 2 - 0.25, SMALL), SMALL)
    axes.axhline(0, color=FAINT, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(places, [step["name"] for step in steps])
    axes.tick_params(labelsize=SMALL, length=2)
    axes.set_ylabel(title, fontsize=SMALL)
    for text in axes.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
        text.set_fontfamily(page.families)


def _hosts(page: Page, transplant: dict, shown: list[np.ndarray], y: float, width: float, wrong: str) -> None:
    """The salient region in other images of the class, before -> after."""
    many = transplant["hosts"] != 1
    said = f"Pasted into {transplant['hosts']} other image{'s' * many} of its class: {wrong} rises in {transplant['rises']} of them, by {transplant['change']:+.3f} on average"
    y = page.text(MARGIN, y, page.shorten(said, width - 2 * MARGIN, LARGE, "bold"), LARGE, weight="bold") + 0.08
    tall = max(t.shape[0] for t in shown) / DPI
    for at, (tile, host) in enumerate(zip(shown, transplant["each"])):
        x = MARGIN + at * (SIDE + GAP)
        page.image(x, y, SIDE, tall, tile, INK, 0.6, "solid")
        below = page.text(x, y + tall + 0.08, page.shorten(host["sample_id"], SIDE, SMALL), SMALL, FAINT)
        page.text(x, below, f"{host['before']:.3f} \u2192 {host['after']:.3f}", SMALL, weight="bold")
