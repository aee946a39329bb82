"""The paper's claims: what decides each verdict, that it turns where an interval crosses 0, and that few samples decide nothing. Summaries are made by hand, as the verbs write them."""

import copy
import json

import pytest
import results_data

from jobs.claims import CLAIMS, NOT, REPRODUCED, UNDECIDED, UNTESTABLE, Finding
from jobs.verdicts import headline, tally, untestable
from pipeline.intervals import FEW

BY_NAME = {claim.name: claim for claim in CLAIMS}
N = 60


def interval(estimate: float, half: float = 0.02, n: int = N) -> dict:
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "n": n}


def curve(values: list[float], half: float = 0.02) -> dict:
    return {"mean": values, "low": [v - half for v in values], "high": [v + half for v in values]}


def profile() -> dict:
    group = lambda saliency, gap: {"samples": N, "saliency": interval(saliency), "deep_minus_early": interval(gap), "thirds": {part: interval(0.1) for part in ("early", "middle", "deep")}}  # noqa: E731
    return {"groups": {"misclassified": group(1.6, 0.3), "correct": group(-0.3, -0.3)}, "saliency_difference": interval(1.9)}


def prune() -> dict:
    shares = {"salient": (0.3, -0.3), "random": (0.1, -0.1), "random_live": (0.1, -0.1), "least": (0.01, -0.01)}
    curves = {s: {"corrected": curve([0.0, share]), "wrong_confidence_change": curve([0.0, change])} for s, (share, change) in shares.items()}
    return {"samples": N, "k": [1, 20], "layers": None, "curves": curves, "paired": {"salient_minus_random_live": interval(0.2), "random_live_minus_least": interval(0.09)}}


def neighbors() -> dict:
    shares = {"standardised": 0.9, "unstandardised": 0.6, "first": 0.4, "last": 0.95}
    return {
        "queries": N, "near": 10, "chance": 0.05, "base_rate": 0.2, "pair_shares": {s: {"either": curve([share] * 50)} for s, share in shares.items()}, "error_shares": curve([0.95] * 50),
        "colour_distance": {"first": interval(0.5), "last": interval(0.55), "random": interval(0.6)}, "colour_differences": {"first_minus_last": interval(-0.05), "first_minus_random": interval(-0.1)},
        "facts": {"pair": 17.0, "class": 30.0},
    }  # fmt: skip


def finetune() -> dict:
    shares = {"salient": (0.5, 0.1), "random_live": (0.25, 0.06), "least": (0.04, 0.02), "all": (0.56, 0.6), "conv": (0.56, 0.5)}
    effects = [{"strategy": s, "k": 20, "rate": 0.5, "neighbors_corrected": interval(repaired), "broken": interval(broken)} for s, (repaired, broken) in shares.items()]
    paired = [{"strategy": s, "minus": "salient", "k": 20, "rate": 0.5, "neighbors_corrected": interval(repaired - 0.5), "broken": interval(broken - 0.1)} for s, (repaired, broken) in shares.items() if s != "salient"]
    return {"dataset": "val", "within": "v2", "samples": N, "k": [20], "rates": [0.5], "effects": effects, "paired": paired, "facts": {"class": 30.0}}


def mask() -> dict:
    shares = {"salient": 0.3, "moved": 0.1, "random": 0.15, "least": 0.02}
    curves = {s: {"corrected": curve([0.0, 0.0, share, 0.5, 0.6])} for s, share in shares.items()}
    pasted = {"samples": N, "pairs": 40, "rises": interval(0.9), "change": interval(0.04), "rises_minus_random": interval(0.3)}
    return {"samples": N, "shares": [0.01, 0.02, 0.05, 0.1, 0.2], "curves": curves, "paired": {f"salient_minus_{s}": interval(0.3 - share) for s, share in shares.items() if s != "salient"}, "transplant": pasted}


def sanity() -> dict:
    falling = {name: curve([1.0, 0.5, 0.2]) for name in ("profile_cosine", "profile_rank", "map_rank")}
    return {"samples": N, "stages": [None, "linear", "conv1"], **falling, "other": {name: interval(0.2) for name in falling}, "apart": {name: interval(0.0) for name in falling}}


SUMMARIES = {"profile": profile, "prune": prune, "neighbors": neighbors, "finetune": finetune, "mask": mask, "sanity": sanity}


