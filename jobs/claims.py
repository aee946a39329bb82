"""THE list of the paper's claims (Levin et al., 2022), and what an experiment's numbers say of each.

A claim is judged from the summary of one verb alone, by 95% intervals: a difference is reproduced only where its interval lies on the claimed side of 0, and refuted,
"not reproduced", only where it lies on the other; one that holds 0 is undecided. Of fewer than `FEW` samples nothing is concluded. Where a summary has no interval of
the difference itself, `apart` takes the widest that both intervals allow, which never says more than is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from pipeline.intervals import FEW, Interval

REPRODUCED, NOT, UNDECIDED, UNTESTABLE = "reproduced", "not reproduced", "undecided", "not testable here"
NEAR, RATE, SHARE = 20, 0.5, 0.05  # filters, length of a step and share of the pixels that claims are about, or the nearest that was tried


@dataclass(frozen=True)
class Finding:
    """ours: the figures; interval: the 95% intervals that decide; verdict: one of the four; why: a sentence without its end."""

    ours: str
    interval: str
    verdict: str
    why: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """short: a few words; place: section or figure of the paper; text: the claim in one sentence; verb: whose summary decides; own: not the paper's, but what it leaves out, and not counted."""

    name: str
    short: str
    place: str
    text: str
    verb: str
    judge: Callable[[dict], Finding]
    own: bool = False

    def find(self, summary: dict | None, missing: str = "it was not done") -> Finding:
        """What a summary says of it; `missing` is why there is none."""
        try:
            return self.judge(summary) if summary is not None else Finding("", "", UNTESTABLE, missing)
        except KeyError:
            return Finding("", "", UNTESTABLE, f"another version wrote its numbers: remove experiments/{self.verb}/summary.json, and the same command makes them anew")


# ---- verdicts ------------------------------------------------------------------------------------------------------


def apart(a: Interval, b: Interval) -> Interval:
    """a - b where the samples' own differences are not known: as far as both intervals together allow."""
    return Interval(a.estimate - b.estimate, a.low - b.high, a.high - b.low, min(a.n, b.n))


def turned(interval: Interval) -> Interval:
    """The same of the negative."""
    return Interval(-interval.estimate, -interval.high, -interval.low, interval.n)


def judged(ours: str, gaps: dict[str, Interval], samples: int) -> Finding:
    """The verdict on gaps that are all claimed to be above 0. samples: what they rest on."""
    interval = "; ".join(f"{name} {gap.text(3, '+')}" for name, gap in gaps.items())
    if samples < FEW:
        return Finding(ours, interval, UNTESTABLE, f"{samples:,} {'sample is' if samples == 1 else 'samples are'} too few to conclude anything from")
    reversed_ = [name for name, gap in gaps.items() if gap.high < 0]
    unclear = [name for name, gap in gaps.items() if not (gap.low > 0 or gap.high < 0)]
    if reversed_:
        return Finding(ours, interval, NOT, f"it is the other way round: {_listed(reversed_)}")
    if unclear:
        return Finding(ours, interval, UNDECIDED, "not clearly apart" + (f": {_listed(unclear)}" if len(gaps) > 1 else ""))
    return Finding(ours, interval, REPRODUCED, "clearly apart" + (", all of them" if len(gaps) > 2 else ", both" if len(gaps) == 2 else ""))


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _interval(fields: dict) -> Interval:
    return Interval(**fields)


def _fact(summary: dict, key: str, default: object = None):
    """What is known of the run beside the verb's own numbers, under `facts` of a summary: `pair` and `class`, how many of the errors that are sought an error has of its two classes,
    and of its true class, on average; `before_logits`, the layers before a last convolution that makes the logits."""
    return summary.get("facts", {}).get(key, default)


def _at(curve: dict, place: int, n: int) -> Interval:
    return Interval(*(curve[key][place] for key in ("mean", "low", "high")), n)


