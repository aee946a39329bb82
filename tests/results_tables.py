"""The tables and pictures of docs/results.md, from what the verbs of the evidence wrote.

`python tests/results_tables.py keep RUN VERB NAME` takes experiments/VERB of a run into docs/data/results/NAME.json and docs/images/results/;
`python tests/results_tables.py most RUN DATASET NAME` counts where the most salient filters of each sample lie, into docs/data/results/NAME.json;
`python tests/results_tables.py` writes the tables into the page, between its markers. reference.json holds the figures of independent scripts.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import explanation_tables
from results_data import ROOT, keep, kept, most

PAGE = ROOT / "docs/results.md"
STRATEGIES = {"salient": "most salient", "random": "random", "random_live": "random, live alone", "least": "least salient, live alone", "all": "whole network", "conv": "all conv weights"}


# ---- cells ---------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def cell(interval: dict, digits: int = 3, sign: str = "") -> str:
    """`0.247 (0.227 to 0.268)`."""
    return f"{interval['estimate']:{sign}.{digits}f} ({interval['low']:{sign}.{digits}f} to {interval['high']:{sign}.{digits}f})"


def at(curve: dict, place: int) -> dict:
    """One point of a curve as an interval."""
    return {"estimate": curve["mean"][place], "low": curve["low"][place], "high": curve["high"][place]}


def effect(summary: dict, strategy: str, k: int | None, rate: float) -> dict:
    """The only one of `finetune` with that strategy, k (None: there is one) and rate."""
    (found,) = (e for e in summary["effects"] if e["strategy"] == strategy and e["rate"] == rate and k in (None, e["k"]))
    return found


# ---- figures 1 and 2 -----------------------------------------------------------------------------------------------


def depth() -> str:
    one, other, reference = kept("resnet56-profile"), kept("squeezenet1_1-profile"), kept("reference")["one"]
    both = (("misclassified", "errors"), ("correct", "correct samples"))
    rows = [["misclassified, of all", *(f"{s['groups']['misclassified']['samples']:,} of {sum(g['samples'] for g in s['groups'].values()):,}" for s in (one, other)), f"{reference['misclassified']:,} of 10,000"]]
    rows.append(["filters, and dead ones", *(f"{sum(map(len, s['sorted_within_layers']['saliency'])):,}, {s['dead_filters']}" for s in (one, other)), f"2,032, {reference['dead_filters']}"])
    rows += [[f"mean ŝ of {shown}", *(cell(s["groups"][group]["saliency"], 2) for s in (one, other)), f"{reference['saliency'][group]:.2f}"] for group, shown in both]
    rows.append(["difference", *(cell(s["saliency_difference"], 2) for s in (one, other)), ""])
    for group, shown in both:
        rows += [[f"{shown}: {part} third of the layers", *(cell(s["groups"][group]["thirds"][part]) for s in (one, other)), ""] for part in ("early", "middle", "deep")]
        rows.append([f"{shown}: deep minus early", *(cell(s["groups"][group]["deep_minus_early"], 3, "+") for s in (one, other)), ""])
    return table(["", "ResNet-56", "SqueezeNet 1.1", "ResNet-56, an independent script"], rows)


def most_salient() -> str:
    """Where the filters lie that stand out most in each sample."""
    rows = []
    for name, network in (("resnet56", "ResNet-56"), ("squeezenet1_1", "SqueezeNet 1.1")):
        found = kept(f"{name}-most")
        rows += [[f"{network}, {words}", *(f"{found[key][part]:.3f}" for part in ("early", "middle", "deep"))] for key, words in (("filters", "all live filters"), ("misclassified", "errors"), ("correct", "correct samples"))]
    rows.append(["SqueezeNet 1.1, errors whose most salient filter is the output of the true class", "", "", f"{kept('squeezenet1_1-most')['true_class_first']:.3f}"])
    rows.append(["SqueezeNet 1.1, errors with the output of the wrong class among the 20", "", "", f"{kept('squeezenet1_1-most')['predicted_class_among']:.3f}"])
    return table(["share of the 20 most salient filters that lies in the third", "early", "middle", "deep"], rows)


# ---- figure 3 ------------------------------------------------------------------------------------------------------


def pruned() -> str:
    summary, reference = kept("resnet56-prune"), kept("reference")["one"]["prune"]
    script = {s: dict(zip(reference["k"], values)) for s, values in reference["corrected"].items()}
    head = ["filters turned off", *(text for s in ("salient", "random", "random_live", "least") for text in (STRATEGIES[s], *(["script"] if s in script else [])))]
    rows = []
    for place, k in enumerate(summary["k"]):
        row = [str(k)]
        for strategy in ("salient", "random", "random_live", "least"):
            row.append(cell(at(summary["curves"][strategy]["corrected"], place)))
            row += [f"{script[strategy][k]:.3f}" if k in script[strategy] else ""] if strategy in script else []
        rows.append(row)
    return table(head, rows)


def pruned_confidence() -> str:
    summary, reference = kept("resnet56-prune"), kept("reference")["one"]["prune"]["at_20"]
    place = summary["k"].index(20)
    rows = []
    for column, shown in (("wrong_confidence_change", "wrong class"), ("true_confidence_change", "true class")):
        for strategy in ("salient", "random", "random_live", "least"):
            script = reference[column].get(strategy)
            rows.append([f"{shown}, {STRATEGIES[strategy]}", cell(at(summary["curves"][strategy][column], place), 3, "+"), "" if script is None else f"{script:+.3f}"])
    return table(["change of confidence, 20 filters off", "ResNet-56", "script"], rows)


def pruned_as_in_the_paper() -> str:
    return _pruned("resnet56-prune-weights-and-bias")


def pruned_squeezenet() -> str:
    return _pruned("squeezenet1_1-prune")


def pruned_features() -> str:
    return _pruned("squeezenet1_1-prune-features")


PRUNED = {"resnet56-prune": "ResNet-56", "resnet56-prune-weights-and-bias": "ResNet-56, the paper's way", "squeezenet1_1-prune": "SqueezeNet 1.1", "squeezenet1_1-prune-features": "SqueezeNet 1.1 without the last layer"}


def pruned_paired() -> str:
    """Differences between strategies on the same samples, at 20 filters."""
    gaps = {"salient_minus_random_live": "most salient less random", "random_live_minus_least": "random less least salient"}
    rows = [[shown, *(cell(kept(name)[of][gap], 3, "+") for of in ("paired", "paired_wrong") for gap in gaps)] for name, shown in PRUNED.items()]
    return table(["20 filters off, differences on the same errors", *(f"{what}: {text}" for what in ("corrected", "wrong class") for text in gaps.values())], rows)


def _pruned(name: str) -> str:
    summary = kept(name)
    strategies = ("salient", "random_live", "least")
    head = ["filters turned off", *(f"corrected: {STRATEGIES[s]}" for s in strategies), *(f"wrong class: {STRATEGIES[s]}" for s in strategies)]
    rows = []
    for place, k in enumerate(summary["k"]):
        shares, changes = ([summary["curves"][s][column] for s in strategies] for column in ("corrected", "wrong_confidence_change"))
        rows.append([str(k), *(cell(at(curve, place)) for curve in shares), *(cell(at(curve, place), 3, "+") for curve in changes)])
    return table(head, rows)


# ---- figures 4 and 5 -----------------------------------------------------------------------------------------------

NEIGHBOURS = ("resnet56-neighbors", "resnet56-v2-neighbors", "squeezenet1_1-neighbors")
HEAD = ["", "ResNet-56, 10,000", "script", "ResNet-56, val to v2", "script", "SqueezeNet 1.1, 1,000"]


def _beside(summaries: list[dict], shown: str, ours, one: str = "", two: str = "") -> list[str]:
    """A row: ours of each run, the scripts' beside the first two."""
    first, second, third = (ours(s) for s in summaries)
    return [shown, first, one, second, two, third]