def verdict(name: str, summary: dict) -> str:
    return BY_NAME[name].find(summary).verdict


@pytest.mark.parametrize("name", BY_NAME)
def test_a_claim_that_holds_clearly_is_reproduced(name):
    found = BY_NAME[name].find(SUMMARIES[BY_NAME[name].verb]())
    assert found.verdict == REPRODUCED and found.ours and found.interval and "clearly apart" in found.why


def set_at(summary: dict, path: tuple, value: object) -> dict:
    changed = copy.deepcopy(summary)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


# the interval that decides each claim, and by which sign it is claimed to differ from 0
DECIDES = {
    "salience": [(("saliency_difference",), 1)],
    "depth": [(("groups", "misclassified", "deep_minus_early"), 1), (("groups", "correct", "deep_minus_early"), -1)],
    "prune": [(("paired", "salient_minus_random_live"), 1), (("paired", "random_live_minus_least"), 1)],
    "prune-confidence": [(("paired_wrong",), -1)],
    "colours": [(("colour_differences", "first_minus_last"), -1), (("colour_differences", "first_minus_random"), -1)],
    "step": [(("paired", 0, "neighbors_corrected"), -1), (("paired", 1, "neighbors_corrected"), -1)],
    "broken": [(("paired", 2, "broken"), 1)],
    "mask": [(("paired", "salient_minus_random"), 1), (("paired", "salient_minus_least"), 1)],
    "place": [(("paired", "salient_minus_moved"), 1)],
    "transplant": [(("transplant", "change"), 1)],
    "transplant-random": [(("transplant", "rises_minus_random"), 1)],
}


@pytest.mark.parametrize("name, path, sign", [(name, path, sign) for name, paths in DECIDES.items() for path, sign in paths], ids=str)
def test_a_verdict_turns_where_the_interval_crosses_zero(name, path, sign):
    """Just above 0 it is reproduced; over 0 it is undecided, since not clearly apart; below 0 it is the other way round, and refuted."""
    for low, high, expected, why in ((0.001, 0.05, REPRODUCED, "clearly apart"), (0.0, 0.05, UNDECIDED, "not clearly apart"), (-0.001, 0.05, UNDECIDED, "not clearly apart"), (-0.05, 0.0, UNDECIDED, "not clearly apart"), (-0.05, -0.001, NOT, "the other way round"), (float("nan"), float("nan"), UNDECIDED, "not clearly")):
        ends = sorted((sign * low, sign * high)) if low == low else (low, high)
        fields = {"estimate": sum(ends) / 2, "low": ends[0], "high": ends[1], "n": N}
        value = {key: fields for key in ("salient_minus_random_live", "random_live_minus_least")} if path == ("paired_wrong",) else fields
        found = BY_NAME[name].find(set_at(SUMMARIES[BY_NAME[name].verb](), path, value))
        assert found.verdict == expected and why in found.why, (low, high, found)


def shares_of(summary: dict, setting: str, values: float) -> dict:
    return set_at(summary, ("pair_shares", setting, "either"), curve([values] * 50))


def test_shares_of_neighbours_are_held_against_chance_and_each_other():
    """Where the samples' own differences are not known, both intervals must lie apart."""
    assert verdict("agreement", shares_of(neighbors(), "standardised", 0.071)) == REPRODUCED and verdict("agreement", shares_of(neighbors(), "standardised", 0.069)) == UNDECIDED
    assert verdict("standardising", shares_of(neighbors(), "unstandardised", 0.85)) == REPRODUCED and verdict("standardising", shares_of(neighbors(), "unstandardised", 0.87)) == UNDECIDED
    assert verdict("confusions", shares_of(neighbors(), "first", 0.90)) == REPRODUCED and verdict("confusions", shares_of(neighbors(), "first", 0.92)) == UNDECIDED
    assert verdict("errors", neighbors() | {"base_rate": 0.92}) == REPRODUCED and verdict("errors", neighbors() | {"base_rate": 0.94}) == UNDECIDED and verdict("errors", neighbors() | {"base_rate": 0.98}) == NOT


def test_summaries_without_paired_differences_are_judged_by_both_intervals():
    summary = {key: value for key, value in prune().items() if key != "paired"}
    assert verdict("prune", summary) == REPRODUCED
    summary["curves"]["random_live"]["corrected"] = curve([0.0, 0.27])
    assert verdict("prune", summary) == UNDECIDED and "most salient - random" in BY_NAME["prune"].find(summary).why
    assert verdict("step", {key: value for key, value in finetune().items() if key != "paired"}) == REPRODUCED


