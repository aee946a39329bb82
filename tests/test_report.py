"""The page of `faultline reproduce`, made from hand: it holds what was found, asks nobody for anything, lets no foreign text out of its place, and is read as well on a phone as on a desk."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from jobs import report
from jobs.claims import CLAIMS, NOT, REPRODUCED, UNDECIDED, UNTESTABLE, Finding
from pipeline.errors import BadRequest

HOSTILE = '<script>alert(1)</script>"onload="alert(2)\u202egnp.\u2066\n\x1b[31m&amp;'
ABOUT = report.About("runs", "resnet56", "ab" * 32, 55, 2032, "mean |gradient| of a filter's weights, fp32", "at most 200 for each experiment, drawn by seed 0", (("val", 8000, 1355, 0), ("v2", 2000, 325, 3)), "1.2.3", "2026-11-25")


class Reader(HTMLParser):
    """What a page could ask for, run, or refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.links, self.sources, self.handlers, self.styles, self.alts = [], [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.alts += [dict(attrs).get("alt")] if tag == "img" else []
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.links += [value] if name == "href" else []
            self.sources += [value] if name in ("src", "srcset", "data", "poster", "action", "formaction", "background", "cite", "ping") or name.endswith(":href") else []
            self.handlers += [name] if name.startswith("on") else []
            self.styles += [value] if name == "style" else []

    def handle_data(self, data):
        self.styles += [data] if self.tags and self.tags[-1] == "style" else []


def outside(text: str) -> list[str]:
    """Every way out of a page: references that are neither in it nor data, code, and styles that fetch."""
    reader = Reader(text)
    found = [link for link in reader.links if not (link.startswith("#") and link[1:] in reader.ids)]
    found += [source for source in reader.sources if not source.startswith("data:image/")]
    found += [style for style in reader.styles if re.search(r"url\(|@import|expression\(|image-set\(", style)]
    return found + reader.handlers + [tag for tag in reader.tags if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "audio", "video", "portal")]