def _share(setting: str, kind: str):
    return lambda summary: cell(at(summary["pair_shares"][setting][kind], summary["near"] - 1))


def pairs() -> str:
    summaries, reference = [kept(name) for name in NEIGHBOURS], kept("reference")
    one, two = reference["one"], reference["two"]
    rows = [_beside(summaries, "errors that ask", lambda s: f"{s['queries']:,}", f"{one['misclassified']:,}")]
    rows += [_beside(summaries, shown, _share("standardised", kind)) for kind, shown in (("same", "same pair"), ("reverse", "reverse pair"))]
    rows.append(_beside(summaries, "**either**", _share("standardised", "either"), f"{one['pairs']['standardised']:.3f}", f"{two['pairs']['standardised']:.3f}"))
    rows.append(_beside(summaries, "either, without standardisation", _share("unstandardised", "either"), f"{one['pairs']['unstandardised']:.3f}"))
    rows.append(_beside(summaries, "either, by chance", lambda s: f"{s['chance']:.3f}", f"{one['chance']:.3f}"))
    rows.append(_beside(summaries, "errors among the nearest of all samples", lambda s: cell(at(s["error_shares"], s["near"] - 1)), f"{one['errors']:.3f}"))
    rows.append(_beside(summaries, "errors among all samples", lambda s: f"{s['base_rate']:.3f}", f"{one['base_rate']:.3f}"))
    return table(HEAD, rows)