@pytest.mark.parametrize("name", BY_NAME)
def test_few_samples_decide_nothing(name):
    few = FEW - 1

    def shrunk(value):
        if isinstance(value, dict):
            return {key: few if key in ("n", "samples", "queries") else shrunk(inner) for key, inner in value.items()}
        return [shrunk(inner) for inner in value] if isinstance(value, list) else value

    found = BY_NAME[name].find(shrunk(SUMMARIES[BY_NAME[name].verb]()))
    assert found.verdict == UNTESTABLE and "9 samples are too few" in found.why


def test_what_is_not_there_is_not_testable():
    assert all(claim.find(None, "it was refused").verdict == UNTESTABLE and claim.find(None, "it was refused").why == "it was refused" for claim in CLAIMS)
    for name in ("transplant", "transplant-random"):
        assert "paste into" in BY_NAME[name].find(mask() | {"transplant": None}).why
    assert verdict("colours", neighbors() | {"colour_distance": {}, "colour_differences": {}}) == UNTESTABLE
    alone = profile()
    del alone["groups"]["correct"]
    assert "all 60 samples are misclassified" in BY_NAME["salience"].find(alone).why and verdict("depth", alone) == UNTESTABLE
    nobody = finetune()
    for effect in nobody["effects"]:
        effect.pop("neighbors_corrected")
    assert "v2 has no misclassified sample" in BY_NAME["step"].find(nobody).why and verdict("broken", nobody) == REPRODUCED


def test_numbers_of_another_version_are_told():
    old = {key: value for key, value in neighbors().items() if key != "colour_differences"}
    assert "remove experiments/neighbors/summary.json" in BY_NAME["colours"].find(old).why and verdict("agreement", old) == REPRODUCED


def test_one_photograph_a_class_can_neither_agree_nor_be_mended():
    rare = {"facts": {"pair": 0.011, "class": 0.0}}
    assert {verdict(name, neighbors() | rare) for name in ("agreement", "standardising", "confusions")} == {UNTESTABLE}
    assert verdict("errors", neighbors() | rare) == REPRODUCED and verdict("colours", neighbors() | rare) == REPRODUCED
    assert "0 errors of its class in v2" in BY_NAME["step"].find(finetune() | rare).why and verdict("broken", finetune() | rare) == REPRODUCED


def test_a_last_layer_that_makes_the_logits_is_named_where_it_decides():
    reverse = set_at(prune(), ("paired", "salient_minus_random_live"), interval(-0.1)) | {"facts": {"before_logits": "features.0..features.12"}}
    assert "--layers features.0..features.12" in BY_NAME["prune"].find(reverse).why
    assert "--layers" not in BY_NAME["prune"].find(reverse | {"layers": "features.0..features.12"}).why


@pytest.mark.parametrize("name, column", [("sanity-profiles", "profile_cosine"), ("sanity-profiles", "profile_rank"), ("sanity-maps", "map_rank")])
def test_likeness_that_stays_is_not_what_was_learnt(name, column):
    """Half the way to another sample's 0.2 is 0.6: what is left must lie clearly below that. More than another sample has may be left, and is told."""
    for left, expected in ((0.99, NOT), (0.63, NOT), (0.61, UNDECIDED), (0.59, UNDECIDED), (0.57, REPRODUCED), (0.1, REPRODUCED)):
        assert verdict(name, set_at(sanity(), (column,), curve([1.0, 0.8, left]))) == expected, left
    stays = BY_NAME[name].find(set_at(sanity(), ("apart", column), interval(0.03, 0.01)))
    assert stays.verdict == REPRODUCED and "stays above another sample's by +0.030 (+0.020 to +0.040)" in stays.why
    assert verdict(name, set_at(sanity(), ("other", column), None)) == REPRODUCED


def test_a_transplant_that_random_pixels_equal_is_told_so():
    """The paper's own claim is that confidence rises; what rises as much by chance is not evidence for the region."""
    found = BY_NAME["transplant"].find(set_at(mask(), ("transplant", "rises_minus_random"), interval(0.01)))
    assert found.verdict == REPRODUCED and "not clearly in more of them than with as many random pixels" in found.why
    assert verdict("transplant", set_at(mask(), ("transplant", "rises"), interval(0.51))) == UNDECIDED


