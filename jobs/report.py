"""The page of `faultline reproduce`: each claim of the paper, our figure, its interval, the verdict. Puts together what it is given and computes nothing.

One file that asks nobody for anything: style and figures are in it, there is no script, and its policy forbids every request. All that comes from a run (names, IDs, reasons,
sentences with any of these) is escaped twice: as `printable`, so that nothing in it can reorder or hide, and for HTML.
"""

from __future__ import annotations

import base64
import html
import io
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from index import Run
from jobs.claims import NOT, REPRODUCED, UNDECIDED, UNTESTABLE, Claim, Finding
from jobs.page import MARKS, STYLE
from jobs.verdicts import tally, untestable
from pipeline.atomic import replace_file
from pipeline.errors import BadRequest, printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
DRAWN = 250_000  # bytes of an SVG up to which it is taken, as sharp at any size; a larger one is a picture
QUALITY = 84  # of a picture as JPEG
LISTED = 3  # samples that were set aside, by name

# verb -> title, place in the paper, figures in order with what they show
SECTIONS = {
    "profile": ("How salient errors are, and where", "Section 2.1, figures 1 and 2", {
        "saliency": "Mean saliency of every filter over all samples, before standardising; layers from shallow to deep, filters sorted within each",
        "standardised": "Mean standardised saliency of every filter, of misclassified and of correct samples; layers from shallow to deep, filters sorted within each",
        "depth": "Mean standardised saliency by layer, of misclassified and of correct samples",
    }),
    "prune": ("The most salient filters turned off", "Figure 3", {
        "corrected": "Share of errors corrected by the number of filters turned off: most salient, random, least salient",
        "wrong_confidence": "Change of the wrong class's confidence by the number of filters turned off: most salient, random, least salient",
        "true_confidence": "Change of the true class's confidence by the number of filters turned off: most salient, random, least salient",
    }),
    "neighbors": ("Neighbours that fail for the same reason", "Section 3.2, figures 4 and 5", {
        "agreement": "Share of the nearest errors that confuse the same two classes, by how many are looked at",
        "errors": "Share of errors among the nearest of all samples, by how many are looked at",
        "colours": "Distance of colour histograms between errors and their neighbours, by all, early and deep layers, and of random errors",
        "neighbours": "Errors drawn at random, each with the errors nearest to it",
        "ends": "The same errors with the errors nearest to them by the early and by the deep layers",
    }),
    "finetune": ("One step on one error", "Figure 6, and what it leaves out", {
        "neighbours": "Share of an error's nearest held-out errors corrected by one step, by the number of filters that take it",
        "broken": "Share of correct held-out samples broken by the same step, by the number of filters that take it",
        "frontier": "Repaired against broken, for every choice of filters",
    }),
    "mask": ("The most salient pixels masked", "Sections 2.2 and 3.4, figure 8", {
        "corrected": "Share of errors corrected by the share of pixels masked",
        "wrong_confidence": "Change of the wrong class's confidence by the share of pixels masked",
        "true_confidence": "Change of the true class's confidence by the share of pixels masked",
    }),
    "sanity": ("What is left when layers are randomised", "Adebayo et al., 2018", {
        "profile": "Likeness of profiles to those of the trained network, as layers are randomised from the top down",
        "map": "Likeness of heat maps to those of the trained network, as layers are randomised from the top down",
    }),
}  # fmt: skip


@dataclass(frozen=True)
class About:
    """What the page is of. samples: how many an experiment looks at; datasets: (name, samples, misclassified, set aside when it was extracted)."""

    run: str
    model: str
    weights: str
    layers: int
    filters: int
    recipe: str
    samples: str
    datasets: tuple[tuple[str, int, int, int], ...]
    version: str
    made: str

    @classmethod
    def of(cls, run: Run, most: int | None, seed: int) -> About:
        """Of a run as it is now, the run by its directory's name; most: samples of a verb, drawn by `seed` (None: all)."""
        m, sets = run.manifest, []
        for name, progress in run.status().items():
            wrong = sum(int(np.sum(b["label"].to_numpy() != b["prediction"].to_numpy())) for _, _, b in run.store.blocks(name, ["label", "prediction"], 65536))
            sets.append((name, progress.done, wrong, progress.rejected))
        try:
            own = version("faultline")
        except PackageNotFoundError:
            own = "not installed"
        recipe = f"{'mean |gradient|' if m.aggregation == 'abs' else '|mean gradient|'} of a filter's weights, {m.precision}"
        return cls(run.store.run.absolute().name, m.model, m.weights_sha256, len(m.layers.layers), m.layers.total, recipe, f"at most {most:,} errors for each experiment, drawn by seed {seed}; all samples for the profiles, which need no image" if most else "all, for each experiment; 100 for the sanity checks", tuple(sets), own, time.strftime("%Y-%m-%d", time.gmtime()))