def ends() -> str:
    summaries, reference = [kept(name) for name in NEIGHBOURS], kept("reference")["one"]["pairs"]
    rows = [_beside(summaries, f"pair or its reverse, by the {end} third of the filters", _share(end, "either"), f"{reference[end]:.3f}") for end in ("first", "last")]
    shown = {"first": "by the first third", "last": "by the last third", "standardised": "by all filters", "random": "random errors"}
    rows += [_beside(summaries, f"colour distance, {words}", lambda s, setting=setting: cell(s["colour_distance"][setting])) for setting, words in shown.items()]
    rows += [_beside(summaries, f"colour distance, first third minus {words}", lambda s, other=other: cell(s["colour_differences"][f"first_minus_{other}"], 3, "+")) for other, words in (("last", "last third"), ("random", "random errors"))]
    return table(HEAD, rows)


# ---- figure 6 and the frontier -------------------------------------------------------------------------------------

EFFECTS = {"corrected": "the sample itself corrected", "neighbors_corrected": "its 10 nearest v2 errors corrected", "broken": "40 correct v2 samples broken"}
TUNED = ("salient", "random_live", "least", "all", "conv")


def tuned() -> str:
    summary, reference = kept("resnet56-v2-finetune"), kept("reference")["two"]["finetune"]
    rows = []
    for strategy in TUNED:
        found = effect(summary, strategy, 20 if strategy in TUNED[:3] else None, 0.5)
        row = [STRATEGIES[strategy]]
        for column in EFFECTS:
            script, error = reference[column][strategy]
            row += [cell(found[column]), f"{script:.3f}" + (f" ± {error:.3f}" if error else "")]
        rows.append(row)
    return table(["20 filters, rate 0.5", *(text for column in EFFECTS for text in (EFFECTS[column], "script"))], rows)


def tuned_paired() -> str:
    """Differences from the most salient filters' step on the same errors."""
    rows = []
    for name, network in (("resnet56-v2-finetune", "ResNet-56"), ("squeezenet1_1-halves-finetune", "SqueezeNet 1.1")):
        for gap in kept(name)["paired"]:
            rows.append([f"{network}: {STRATEGIES[gap['strategy']]}", *(cell(gap[column], 3, "+") for column in ("neighbors_corrected", "broken"))])
    return table(["less the most salient 20, on the same errors", EFFECTS["neighbors_corrected"], EFFECTS["broken"]], rows)