def test_what_the_paper_does_not_claim_is_not_counted():
    found = [(claim, Finding("", "", REPRODUCED, "")) for claim in CLAIMS]
    assert tally(found) == {REPRODUCED: sum(not claim.own for claim in CLAIMS), NOT: 0, UNDECIDED: 0, UNTESTABLE: 0} and sum(claim.own for claim in CLAIMS) == 3
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) and {claim.verb for claim in CLAIMS} == set(SUMMARIES)


def test_one_gap_that_is_reversed_refutes_and_one_that_is_unclear_leaves_it_open():
    """The claim of masking has two: against random and against the least salient pixels."""
    gaps = lambda random, least: mask() | {"paired": {"salient_minus_random": interval(random), "salient_minus_least": interval(least), "salient_minus_moved": interval(0.1)}}  # noqa: E731
    for random, least, expected in ((0.1, 0.1, REPRODUCED), (0.0, 0.1, UNDECIDED), (0.0, 0.0, UNDECIDED), (-0.1, 0.1, NOT), (-0.1, 0.0, NOT)):
        assert verdict("mask", gaps(random, least)) == expected
    assert BY_NAME["mask"].find(gaps(0.0, 0.1)).why == "not clearly apart: most salient - random"


def test_the_headline_has_all_four_and_says_why_nothing_can_be_tested():
    found = [(claim, Finding("", "", verdict, "")) for claim, verdict in zip([c for c in CLAIMS if not c.own], [REPRODUCED] * 9 + [NOT] * 2 + [UNDECIDED] * 2 + [UNTESTABLE])]
    assert headline(found) == "9 of 14 claims reproduced, 2 not reproduced, 2 undecided, 1 not testable here" and untestable(found) is None
    nothing = [(claim, Finding("", "", UNTESTABLE, "no sample of val is misclassified" if at else "another reason")) for at, claim in enumerate(CLAIMS)]
    assert headline(nothing) == "none of the 14 claims can be tested here (no sample of val is misclassified)"


def kept(name: str, **facts: float) -> dict:
    return json.loads((results_data.DATA / f"{name}.json").read_text(encoding="utf-8")) | {"facts": facts}


def test_verdicts_agree_with_the_page_of_results():
    """docs/results.md, "figure | claim | here"."""
    resnet = {"profile": kept("resnet56-profile"), "prune": kept("resnet56-prune"), "neighbors": kept("resnet56-v2-neighbors"), "finetune": kept("resnet56-v2-finetune"), "mask": kept("resnet56-mask"), "sanity": kept("resnet56-sanity")}
    squeeze = {"profile": kept("squeezenet1_1-profile"), "prune": kept("squeezenet1_1-prune", before_logits="features.0..features.12.expand3x3"), "neighbors": kept("squeezenet1_1-neighbors"), "finetune": kept("squeezenet1_1-halves-finetune", **{"class": 0.0}), "mask": kept("squeezenet1_1-mask"), "sanity": kept("squeezenet1_1-sanity")}
    found = [{claim.name: claim.find(of[claim.verb]).verdict for claim in CLAIMS if claim.verb in of} for of in (resnet, squeeze)]
    expected = {
        "salience": (REPRODUCED, REPRODUCED), "depth": (NOT, NOT), "prune": (REPRODUCED, NOT), "prune-confidence": (REPRODUCED, REPRODUCED), "agreement": (REPRODUCED, UNTESTABLE), "standardising": (REPRODUCED, UNTESTABLE),
        "errors": (REPRODUCED, REPRODUCED), "colours": (REPRODUCED, UNDECIDED), "confusions": (REPRODUCED, UNTESTABLE), "step": (REPRODUCED, UNTESTABLE), "broken": (REPRODUCED, REPRODUCED),
        "mask": (UNDECIDED, UNDECIDED), "place": (UNDECIDED, UNDECIDED), "transplant": (REPRODUCED, UNTESTABLE), "transplant-random": (REPRODUCED, UNTESTABLE), "sanity-profiles": (REPRODUCED, REPRODUCED), "sanity-maps": (REPRODUCED, REPRODUCED),
    }  # fmt: skip
    assert {name: (found[0][name], found[1][name]) for name in found[0]} == expected
