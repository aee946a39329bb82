"""What is made of the rows of `faultline mask` over a data set: figure 8, the transplants and the boxes as numbers with intervals, and as one sentence."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.intervals import CHANGE, FEW, Interval, bootstrap_mean, paired_shares, share_mean
from pipeline.interventions import masking

STRATEGIES = {"salient": "most salient", "moved": "the same shape elsewhere", "random": "random", "least": "least salient"}
PAPER = {"random": "random pixels", "least": "the least salient"}  # what the paper holds the most salient pixels against; `moved` is a control of ours
PAIRS = (("salient", "moved"), ("salient", "random"), ("salient", "least"))  # whose differences on the same samples are told


def transplant(rows: pa.Table, seed: int) -> dict | None:
    """Regions pasted into other images of their class: `samples`, `pairs` of sample and image, and intervals over samples of: `rises`, the share of images in which
    the wrong class's confidence rises; `change`, by how much; `rises_random`, `change_random` and the differences on the same samples for as many random pixels."""
    pasted, control = (rows.filter(pc.equal(rows["strategy"], name)) for name in ("transplant", "transplant_random"))
    if not pasted.num_rows:
        return None
    found = {"samples": pasted.num_rows, "pairs": int(pc.sum(pasted["hosts"]).as_py())}
    own, other = (table["rises"].to_numpy() for table in (pasted, control))
    found |= {"rises": share_mean(own).to_json(), "rises_random": share_mean(other).to_json(), "rises_minus_random": paired_shares(own, other).to_json()}
    own, other = (table["wrong_confidence_change"].to_numpy() for table in (pasted, control))
    found |= {name: bootstrap_mean(values, seed, ends=CHANGE).to_json() for name, values in (("change", own), ("change_random", other), ("change_minus_random", own - other))}
    return found


def unboxed(rows: pa.Table) -> dict:
    """Of how many samples the annotation was `used`, and of how many not, by reason, the most frequent first: `unused`."""
    own = rows.filter(pc.equal(rows["strategy"], "salient"))
    reasons = dict(zip(own["sample_id"].to_pylist(), own["unboxed"].to_pylist())).values()
    return {"used": sum(reason is None for reason in reasons), "unused": dict(Counter(reason for reason in reasons if reason is not None).most_common())}


def outside_box(rows: pa.Table, shares: int, at: int, seed: int) -> dict | None:
    """Salient pixels outside the object's boxes masked, less as many random ones there, on the same samples: mean differences of both classes' confidences with
    intervals, and p-values of Wilcoxon's signed-rank test and of Student's paired t, two-sided."""
    from scipy.stats import ttest_rel, wilcoxon

    own, other = (columns_of(rows, f"{name}_outside", shares) for name in ("salient", "random"))
    samples = len(own["corrected"])
    if not samples:
        return None
    found: dict[str, object] = {"samples": samples}
    for key, column in (("wrong", "wrong_confidence_change"), ("true", "true_confidence_change")):
        a, b = own[column][:, at], other[column][:, at]
        found[key] = bootstrap_mean(a - b, seed, ends=CHANGE).to_json()
        differ = samples > 1 and np.any(a != b)
        found |= {f"{key}_p_wilcoxon": float(wilcoxon(a, b).pvalue) if differ else 1.0, f"{key}_p_t": float(ttest_rel(a, b).pvalue) if differ else 1.0}
    return found


def found(summary: dict, at: int) -> str:
    """Figure 8, the transplants and the boxes in one sentence, at one share. Whether it is what the paper found is judged by the paper's own pairs alone."""
    n, percent = summary["samples"], f"{100 * summary['shares'][at]:g}%"
    share = {s: Interval(*(summary["curves"][s]["corrected"][key][at] for key in ("mean", "low", "high")), n) for s in STRATEGIES}
    apart = {b: Interval(**summary["paired"][f"{a}_minus_{b}"]) for a, b in PAIRS}
    said = (
        f"masking the {percent} most salient pixels corrects {share['salient'].text(3)} of {n:,} misclassified samples, {', '.join(f'{words} {share[s].text(3)}' for s, words in PAPER.items())}; "
        f"differences on the same samples {', '.join(apart[s].text(3, '+') for s in PAPER)}{_judged(apart, n)}; "
        f"our own control, the same shape elsewhere, corrects {share['moved'].text(3)}, the difference is {apart['moved'].text(3, '+')}"
    )
    if pasted := summary["transplant"]:
        rises, gap = Interval(**pasted["rises"]), Interval(**pasted["rises_minus_random"])
        said += f"; pasted into {pasted['pairs']:,} other images of their class they raise the wrong class's confidence in {rises.text(3)} of them, {gap.text(3, '+')} against random pixels"
    if box := summary["outside_box"]:
        unused = sum(summary["boxes"]["unused"].values())
        others = f", {unused:,} more have no annotation that can be used" if unused else ""
        said += f"; outside the object's boxes ({box['samples']:,} samples{others}) the wrong class's confidence changes by {Interval(**box['wrong']).text(3, '+')} against random pixels there (p = {box['wrong_p_wilcoxon']:.2g})"
    return said


def _judged(apart: dict[str, Interval], n: int) -> str:
    """What the paper's pairs say, each by its name."""
    if n < FEW:
        return f", {'1 is' if n == 1 else f'{n:,} are'} too few to conclude anything from"
    named = {
        "as the paper found against": [words for s, words in PAPER.items() if apart[s].low > 0],
        "the reverse of what the paper found against": [words for s, words in PAPER.items() if apart[s].high < 0],
        "not clearly apart from": [words for s, words in PAPER.items() if not (apart[s].low > 0 or apart[s].high < 0)],
    }
    return "".join(f", {verdict} {' and '.join(words)}" for verdict, words in named.items() if words)


def columns_of(rows: pa.Table, strategy: str, shares: int) -> dict[str, np.ndarray]:
    """float64 [N, shares] of a strategy's rows, by column."""
    table = rows.filter(pc.equal(rows["strategy"], strategy))
    return {column: table[column].to_numpy().astype(np.float64).reshape(-1, shares) for column in masking.EFFECTS.names[3:6]}