def tuned_beside() -> str:
    """How far figure 6's shares are from the script's, and how far chance would take them 95 times of 100."""
    rows = []
    for strategy in TUNED:
        row = [STRATEGIES[strategy]]
        for column in EFFECTS:
            own, value, uncertain = comparisons()[f"step, {strategy}, {column.replace('_', ' ')}"]
            row += [f"{own['estimate'] - value:+.3f}", f"{allowed(own, uncertain):.3f}"]
        rows.append(row)
    return table(["ours less the script's", *(text for column in EFFECTS for text in (EFFECTS[column], "by chance up to"))], rows)


def tuned_squeezenet() -> str:
    summary = kept("squeezenet1_1-halves-finetune")
    rows = [[f"{STRATEGIES[e['strategy']]}" + (f", {e['k']}" if e["strategy"] in TUNED[:3] else ""), *(cell(e[column]) for column in EFFECTS)] for e in summary["effects"]]
    return table([f"strategy, filters (rate {summary['rates'][0]:g})", *EFFECTS.values()], rows)


def frontier() -> str:
    """Repaired / broken of every setting."""
    sweep, rows = kept("resnet56-v2-frontier"), []
    for strategy in TUNED:
        for k in sorted({e["k"] for e in sweep["effects"] if e["strategy"] == strategy}):
            found = [effect(sweep, strategy, k, rate) for rate in sweep["rates"]]
            rows.append([STRATEGIES[strategy] + (f", {k}" if strategy in TUNED[:3] else ""), *(f"{e['neighbors_corrected']['estimate']:.3f} / {e['broken']['estimate']:.3f}" for e in found)])
    return table(["strategy, filters", *(f"rate {rate:g}" for rate in sweep["rates"])], rows)


def bargains() -> str:
    """Of every strategy the setting that repairs most among those that break no more than so much, and how far it is from the most salient filters' on the same errors."""
    found, rows = kept("resnet56-v2-frontier")["bargains"], []
    for budget in sorted({b["budget"] for b in found}):
        row = [f"{budget:.2f}"]
        for strategy in TUNED:
            best = next((b for b in found if (b["budget"], b["strategy"]) == (budget, strategy)), None)
            setting = "" if best is None else (f"{best['k']} filters, " if strategy in TUNED[:3] and best["k"] > 1 else "1 filter, " if strategy in TUNED[:3] else "") + f"rate {best['rate']:g}"
            less = f"<br>less the most salient: {cell(best['less_salient']['neighbors_corrected'], 3, '+')}" if best and "less_salient" in best else ""
            row.append(f"{cell(best['neighbors_corrected'])}<br>{setting}, breaks {best['broken']['estimate']:.3f}{less}" if best else "no setting")
        rows.append(row)
    return table(["broken at most", *(STRATEGIES[s] for s in TUNED)], rows)


# ---- speed ---------------------------------------------------------------------------------------------------------


def speed() -> str:
    measured, floor = kept("bench"), kept("bench-floor")
    rows = []
    for verb, unit in (("pruning", "prunings"), ("finetuning", "updates")):
        for setting, found in measured[verb].items():
            ratios = [f"{found[f'ratio_to_{kind}_copy']['wall']:.1f}, {found[f'ratio_to_{kind}_copy']['cpu']:.1f}" for kind in ("float32", "float64")]
            beside = floor[verb][setting]
            rows.append([f"{verb}: {setting}", f"{found['per_minute']['fast']:,} {unit}", f"{found['per_minute']['float32']:,}", *ratios, f"{beside['fast']:.2f}", f"{beside['naive']:.1f}"])
    return table(["", "a minute", "naive copy, float32, a minute", "ratio to it: clock, processor time", "ratio to a float64 copy", "its time in plain forwards", "naive copy's time in plain forwards"], rows)