def figure(folder, name: str, size=(720, 390)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "#f4ead5").save(folder / f"{name}.png")
    (folder / f"{name}.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}"><rect width="100" height="100" fill="#b3470b"/></svg>')


def sections(folder, text: str = "val") -> list[report.Section]:
    """All verbs, one of them left out; `text` stands wherever a run's own words do."""
    found = []
    for verb, (_, _, figures) in report.SECTIONS.items():
        for name in figures:
            figure(folder / verb, name)
        hit = {"neighbor_dataset": text, "neighbor_id": f"{text}-1", "similarity": 0.5, "pair": "same"}
        examples = [{"dataset": text, "sample_id": text, "neighbors": {"standardised": [hit] * 6}}] if verb == "neighbors" else []
        summary = {"found": f"of {text} something was found -0.250 (-0.300 to -0.200)", "examples": examples, "set_aside": [[text, text]] * (4 if verb == "prune" else 0)}
        found.append(report.Section(verb, f"faultline {verb} --run runs --dataset {text}", folder / verb, None if verb == "finetune" else summary, text if verb == "finetune" else None))
    return found


def found_of(text: str = "because") -> list[tuple]:
    verdicts = (REPRODUCED, NOT, UNTESTABLE, UNDECIDED)
    return [(claim, Finding(f"{text} 0.247", "a - b -0.113 (-0.150 to -0.076); c - d +0.129 (+0.109 to +0.149)", verdicts[i % 4], text)) for i, claim in enumerate(CLAIMS)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    report.write(folder / "report.html", ABOUT, sections(folder), found_of())
    return folder / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    about = replace(ABOUT, run=HOSTILE, model=HOSTILE, weights=HOSTILE, datasets=((HOSTILE, 10, 4, 0), ("x" * 300, 0, 0, 0)))
    report.write(folder / "report.html", about, sections(folder, HOSTILE), found_of(HOSTILE))
    return folder / "report.html"


def test_the_page_says_what_was_found(page):
    text = page.read_text(encoding="utf-8")
    for claim, finding in found_of():
        assert all(report._safe(part) in text for part in (claim.text, claim.short, claim.place))
    counted = [finding.verdict for claim, finding in found_of() if not claim.own]
    assert f"<h1>{counted.count(REPRODUCED)} of {len(counted)} claims reproduced</h1>" in text
    for part in ('lang="en"', "<title>resnet56", "2,032 filters in 55 layers", "ab" * 32, "2026-11-25", "Faultline 1.2.3", "0.8306", "at most 200 for each experiment", "8,000", "faultline prune --run runs", "4 samples were set aside", "and 1 more"):
        assert part in text, part
    assert "\u2212" in text and '<span class="range">(\u22120.150 to \u22120.076)</span>' in text, "numbers have minus signs, and an interval is not broken over two lines"


def test_a_verdict_is_told_by_word_and_mark(page):
    text = page.read_text(encoding="utf-8")
    for verdict, mark in ((REPRODUCED, "\u2713"), (NOT, "\u2717"), (UNDECIDED, r"\?"), (UNTESTABLE, "\u25cb")):
        assert re.search(rf'<span aria-hidden="true">{mark}</span> {verdict}</span>', text)


def test_the_lead_tells_what_is_refuted_from_what_is_undecided(page):
    text = page.read_text(encoding="utf-8")
    paper = [(claim, finding.verdict) for claim, finding in found_of() if not claim.own]
    counts = {verdict: sum(v == verdict for _, v in paper) for verdict in (REPRODUCED, NOT, UNDECIDED, UNTESTABLE)}
    assert f"{counts[REPRODUCED]} are reproduced on this run, {counts[NOT]} are not reproduced, {counts[UNDECIDED]} are undecided, and {counts[UNTESTABLE]} cannot be tested here" in text
    lead = re.search('<p class="lead">(.*?)</p>', text)[1]
    refuted, undecided = re.search("Not reproduced: (.*?)[.] Undecided: (.*?)[.] A claim", lead).groups()
    for part, verdict in ((refuted, NOT), (undecided, UNDECIDED)):
        assert part.count("(") == counts[verdict] and all(report._safe(claim.short[1:]) in part for claim, v in paper if v == verdict)


def test_a_page_on_which_nothing_can_be_tested_says_so_and_why(tmp_path):
    found = [(claim, Finding("", "", UNTESTABLE, "no sample of val is misclassified")) for claim in CLAIMS]
    text = report.render(ABOUT, sections(tmp_path), found)
    assert "<h1>None of the 14 claims can be tested here</h1>" in text and "nothing can be said on this run: no sample of val is misclassified." in text and "claims reproduced" not in text


def test_tables_have_headers_and_figures_have_words(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert len(reader.alts) == sum(len(figures) for verb, (_, _, figures) in report.SECTIONS.items() if verb != "finetune") and all(len(alt) > 20 for alt in reader.alts)
    assert re.findall(r"<th (?![^>]*scope=)", text) == [] and text.count('scope="row"') == len(CLAIMS) + len(ABOUT.datasets)
    assert text.count("<table") == text.count("<caption") == 3 and len(reader.ids) == len(set(reader.ids))


def test_the_page_refers_to_nothing_outside(page, hostile):
    for path in (page, hostile):
        text = path.read_text(encoding="utf-8")
        assert outside(text) == []
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text.replace("&#x27;", "'")


@pytest.mark.parametrize("part", ["<img src='http://a/b.png'>", "<a href='https://a'>b</a>", "<a href='#nowhere'>b</a>", "<p onclick='b()'>c</p>", "<style>p { background: url(b.png) }</style>", "<script>b</script>", "<link rel=stylesheet href=a.css>", "<p style='background:url(a)'>b</p>"])
def test_what_refers_outside_is_found(part):
    """The check above can fail."""
    assert outside(f"<!DOCTYPE html><title>a</title>{part}")


def test_foreign_text_stays_text(hostile):
    """Nothing of it becomes markup, and what could reorder or hide the rest of a line stands as its escape."""
    text = hostile.read_text(encoding="utf-8")
    assert "<script" not in text and '"onload=' not in text and not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f]", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;onload=&quot;alert(2)\\u202egnp.\\u2066\\n\\x1b[31m&amp;amp;" in text
    assert text.count("&lt;script&gt;") >= 2 * len(CLAIMS) + 15, "in every place"


def test_the_page_appears_whole_or_not_at_all(page, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(BadRequest, match="report.html cannot be written .*No space left"):
            report.write(path, ABOUT, sections(tmp_path), found_of())
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir() if "report" in p.name] == ["report.html"]


def test_a_figure_that_is_gone_is_told(tmp_path):
    made = sections(tmp_path)
    (tmp_path / "prune/corrected.png").unlink()
    (tmp_path / "prune/true_confidence.png").write_bytes(b"no picture")
    text = report.render(ABOUT, made, found_of())
    assert text.count("the figure cannot be read") == 2 and outside(text) == []


def test_large_drawings_are_taken_as_pictures(tmp_path):
    """So that the page stays small: an SVG of megabytes, or a PNG of photographs, as JPEG; both can still be read."""
    figure(tmp_path, "small")
    assert report.embedded(tmp_path / "small")[0].startswith("data:image/svg+xml;base64,")
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    (tmp_path / "large.svg").write_text("<svg>" + " " * report.DRAWN + "</svg>")
    source, width, height = report.embedded(tmp_path / "large")
    assert source.startswith("data:image/jpeg;base64,") and (width, height) == (400, 300)
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (400, 300)


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, hostile, browser, width):
    """Opened from disk: nothing but the file is asked for, every claim can be read, every figure is there, and nothing sticks out, whatever the names."""
    for path in (page, hostile):
        browser.open(path, width)
        assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        seen = browser.evaluate("document.body.innerText")
        assert all(claim.text in seen and claim.short in seen for claim in CLAIMS) and seen.count("not testable here") >= 4 and seen.count("undecided") >= 4
        assert browser.evaluate("document.scripts.length + document.querySelectorAll('[onload]').length") == 0
        assert browser.evaluate("[...document.images].length") > 10 and browser.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
        clipped = browser.evaluate("[...document.querySelectorAll('td, th, dd, li, p, h1, h2')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length")
        assert clipped == 0


def test_dark_is_dark_and_has_contrast(page, browser):
    luminance = """(() => { const of = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 }); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
      const paper = of(getComputedStyle(document.body).backgroundColor);
      const ratio = e => { const ink = of(getComputedStyle(e).color); return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) };
      return [paper, Math.min(...[...document.querySelectorAll('p, td, th, .verdict, .why, .place, dt, dd, a, figcaption')].map(ratio))] })()"""
    papers = []
    for dark in (False, True):
        browser.open(page, 1280, dark=dark)
        paper, worst = browser.evaluate(luminance)
        papers.append(paper)
        assert worst >= 4.5
    assert papers[0] > 0.8 and papers[1] < 0.05


def test_the_browser_would_tell(tmp_path, browser):
    """A page that asks for a picture elsewhere, and is too wide, is seen to."""
    (tmp_path / "page.html").write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/a.png'><p style='width: 700px'>b</p>")
    browser.open(tmp_path / "page.html", 390)
    assert "http://127.0.0.1:9/a.png" in browser.requests and browser.evaluate("document.documentElement.scrollWidth") > 390