def _nearest(values: list[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


# ---- profile: figures 1 and 2 --------------------------------------------------------------------------------------


def _both_groups(summary: dict) -> Finding | None:
    """What there is to say where not both groups are there."""
    groups = summary["groups"]
    if len(groups) == 2:
        return None
    only = next(iter(groups))
    return Finding("", "", UNTESTABLE, f"all {groups[only]['samples']:,} samples are {only}: there are no two groups to compare")


def errors_are_salient(summary: dict) -> Finding:
    if alone := _both_groups(summary):
        return alone
    wrong, right = (summary["groups"][name] for name in ("misclassified", "correct"))
    ours = f"mean standardised saliency {wrong['saliency']['estimate']:+.2f} of errors, {right['saliency']['estimate']:+.2f} of correct samples"
    return judged(ours, {"errors - correct": _interval(summary["saliency_difference"])}, min(wrong["samples"], right["samples"]))


def deep_and_early(summary: dict) -> Finding:
    if alone := _both_groups(summary):
        return alone
    wrong, right = (summary["groups"][name] for name in ("misclassified", "correct"))
    thirds = [f"{words} {group['thirds']['early']['estimate']:+.2f} early, {group['thirds']['deep']['estimate']:+.2f} deep" for words, group in (("errors", wrong), ("correct", right))]
    gaps = {"errors: deep - early": _interval(wrong["deep_minus_early"]), "correct: early - deep": turned(_interval(right["deep_minus_early"]))}
    return judged("mean by thirds of the layers: " + "; ".join(thirds), gaps, min(wrong["samples"], right["samples"]))


# ---- prune: figure 3 -----------------------------------------------------------------------------------------------


def _pruned(summary: dict, column: str, paired: str, sign: str) -> tuple[str, dict[str, Interval]]:
    """(the figures, the two gaps) of most salient - random and random - least salient."""
    at, n = _nearest(summary["k"], NEAR), summary["samples"]
    of = {s: _at(summary["curves"][s][column], at, n) for s in ("salient", "random_live", "least")}
    known = summary.get(paired, {})
    gaps = {}
    for (a, b), words in {("salient", "random_live"): "most salient - random", ("random_live", "least"): "random - least salient"}.items():
        gaps[words] = _interval(known[f"{a}_minus_{b}"]) if f"{a}_minus_{b}" in known else apart(of[a], of[b])
    k = summary["k"][at]
    ours = f"{k} filter{'s' * (k != 1)} off: most salient {of['salient'].estimate:{sign}.3f}, random {of['random_live'].estimate:{sign}.3f}, least salient {of['least'].estimate:{sign}.3f}"
    return ours, gaps


def pruning_corrects(summary: dict) -> Finding:
    ours, gaps = _pruned(summary, "corrected", "paired", "")
    finding = judged(ours, gaps, summary["samples"])
    before = _fact(summary, "before_logits")
    if finding.verdict in (NOT, UNDECIDED) and before and not summary.get("layers"):
        return replace(finding, why=f"{finding.why}; the last layer has one filter a class and makes the logits, so that a true class that is turned off cannot win: faultline prune --layers {before} leaves it alone")
    return finding


def pruning_lowers_confidence(summary: dict) -> Finding:
    ours, gaps = _pruned(summary, "wrong_confidence_change", "paired_wrong", "+")
    return judged(ours, {name.replace("most salient - random", "random - most salient").replace("random - least salient", "least salient - random"): turned(gap) for name, gap in gaps.items()}, summary["samples"])


# ---- neighbors: section 3.2, figures 4 and 5 -----------------------------------------------------------------------


def _share(summary: dict, setting: str) -> Interval:
    curve = summary["pair_shares"][setting]["either"]
    return _at(curve, min(summary["near"], len(curve["mean"])) - 1, summary["queries"])


def _pairs_are_there(summary: dict) -> Finding | None:
    """Agreement can be asked for only where an error has others of its pair to be found."""
    alike = _fact(summary, "pair", summary["chance"] * summary["queries"])
    if alike >= 1:
        return None
    return Finding("", "", UNTESTABLE, f"an error has {alike:.2g} others of the same two classes to be found on average: neighbours cannot agree; a data set with many images of each class can tell")


def neighbours_agree(summary: dict) -> Finding:
    if alone := _pairs_are_there(summary):
        return alone
    share, chance = _share(summary, "standardised"), summary["chance"]
    gap = Interval(share.estimate - chance, share.low - chance, share.high - chance, share.n)
    return judged(f"{share.estimate:.3f} of the {summary['near']} nearest, {chance:.3f} by chance", {"neighbours - chance": gap}, summary["queries"])


def standardising_matters(summary: dict) -> Finding:
    if alone := _pairs_are_there(summary):
        return alone
    with_, without = _share(summary, "standardised"), _share(summary, "unstandardised")
    return judged(f"{with_.estimate:.3f} with, {without.estimate:.3f} without", {"with - without": apart(with_, without)}, summary["queries"])


def errors_are_near_errors(summary: dict) -> Finding:
    near, base = _at(summary["error_shares"], min(summary["near"], len(summary["error_shares"]["mean"])) - 1, summary["queries"]), summary["base_rate"]
    gap = Interval(near.estimate - base, near.low - base, near.high - base, near.n)
    return judged(f"{near.estimate:.3f} of the {summary['near']} nearest of all samples are errors, {base:.3f} of all samples", {"neighbours - all": gap}, summary["queries"])


def early_layers_see_colours(summary: dict) -> Finding:
    distance = summary["colour_distance"]
    if not distance:
        return Finding("", "", UNTESTABLE, "no thumbnail could be read: colours are not known")
    ours = f"colour distance of neighbours {distance['first']['estimate']:.3f} by the early layers, {distance['last']['estimate']:.3f} by the deep ones, {distance['random']['estimate']:.3f} of random errors"
    gaps = {"deep - early": turned(_interval(summary["colour_differences"]["first_minus_last"])), "random - early": turned(_interval(summary["colour_differences"]["first_minus_random"]))}
    return judged(ours, gaps, gaps["deep - early"].n)


def deep_layers_see_confusions(summary: dict) -> Finding:
    if alone := _pairs_are_there(summary):
        return alone
    first, last = _share(summary, "first"), _share(summary, "last")
    return judged(f"same two classes: {last.estimate:.3f} by the deep layers, {first.estimate:.3f} by the early ones", {"deep - early": apart(last, first)}, summary["queries"])


# ---- finetune: figure 6, and its other side ------------------------------------------------------------------------


def _step(summary: dict, strategy: str, column: str) -> Interval | None:
    """Of the k and rate that claims are about."""
    rate = summary["rates"][_nearest(summary["rates"], RATE)]
    known = [e for e in summary["effects"] if e["strategy"] == strategy and e["rate"] == rate and column in e]
    return _interval(min(known, key=lambda e: abs(e["k"] - NEAR))[column]) if known else None


def _steps(summary: dict, column: str, strategies: tuple[str, ...]) -> tuple[dict[str, Interval], dict[str, Interval]] | None:
    """(each strategy's effect, each one's less that of the most salient filters); None where there is nothing that the step could be tried on."""
    of = {s: _step(summary, s, column) for s in ("salient", *strategies)}
    if any(value is None for value in of.values()):
        return None
    known = {p["strategy"]: _interval(p[column]) for p in summary.get("paired", ()) if column in p}
    return of, {s: known.get(s) or apart(of[s], of["salient"]) for s in strategies}


def steps_correct_neighbours(summary: dict) -> Finding:
    alike = _fact(summary, "class")
    if alike is not None and alike < 1:
        return Finding("", "", UNTESTABLE, f"an error of {summary['dataset']} has {alike:.2g} errors of its class in {summary['within']} on average: a step for its class can mend none; a held-out set with many images of each class can tell")
    steps = _steps(summary, "neighbors_corrected", ("random_live", "least"))
    if steps is None:
        return Finding("", "", UNTESTABLE, f"{summary['within']} has no misclassified sample to try a step on")
    of, gaps = steps
    k = summary["k"][_nearest(summary["k"], NEAR)]
    ours = f"{k} filter{'s' * (k != 1)}: most salient {of['salient'].estimate:.3f}, random {of['random_live'].estimate:.3f}, least salient {of['least'].estimate:.3f}"
    if whole := _step(summary, "all", "neighbors_corrected"):
        ours += f"; the whole network {whole.estimate:.3f}"
    return judged(ours, {"most salient - random": turned(gaps["random_live"]), "most salient - least salient": turned(gaps["least"])}, min(gap.n for gap in gaps.values()))


def whole_network_breaks_more(summary: dict) -> Finding:
    steps = _steps(summary, "broken", ("all",))
    if steps is None:
        return Finding("", "", UNTESTABLE, f"{summary['within']} has no correctly classified sample to try a step on")
    of, gaps = steps
    return judged(f"correct samples broken: whole network {of['all'].estimate:.3f}, most salient filters {of['salient'].estimate:.3f}", {"whole network - most salient": gaps["all"]}, gaps["all"].n)


# ---- mask: sections 2.2 and 3.4, figure 8 --------------------------------------------------------------------------


def _masked(summary: dict, others: dict[str, str]) -> Finding:
    at = _nearest(summary["shares"], SHARE)
    of = {words: summary["curves"][s]["corrected"]["mean"][at] for s, words in {"salient": "most salient", **others}.items()}
    ours = f"{100 * summary['shares'][at]:g}% masked: " + ", ".join(f"{words} {share:.3f}" for words, share in of.items())
    return judged(ours, {f"most salient - {words}": _interval(summary["paired"][f"salient_minus_{s}"]) for s, words in others.items()}, summary["samples"])


def masking_corrects(summary: dict) -> Finding:
    return _masked(summary, {"random": "random", "least": "least salient"})


def place_matters(summary: dict) -> Finding:
    if "moved" not in summary["curves"]:
        return Finding("", "", UNTESTABLE, "this was not tried")
    return _masked(summary, {"moved": "the same shape elsewhere"})


def _pasted(summary: dict) -> Finding | None:
    return None if summary["transplant"] else Finding("", "", UNTESTABLE, "there is no correctly classified image of an error's class to paste into: a data set with several images of each class can tell")


def transplants_mislead(summary: dict) -> Finding:
    if alone := _pasted(summary):
        return alone
    found = summary["transplant"]
    rises, change = _interval(found["rises"]), _interval(found["change"])
    half = Interval(rises.estimate - 0.5, rises.low - 0.5, rises.high - 0.5, rises.n)
    finding = judged(f"rises in {rises.estimate:.3f} of {found['pairs']:,} images, by {change.estimate:+.4f} on average", {"share that rises - half": half, "change": change}, found["samples"])
    beside = transplants_beat_random(summary).verdict
    return replace(finding, why=f"{finding.why}; but not clearly in more of them than with as many random pixels") if finding.verdict == REPRODUCED and beside in (NOT, UNDECIDED) else finding


def transplants_beat_random(summary: dict) -> Finding:
    if alone := _pasted(summary):
        return alone
    found = summary["transplant"]
    return judged(f"rises in {found['rises']['estimate']:.3f} of {found['pairs']:,} images", {"salient - random": _interval(found["rises_minus_random"])}, found["samples"])


# ---- sanity: Adebayo et al., 2018 ----------------------------------------------------------------------------------


def likeness_falls(summary: dict, columns: dict[str, str]) -> Finding:
    """Likeness to what the trained network says falls, with all layers randomised, by more than half the way to what another sample has, in every measure. (No map falls to nothing: edges stay edges.)"""
    n, words, gaps, more = summary["samples"], [], {}, []
    for column, name in columns.items():
        level = summary["other"][column]
        head, last = (_at(summary[column], at, n) for at in (1, -1))
        words.append(f"{name} 1 before, {head.estimate:.3f} with {summary['stages'][1]} randomised, {last.estimate:.3f} with all layers" + (f"; another sample's {level['estimate']:.3f}" if level else ""))
        half = (1 + (level["estimate"] if level else 0)) / 2
        gaps[f"{name}: half way - what is left"] = Interval(half - last.estimate, half - last.high, half - last.low, n)
        left = _interval(summary["apart"][column]) if level else None
        more += [f"the {name} stays above another sample's by {left.text(3, '+')}"] if left and left.low > 0 else []
    finding = judged("; ".join(words), gaps, n)
    return replace(finding, why=f"{finding.why}; but {_listed(more)}: so much is not what the network has learnt") if finding.verdict == REPRODUCED and more else finding


CLAIMS = (
    Claim("salience", "Errors are more salient", "Section 2.1, figure 2", "Misclassified samples are more salient than correctly classified ones.", "profile", errors_are_salient),
    Claim("depth", "Deep for errors, early for correct samples", "Section 2.1, figure 2", "For misclassified samples the deep layers stand out, for correctly classified ones the early layers.", "profile", deep_and_early),
    Claim("prune", "Salient filters, turned off, correct most", "Figure 3", "Turning off a sample's most salient filters corrects more errors than turning off as many random ones, and those more than the least salient ones.", "prune", pruning_corrects),
    Claim("prune-confidence", "They lower the wrong class's confidence most", "Figure 3", "It lowers the confidence in the wrong class in the same order: most salient, random, least salient.", "prune", pruning_lowers_confidence),
    Claim("agreement", "Near errors are confused alike", "Section 3.2, figure 4", "The nearest errors by saliency confuse the same two classes, far more often than by chance.", "neighbors", neighbours_agree),
    Claim("standardising", "Standardising matters", "Section 3.2", "Standardising the profiles matters: without it neighbours agree less.", "neighbors", standardising_matters),
    Claim("errors", "Errors lie near errors", "Section 3.2", "Errors lie near errors: of the nearest of all samples more are misclassified than of all samples.", "neighbors", errors_are_near_errors),
    Claim("colours", "Early layers find images that look alike", "Section 3.2, figure 5", "By the early layers neighbours look alike: closer in colour than by the deep layers, and than random errors.", "neighbors", early_layers_see_colours),
    Claim("confusions", "Deep layers find the same confusions", "Section 3.2, figure 5", "By the deep layers neighbours are alike in meaning: confused alike more often than by the early layers.", "neighbors", deep_layers_see_confusions),
    Claim("step", "A step on salient filters mends neighbours most", "Figure 6", "One step on the most salient filters of one error corrects more of its nearest held-out errors than a step on as many random or least salient ones.", "finetune", steps_correct_neighbours),
    Claim("broken", "The whole network's step breaks more", "beside figure 6", "At the same rate a step on the whole network breaks more of what was right than one on the most salient filters.", "finetune", whole_network_breaks_more, own=True),
    Claim("mask", "Salient pixels, masked, correct most", "Section 3.4, figure 8", "Masking an error's 5% most salient pixels corrects more errors than masking as many random or least salient ones.", "mask", masking_corrects),
    Claim("place", "Their place matters, not their shape alone", "beside figure 8", "It also corrects more than masking the same shape elsewhere in the image.", "mask", place_matters, own=True),
    Claim("transplant", "Salient regions mislead elsewhere", "Sections 2.2 and 3.4", "Pasted into other images of the class, the salient region raises the wrong class's confidence (the paper: in 39 of 40, by 3.75%).", "mask", transplants_mislead),
    Claim("transplant-random", "More than random pixels do", "beside section 3.4", "It does so in more of them than as many random pixels do.", "mask", transplants_beat_random, own=True),
    Claim("sanity-profiles", "Profiles depend on what was learnt", "Adebayo et al., 2018", "Profiles depend on what the network has learnt: they lose their likeness as its layers are randomised from the top down.", "sanity", partial(likeness_falls, columns={"profile_cosine": "cosine", "profile_rank": "order of filters"})),
    Claim("sanity-maps", "So do heat maps", "Adebayo et al., 2018", "So do the heat maps of salient pixels.", "sanity", partial(likeness_falls, columns={"map_rank": "order of pixels"})),
)  # fmt: skip