TABLES = {f.__name__.replace("_", " "): f for f in (depth, most_salient, pruned, pruned_confidence, pruned_as_in_the_paper, pruned_squeezenet, pruned_features, pruned_paired, pairs, ends, tuned, tuned_beside, tuned_paired, tuned_squeezenet, frontier, bargains, speed)}
TABLES |= {f.__name__.replace("_", " "): partial(f, kept, table, cell) for f in (explanation_tables.masked, explanation_tables.masked_apart, explanation_tables.pasted, explanation_tables.sanity)}


# ---- what the scripts say beside it --------------------------------------------------------------------------------


def allowed(own: dict, uncertain: float) -> float:
    """By how much two independent figures may differ by chance, at 95%: our interval's half length and the script's together."""
    return (max(own["high"] - own["estimate"], own["estimate"] - own["low"]) ** 2 + uncertain**2) ** 0.5


def comparisons() -> dict[str, tuple[dict, float, float]]:
    """What was measured twice: (our interval, the scripts' figure, by how much that figure itself is uncertain, at 95%)."""
    profile, prune, one, two, tune = (kept(f"resnet56-{name}") for name in ("profile", "prune", "neighbors", "v2-neighbors", "v2-finetune"))
    reference = kept("reference")
    found = {f"saliency of {group}": (profile["groups"][group]["saliency"], value, 0.005) for group, value in reference["one"]["saliency"].items()}
    found |= {f"pairs, {setting}": (at(one["pair_shares"][setting]["either"], 9), value, 0.0006) for setting, value in reference["one"]["pairs"].items()}
    found |= {"pairs, val to v2": (at(two["pair_shares"]["standardised"]["either"], 9), reference["two"]["pairs"]["standardised"], 0.0006)}
    found |= {"errors among all": (at(one["error_shares"], 9), reference["one"]["errors"], 0.0006)}
    script = reference["one"]["prune"]
    n = prune["samples"]
    drawn = {"random": lambda share: 1.96 * (share * (1 - share) / n) ** 0.5}
    for strategy, values in script["corrected"].items():
        for k, value in zip(script["k"], values):
            if (strategy, k) != ("least", 100):  # the scripts' choice had the dead among the least; without them:
                found[f"{strategy}, {k} filters off"] = (at(prune["curves"][strategy]["corrected"], prune["k"].index(k)), value, drawn.get(strategy, lambda _: 0.0006)(value))
    found["least, 100 filters off"] = (at(prune["curves"]["least"]["corrected"], prune["k"].index(100)), script["least_without_the_dead_at_100"], 0.0006)
    for column, values in script["at_20"].items():
        for strategy, value in values.items():
            found[f"{strategy}, {column.replace('_', ' ')}"] = (at(prune["curves"][strategy][column], prune["k"].index(20)), value, 0.015 if strategy == "random" else 0.0006)
    script = reference["two"]["finetune"]
    for column in EFFECTS:
        for strategy, (value, error) in script[column].items():
            own = effect(tune, strategy, 20 if strategy in TUNED[:3] else None, 0.5)[column]
            half = max(own["high"] - own["estimate"], own["estimate"] - own["low"]) * (own["n"] / script["samples"]) ** 0.5  # where the scripts have none: ours, for as many samples as theirs
            found[f"step, {strategy}, {column.replace('_', ' ')}"] = (own, value, 1.96 * error if error else half)
    return found


def page() -> str:
    """docs/results.md with its tables as the data has them; the words around them are the page's own."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, f"docs/results.md has no place for '{name}'"
        text = f"{before}{begin}\n{made()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(Path(sys.argv[2]), *sys.argv[3:5])
    elif sys.argv[1:2] == ["most"]:
        most(Path(sys.argv[2]), *sys.argv[3:5])
    else:
        PAGE.write_text(page(), encoding="utf-8")
