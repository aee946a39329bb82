"""The curves of a run's experiments. Draws what it is given and computes nothing; each chart as .png and .svg.

Every curve has a dash pattern and a marker of its own, so that it is told in grey; intervals are drawn as bands or bars. What is said of the curves stands between
the title and the axes, where it hides none of them. Texts are made safe as in `figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patheffects import withStroke

from jobs.figures import DPI, FAINT, INK, LARGE, PAPER, SMALL, Page, own_settings, save
from pipeline.errors import BadRequest, printable

# colour, dashes, marker of the first, second, ... curve
STYLES = (
    ("#b3470b", "solid", "o"),
    ("#1b5e9e", (0, (5, 1.5)), "s"),
    (INK, (0, (1.2, 1.2)), "^"),
    ("#5b8c5a", (0, (5, 1.2, 1.2, 1.2)), "D"),
    (FAINT, (0, (2.5, 1)), "v"),
    ("#8c6bb1", (0, (7, 1, 1, 1, 1, 1)), "P"),
)
WIDTH, HEIGHT = 7.2, 3.9  # inches
NAMED, NAME = 9, 2.0  # layers whose names stand at the axis, and inches of each
SHOWN = 10_000  # how many times the least that a logarithmic axis shows the most is

Band = tuple[Sequence[float], Sequence[float], Sequence[float]]  # mean, low, high at every place


@dataclass(frozen=True)
class Words:
    """What stands on a chart. None of it is a formula."""

    title: str
    across: str
    up: str
    note: str = "bands: 95% intervals over samples"


def curves(path: Path, x: Sequence[float], bands: dict[str, Band], words: Words, levels: dict[str, float] | None = None, log: bool = False) -> None:
    """Curves over the numbers `x`, each with its interval; `levels` are thin horizontal lines with a name; log: of the axis across."""

    def draw(axes: Axes, page: Page) -> None:
        _bands(axes, page, x, bands, marked=len(x) <= 24)
        for name, level in (levels or {}).items():
            axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(f"{page.safe(name)}\n{level:.3g}", (1, level), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", ha="left", va="center", fontsize=SMALL, color=FAINT)
        if log:
            axes.set_xscale("log")
            axes.set_xticks(list(x), [f"{value:g}" for value in x])
            axes.minorticks_off()

    _chart(path, words, draw)


def by_layer(path: Path, bands: dict[str, Band], layers: list[str], words: Words) -> None:
    """One number a layer, shallow to deep, with its interval."""

    def draw(axes: Axes, page: Page) -> None:
        _bands(axes, page, np.arange(len(layers)) + 0.5, bands, marked=len(layers) <= 24)
        axes.axhline(0, color=FAINT, linewidth=0.6)
        _name_layers(axes, page, layers)

    _chart(path, words, draw)


def within_layers(path: Path, lines: dict[str, list[Band]], layers: list[str], words: Words, log: bool = False) -> None:
    """One number a filter with its interval, a band a layer: layers of equal width from shallow to deep, the filters of each side by side in the order given. log: of the axis up,
    where all are positive; what is less than 1 / `SHOWN` of the largest lies below it."""

    def draw(axes: Axes, page: Page) -> None:
        x = np.concatenate([at + (np.arange(len(mean)) + 0.5) / len(mean) for at, (mean, _, _) in enumerate(next(iter(lines.values())))])
        gaps = np.flatnonzero(np.diff(np.floor(x))) + 1  # no line leads from one layer into the next
        most = max(max(mean) for bands in lines.values() for mean, _, _ in bands)
        for (name, bands), (colour, dashes, _) in zip(lines.items(), STYLES):
            mean, low, high = (np.insert(np.concatenate([np.asarray(band[i], float) for band in bands]), gaps, np.nan) for i in range(3))
            if log:  # a band that reaches below 0 reaches below the axis
                mean, low, high = np.where(mean > 0, mean, np.nan), np.maximum(low, most / SHOWN / 10), np.maximum(high, most / SHOWN / 10)
            axes.fill_between(np.insert(x, gaps, np.nan), low, high, color=colour, alpha=0.3, linewidth=0)
            axes.plot(np.insert(x, gaps, np.nan), mean, color=colour, linestyle=dashes, linewidth=0.9, label=page.safe(name))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            least = min(min((value for value in mean if value > 0), default=most) for bands in lines.values() for mean, _, _ in bands)
            axes.set_ylim(max(least / 1.5, most / SHOWN), most * 1.5)
        else:
            axes.axhline(0, color=FAINT, linewidth=0.6)
        for at in range(0, len(layers) + 1, max(1, len(layers) // 60 + 1)):
            axes.axvline(at, color=FAINT, linewidth=0.25, alpha=0.5)
        _name_layers(axes, page, layers)

    _chart(path, words, draw, legend=len(lines) > 1)


def bars(path: Path, intervals: dict[str, tuple[float, float, float]], words: Words) -> None:
    """One (mean, low, high) a name, from top to bottom, as a point with its interval."""

    def draw(axes: Axes, page: Page) -> None:
        for at, (name, (mean, low, high)) in enumerate(intervals.items()):
            colour, _, marker = STYLES[at % len(STYLES)]
            axes.errorbar(mean, at, xerr=[[mean - low], [high - mean]], color=colour, marker=marker, markersize=6, capsize=4, linewidth=1.4)
            axes.annotate(f"{mean:.3f}", (mean, at), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=SMALL, color=INK)
        axes.set_yticks(range(len(intervals)), [page.shorten(name, 2.2, SMALL) for name in intervals])
        axes.set_ylim(len(intervals) - 0.4, -0.6)

    _chart(path, words, draw, legend=False, height=1.3 + 0.5 * len(intervals))


def plane(path: Path, lines: dict[str, list[list[tuple[dict, dict, str]]]], words: Words) -> None:
    """Points of two numbers with intervals each (`estimate`, `low`, `high`) and a short text beside them, those of a line joined in their order; the lines of one name look alike.

    The axis across is that of the square root, so that the small numbers, shares of what is broken, have room.
    """

    def draw(axes: Axes, page: Page) -> None:
        for (name, of_name), (colour, dashes, marker) in zip(lines.items(), STYLES):
            for at, line in enumerate(of_name):
                across, up = ([[p[i][key] for p in line] for key in ("estimate", "low", "high")] for i in (0, 1))
                bars = [np.abs(np.array(v[1:]) - v[0]) for v in (across, up)]
                axes.errorbar(across[0], up[0], xerr=bars[0], yerr=bars[1], color=colour, linestyle=dashes, marker=marker, markersize=4.5, linewidth=1, elinewidth=0.6, label=None if at else page.safe(name))
                for x, y, (_, _, text) in zip(across[0], up[0], line):
                    axes.annotate(page.safe(text), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=SMALL - 1, color=colour, path_effects=[withStroke(linewidth=1.5, foreground=PAPER)], zorder=4)
        most = axes.get_xlim()[1]
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xlim(0, most)
        ticks = [0.0]
        for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
            if tick <= most and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.06 * np.sqrt(most):
                ticks.append(tick)
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

    _chart(path, words, draw, height=4.9)


def _bands(axes: Axes, page: Page, x: Sequence[float], bands: dict[str, Band], marked: bool) -> None:
    for (name, (mean, low, high)), (colour, dashes, marker) in zip(bands.items(), STYLES):
        if len(x) == 1:
            axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.5, marker=marker if marked else None, markersize=4, label=page.safe(name))


def _name_layers(axes: Axes, page: Page, layers: list[str]) -> None:
    """Names of some layers, the first and the last among them, under the middle of their place."""
    shown = np.unique(np.linspace(0, len(layers) - 1, min(NAMED, len(layers))).round().astype(int))
    axes.set_xticks(shown + 0.5, names_of(page, layers, shown.tolist()), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(0, len(layers))


def names_of(page: Page, layers: list[str], shown: list[int]) -> list[str]:
    """The names of some layers, in `NAME` inches each: of one that is longer its last modules, and where these are another's too, its number (from 1) before them."""
    found = []
    for at in shown:
        name = page.safe(layers[at])
        ends = [name, *(f"\u2026{name[dot + 1 :]}" for dot, letter in enumerate(name[:400]) if letter == ".")]
        found.append(next((end for end in ends if page.width(end, SMALL) <= NAME), page.shorten(layers[at], NAME - 0.4, SMALL)))
    return [name if found.count(name) == 1 else f"{at + 1}: {name}" for at, name in zip(shown, found)]