@dataclass(frozen=True)
class Section:
    """A verb: the command that makes its results again, the folder of its figures, its summary, or why it has none."""

    verb: str
    command: str
    folder: Path
    summary: dict | None
    missing: str | None


def write(path: Path, about: About, sections: list[Section], found: list[tuple[Claim, Finding]]) -> None:
    """The page, whole or not at all. Raises BadRequest if it cannot be written."""
    text = render(about, sections, found)
    try:
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as fault:
        raise BadRequest(f"{printable(path)} cannot be written ({printable(fault.strerror or fault)}): put that right and give the same command again") from None


def render(about: About, sections: list[Section], found: list[tuple[Claim, Finding]]) -> str:
    """The page as text."""
    title = f"{about.model}: the paper's claims, run again"
    body = [_header(about, found), _claims("claims", "The claims", [(c, f) for c, f in found if not c.own])]
    body += [_claims("beside", "Beside the paper: what its claims leave out", [(c, f) for c, f in found if c.own])]
    body += [_section(section, [(c, f) for c, f in found if c.verb == section.verb]) for section in sections]
    body += [_footer(about)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_safe(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{"".join(body)}</body>
</html>
"""


# ---- parts ---------------------------------------------------------------------------------------------------------


def _safe(text: object) -> str:
    """Text from anywhere, for an element or a quoted attribute."""
    return html.escape(printable(text), quote=True)


def _foreign(text: object) -> str:
    """A name of the run's, whose direction stays its own."""
    return f"<bdi>{_safe(text)}</bdi>"


def _numbers(text: str) -> str:
    """Text with numbers in it: minus signs as such, and an interval on one line."""
    text = re.sub(r"(?<![\w.])-(?=[\d ])", "\u2212", _safe(text))
    return re.sub(r"\([+\u2212\d.,]+ to [+\u2212\d.,]+\)", lambda found: f'<span class="range">{found[0]}</span>', text)


def _header(about: About, found: list[tuple[Claim, Finding]]) -> str:
    counts = tally(found)
    total = sum(counts.values())
    tiles = "".join(f'<li class="{MARKS[verdict][1]}"><b>{count}</b> {_mark(verdict)}</li>' for verdict, count in counts.items())
    rows = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{_foreign(name)}</th><td role="cell" data-label="samples">{samples:,}</td><td role="cell" data-label="misclassified">{wrong:,}</td>'
        f'<td role="cell" data-label="top-1">{f"{1 - wrong / samples:.4f}" if samples else "none"}</td><td role="cell" data-label="set aside">{aside:,}</td></tr>'
        for name, samples, wrong, aside in about.datasets
    )
    return f"""<header>
<p class="kicker">Where do models go wrong? Run again on {_foreign(about.model)}</p>
<h1>{f"None of the {total} claims can be tested here" if untestable(found) is not None else f"{counts[REPRODUCED]} of {total} claims reproduced"}</h1>
<p class="lead">{_answer(about, counts, found)}</p>
<ul class="tally" aria-label="claims by verdict">{tiles}</ul>
<dl>
<div><dt>Network</dt><dd>{_foreign(about.model)}, {about.filters:,} filters in {about.layers:,} layers</dd></div>
<div><dt>Weights, SHA-256</dt><dd><code>{_safe(about.weights)}</code></dd></div>
<div><dt>Filter saliency</dt><dd>{_safe(about.recipe)}</dd></div>
<div><dt>Samples</dt><dd>{_safe(about.samples)}</dd></div>
<div><dt>Run</dt><dd>{_foreign(about.run)}</dd></div>
<div><dt>Made</dt><dd><time datetime="{_safe(about.made)}">{_safe(about.made)}</time>, Faultline {_safe(about.version)}</dd></div>
</dl>
<table role="table" class="sets"><caption>Data sets of the run</caption>
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">data set</th><th scope="col" role="columnheader">samples</th><th scope="col" role="columnheader">misclassified</th><th scope="col" role="columnheader">top-1</th><th scope="col" role="columnheader">set aside</th></tr></thead>
<tbody role="rowgroup">{rows}</tbody></table>
</header>
<main>
"""


def _answer(about: About, counts: dict[str, int], found: list[tuple[Claim, Finding]]) -> str:
    """One paragraph."""
    total, why = sum(counts.values()), untestable(found)
    about_them = f"{total} claims (Levin et al., 2022, with the sanity checks of Adebayo et al., 2018)"
    if why is not None:
        return _safe(f"Of {about_them}, nothing can be said on this run: {why}.")
    are = lambda n: f"{n} {'is' if n == 1 else 'are'}"  # noqa: E731
    parts = [f"{are(counts[REPRODUCED])} reproduced on this run", f"{are(counts[NOT])} not reproduced", f"{are(counts[UNDECIDED])} undecided", *([f"{counts[UNTESTABLE]} cannot be tested here"] if counts[UNTESTABLE] else [])]
    text = f"Of {about_them}, {', '.join(parts[:-1])}, and {parts[-1]}."
    for verdict, words in ((NOT, "Not reproduced"), (UNDECIDED, "Undecided")):
        named = [f"{claim.short[0].lower()}{claim.short[1:]} ({claim.place[0].lower()}{claim.place[1:]})" for claim, finding in found if finding.verdict == verdict and not claim.own]
        text += f" {words}: {'; '.join(named)}." if named else ""
    return _safe(f"{text} A claim counts as reproduced only where the 95% interval of the difference lies on the claimed side of 0, and as not reproduced only where it lies on the other; where it holds 0, the claim is undecided.")


def _claims(name: str, title: str, found: list[tuple[Claim, Finding]]) -> str:
    rows = "".join(
        f'<tr role="row" id="claim-{_safe(claim.name)}" class="{MARKS[finding.verdict][1]}"><th scope="row" role="rowheader"><span class="place">{_safe(claim.place)}</span> <a href="#{_safe(claim.verb)}">{_safe(claim.short)}</a> <span class="text">{_safe(claim.text)}</span></th>'
        f'<td role="cell" data-label="here">{_numbers(finding.ours) or "<span class=none>none</span>"}</td><td role="cell" data-label="95% interval">{_intervals(finding.interval)}</td>'
        f'<td role="cell" data-label="verdict">{_mark(finding.verdict)}<span class="why">{_numbers(finding.why)}</span></td></tr>'
        for claim, finding in found
    )
    return f"""<section aria-labelledby="{name}"><h2 id="{name}">{_safe(title)}</h2>
<table role="table" class="claims"><caption class="hidden">{_safe(title)}: our figures, their intervals and the verdicts</caption>
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">claim</th><th scope="col" role="columnheader">here</th><th scope="col" role="columnheader">95% interval</th><th scope="col" role="columnheader">verdict</th></tr></thead>
<tbody role="rowgroup">{rows}</tbody></table></section>
"""


def _intervals(text: str) -> str:
    """Several stand below each other."""
    return "<br>".join(_numbers(part) for part in text.split("; ")) if text else '<span class="none">none</span>'


def _mark(verdict: str) -> str:
    mark, kind = MARKS[verdict]
    return f'<span class="verdict {kind}"><span aria-hidden="true">{mark}</span> {_safe(verdict)}</span>'


def _section(section: Section, found: list[tuple[Claim, Finding]]) -> str:
    title, place, figures = SECTIONS[section.verb]
    told = "".join(f'<li>{_mark(finding.verdict)} <a href="#claim-{_safe(claim.name)}">{_safe(claim.short)}</a></li>' for claim, finding in found)
    head = f'<section aria-labelledby="{section.verb}"><p class="kicker">{_safe(place)}</p><h2 id="{section.verb}">{_safe(title)}</h2>\n<ul class="told">{told}</ul>\n'
    command = f"<p>The same again:</p><pre><code>{_safe(section.command)}</code></pre>\n"
    if section.summary is None:
        return f'{head}<p class="missing">Not done here: {_safe(section.missing or "it was not done")}.</p>\n{command}</section>\n'
    shown = "".join(_figure(section.folder, name, words) for name, words in figures.items())
    return f'{head}<p class="found">{_numbers(_sentence(section.summary["found"]))}</p>\n<div class="figures">{shown}</div>\n{_in_words(section.summary)}{_aside(section.summary)}{command}</section>\n'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _figure(folder: Path, name: str, words: str) -> str:
    """A figure as its verb drew it, inside the page; a word in its place where it is gone."""
    try:
        source, width, height = embedded(folder / name)
    except (OSError, ValueError) as fault:
        return f"<figure><p>{_safe(words)}: the figure cannot be read ({_safe(getattr(fault, 'strerror', None) or type(fault).__name__)}).</p></figure>\n"
    wide = ' class="wide"' if height > 1.1 * width or width > 1800 else ""
    return f'<figure{wide}><img src="{source}" width="{width}" height="{height}" alt="{_safe(words)}"><figcaption>{_safe(words)}.</figcaption></figure>\n'


def embedded(path: Path) -> tuple[str, int, int]:
    """(data URI, width, height in pixels) of the figure `path`.svg and .png: the drawing where it is small, otherwise the smaller of the picture as it is and as JPEG. Raises OSError."""
    picture = path.with_name(path.name + ".png").read_bytes()
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        drawing = path.with_name(path.name + ".svg")
        if drawing.exists() and drawing.stat().st_size <= DRAWN:
            return _uri("svg+xml", drawing.read_bytes()), width, height
        out = io.BytesIO()
        image.convert("RGB").save(out, "JPEG", quality=QUALITY, optimize=True)
    kind, content = min(("png", picture), ("jpeg", out.getvalue()), key=lambda one: len(one[1]))
    return _uri(kind, content), width, height


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _in_words(summary: dict) -> str:
    """What the sheet of neighbours shows, for those who cannot see it."""
    lines = []
    for example in summary.get("examples", ()):
        near = ", ".join(f"{_foreign(hit['neighbor_id'])} of {_foreign(hit['neighbor_dataset'])} ({_safe(hit['pair'])}, {hit['similarity']:.2f})" for hit in example["neighbors"]["standardised"])
        lines.append(f"<li>{_foreign(example['sample_id'])} of {_foreign(example['dataset'])}: {near or 'none'}</li>")
    return f"<details><summary>The sheet of neighbours in words</summary><p>Each error, then those nearest to it, with how their two classes compare and their similarity:</p><ul>{''.join(lines)}</ul></details>\n" if lines else ""


def _aside(summary: dict) -> str:
    aside = summary.get("set_aside", ())
    if not aside:
        return '<p class="aside">No sample was set aside.</p>\n'
    listed = "".join(f"<li>{_foreign(sample_id)}: {_safe(reason)}</li>" for sample_id, reason in aside[:LISTED])
    more = f"<li>and {len(aside) - LISTED:,} more, all of them in the verb's summary.json</li>" if len(aside) > LISTED else ""
    return f'<div class="aside"><p>{len(aside):,} sample{" was" if len(aside) == 1 else "s were"} set aside, whose images cannot be read any more:</p><ul>{listed}{more}</ul></div>\n'


def _footer(about: About) -> str:
    return f"""</main>
<footer><p>The paper: Levin, Shu, Borgnia, Huang, Goldblum, Goldstein, <cite>Where do Models go Wrong? Parameter-Space Saliency Maps for Explainability</cite>, 2022 (arXiv 2108.01335). This page asks no host for
anything: its figures are in it, as the verbs drew them, and the numbers behind them lie in the run, in experiments/*/summary.json. Faultline {_safe(about.version)}.</p></footer>
"""