def _chart(path: Path, words: Words, draw: Callable[[Axes, Page], None], legend: bool = True, height: float = HEIGHT) -> None:
    """Raises BadRequest if a file cannot be written."""
    with own_settings():
        page = Page()
        figure = Figure((WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, page)
        axes.set_xlabel(page.safe(words.across), fontsize=LARGE)
        axes.set_ylabel(page.safe(words.up), fontsize=LARGE)
        box = _legend(axes, page) if legend else None
        tall = box.get_window_extent(page.renderer).height * 72 / DPI if box else 0
        figure.set_size_inches(WIDTH, height + tall / 72)
        axes.set_title(page.shorten(words.title, WIDTH - 0.5, LARGE + 1, "bold"), fontsize=LARGE + 1, fontweight="bold", loc="left", pad=6 + tall)
        if words.note:
            figure.supxlabel(page.safe(words.note), fontsize=SMALL - 1, color=FAINT, x=0.99, ha="right")
        for text in figure.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
            text.set_fontfamily(page.families)
        axes.tick_params(labelsize=SMALL)
        for suffix in (".png", ".svg"):
            try:
                save(figure, path.with_name(path.name + suffix))
            except OSError as fault:
                raise BadRequest(f"{printable(path)}{suffix} cannot be written ({printable(fault)}): put that right and give the same command again") from None


def _legend(axes: Axes, page: Page) -> Legend:
    """Above the axes, in as few lines as the page is wide for."""
    count = len(axes.get_legend_handles_labels()[0])
    for columns in range(min(count, 4), 0, -1):
        box = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, ncols=columns, frameon=False, fontsize=SMALL, handlelength=3.4, columnspacing=1.4)
        for text in box.get_texts():
            text.set_fontfamily(page.families)
        if box.get_window_extent(page.renderer).width <= (WIDTH - 0.9) * DPI:
            break
    return box
