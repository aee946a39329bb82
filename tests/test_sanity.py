"""`faultline sanity`: what is randomised, in which order and of whose network; similarities beside scipy; rows beside explicit copies; what the sentence says."""

from __future__ import annotations

import copy
import json

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import zoo
from scipy import stats
from test_interventions_jobs import images as images_of, profiles, rows_of, standardised, wrong
from torch import nn

from jobs.sanity import found as sentence
from pipeline.errors import BadRequest
from pipeline.explanation.input_saliency import InputSaliency
from pipeline.explanation.sanity import cascade, cosine, rank_within_layers, spearman, stages, top_down
from pipeline.filters import FilterLayout
from pipeline.statistics import Reference

MEASURES = ("profile_cosine", "profile_cosine_lively", "profile_rank", "map_rank")


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: dict, after: dict, network: nn.Module) -> set[str]:
    """Parameters that are not what they were."""
    return {name for name, _ in network.named_parameters() if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("animal", zoo.ZOO, ids=lambda animal: animal.id)
def test_each_stage_holds_the_ones_before_and_the_last_is_everything(animal):
    """Parameters keep their entries and lose their places; the caller's network is bit-equal afterwards, and carries no hook."""
    network, (images, _) = animal.make(), zoo.images(4)
    before, plan = values(network), stages(network, images[:1])
    shuffled: set[str] = set()
    for stage, randomised in zip(plan, cascade(network, plan, 0, images)):
        now = changed(before, values(randomised), randomised)
        assert shuffled < now, stage
        for name in shuffled:
            assert torch.equal(values(randomised)[name], seen[name]), "what a stage has randomised stays as it is"
        seen, shuffled = values(randomised), now
        assert randomised(images).isfinite().all() and not any(module.training for module in randomised.modules())
    assert {name for name, p in network.named_parameters() if len(p.unique()) > 1} == shuffled
    for name, p in randomised.named_parameters():
        assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for net in (network, randomised) for m in net.modules())
    assert sum(len(stage.modules) for stage in plan) == len(top_down(network, images[:1]))


class Reversed(nn.Module):
    """Written down from its output to its input."""

    def __init__(self):
        super().__init__()
        self.out, self.last, self.norm, self.first = nn.Linear(4, 5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
        self.unused, self.scale = nn.Conv2d(2, 2, 1), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.out(self.last(torch.relu(self.norm(self.first(x)))).mean((2, 3)) * self.scale)


def test_the_order_is_that_of_a_forward():
    torch.manual_seed(0)
    network, (images, _) = Reversed().eval(), zoo.images(4)
    assert top_down(network, images) == ["out", "last", "norm", "first", "", "unused"] or top_down(network, images)[:4] == ["out", "last", "norm", "first"]
    plan = stages(network, images)
    assert [stage.layer for stage in plan][:3] == ["out", "last", "first"]
    before, steps = values(network), cascade(network, plan, 0, images)
    assert changed(before, values(next(steps)), network) == {"out.weight", "out.bias"}, "the head alone"
    assert changed(before, values(next(steps)), network) == {"out.weight", "out.bias", "last.weight", "last.bias"}


def test_layers_are_cut_evenly():
    network = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(22)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)).eval()
    plan = stages(network, zoo.images(1)[0])
    assert [stage.layer for stage in plan] == ["24", "19", "16", "13", "10", "7", "4", "0"] or [len(stage.modules) for stage in plan] == [1, 3, 3, 3, 3, 3, 3, 4]
    assert [stage.layer for stage in stages(network, zoo.images(1)[0], 2)] == ["24", "11", "0"]


def test_the_seed_decides():
    network, (images, _) = zoo.ZOO[0].make(), zoo.images(4)
    plan = stages(network, images)
    *_, one = cascade(network, plan, 3, images)
    *_, same = cascade(network, plan, 3, images)
    *_, other = cascade(network, plan, 4, images)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values()))
    assert changed(values(one), values(other), one) == {name for name, p in one.named_parameters() if len(p.unique()) > 1}


def test_batchnorms_of_the_randomised_part_measure_what_they_see_and_others_do_not():
    """Beside a hand-made forward; a deep network stays alive."""
    network, (images, _) = zoo.ZOO[0].make(), zoo.images(6)
    plan = stages(network, images)
    before = values(network)
    steps = cascade(network, plan, 0, images)
    assert all(torch.equal(value, before[name]) for name, value in next(steps).state_dict().items() if "running" in name), "the head alone: all BatchNorms are below it"
    *_, randomised = steps
    first, norm = randomised[0][0], randomised[0][1]
    with torch.no_grad():
        seen = nn.functional.conv2d(images, first.weight, first.bias).double()
    assert torch.allclose(norm.running_mean.double(), seen.mean((0, 2, 3)), atol=1e-5) and torch.allclose(norm.running_var.double(), seen.var((0, 2, 3)), rtol=1e-4)
    deep = nn.Sequential(*(layer for _ in range(60) for layer in (nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)).eval()
    *_, randomised = cascade(deep, stages(deep, images), 0, images)
    with torch.no_grad():
        spread = randomised[:-2](images).std().item()
    assert 0.01 < spread < 100


def test_a_network_is_left_alone_where_something_goes_wrong():
    network, (images, _) = zoo.ZOO[0].make(), zoo.images(2)
    before = values(network)
    with pytest.raises(RuntimeError):
        stages(network, torch.zeros(1, 4, 11, 8))
    with pytest.raises(RuntimeError):
        next(cascade(network, stages(network, images)[::-1], 0, torch.zeros(1, 4, 11, 8)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and not any(m._forward_pre_hooks for m in network.modules())
    network[0].cache = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(BadRequest, match="the network cannot be copied"):
        next(cascade(network, stages(network, images), 0, images))


def test_similarities_are_scipys():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(5, 14)).round(1), draw.normal(size=(5, 14)).round(1)  # with ties
    for got, x, y in zip(spearman(a, b), a, b):
        assert got == pytest.approx(stats.spearmanr(x, y)[0])
    for got, x, y in zip(cosine(a, b), a, b):
        assert got == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    layout, live = FilterLayout((("one", 5), ("two", 2), ("three", 7))), np.ones(14, bool)
    live[3] = False
    for got, x, y in zip(rank_within_layers(a, b, layout, live), a, b):
        assert got == pytest.approx((stats.spearmanr(np.delete(x[:5], 3), np.delete(y[:5], 3))[0] + stats.spearmanr(x[7:], y[7:])[0]) / 2), "a layer of two says nothing"


@pytest.mark.parametrize("similar", [cosine, spearman])
def test_nothing_is_like_nothing(similar):
    """0 where the randomised network gives no order, or none that can be read; NaN where the trained one had none. Large and small numbers are no obstacle."""
    a, none, strange = np.array([[1.0, 2.0, -3.0]]), np.zeros((1, 3)), np.array([[1.0, np.nan, np.inf]])
    assert similar(a, none) == 0 and similar(a, strange) == 0 and np.isnan(similar(none, a)) and np.isnan(similar(strange, a))
    assert similar(a * 1e200, a * 1e-200) == pytest.approx(1) and similar(a.astype(np.float32) * np.float32(1e-38), a) == pytest.approx(1)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_rows_are_those_of_explicit_copies(copied):
    """In float64, from images decoded by hand and networks shuffled by hand; BatchNorms there are none."""
    ended = tiny.call("sanity", "--run", copied.run, "--max-samples", 12, "-k", 3, "--format", "json")
    assert ended.code == 0, ended.err
    facts, pictures, vectors = profiles(copied.run, "val"), images_of(copied, "val"), standardised(copied.run)
    got = {(row["sample_id"], row["stage"]): row for row in rows_of(copied.run / "experiments/sanity")}
    asked = sorted({i for i, _ in got})
    assert len(asked) == 12 and set(asked) <= set(wrong(facts)) and {stage for _, stage in got} == {-1, 0, 1, 2, 3, 4}
    layers = ["linear", "conv3", "conv2", "conv1"]
    assert [got[asked[0], stage]["layer"] for stage in (-1, 0, 1, 2, 3, 4)] == [None, None, *layers]
    raw = np.array([row["saliency"] for row in facts.values()])
    mean, std = oracles.mean_and_std(raw)
    some = next(iter(pictures.values())).float()[None]
    trained = tiny.net().eval()
    plan = stages(trained, some)
    networks = [trained, *(copy.deepcopy(network) for network in cascade(trained, plan, 0, some))]
    heats = {}
    for i in asked[:4]:
        columns = [np.argsort(-vectors[i], kind="stable")[:3]]
        image, label = pictures[i][None], torch.tensor([facts[i]["label"]])
        for stage, network in enumerate(networks):
            found = InputSaliency(copy.deepcopy(network).double(), Reference(mean, std, 60, "abs", "test"))(image, label, columns)
            heats[stage] = found.maps[0].amax(0).flatten().numpy()
            saliency = oracles.saliency(network, image, label, "abs")
            vector = oracles.standardise(saliency, mean, std)[0]
            assert got[i, stage]["profile_cosine"] == pytest.approx(vector @ vectors[i] / np.linalg.norm(vector) / np.linalg.norm(vectors[i]), abs=2e-4)
            ranks = [stats.spearmanr(np.array(facts[i]["saliency"])[span], saliency[0][span])[0] for span in (slice(0, 6), slice(6, 14), slice(14, 24))]
            assert got[i, stage]["profile_rank"] == pytest.approx(np.mean(ranks), abs=1e-6)
            assert got[i, stage]["map_rank"] == pytest.approx(stats.spearmanr(heats[0], heats[stage])[0], abs=1e-6), "float32 is off by up to 5e-3"
    said = summary_of(copied.run)
    assert said["stages"] == [None, *layers] and said["profile_rank"]["mean"][0] == pytest.approx(1) and said["map_rank"]["mean"][0] == 1
    for name in MEASURES:
        assert said[name]["mean"][4] == pytest.approx(np.mean([got[i, 4][name] for i in asked])) and said[name]["low"][4] <= said[name]["mean"][4] <= said[name]["high"][4]
        assert said["other"][name]["estimate"] == pytest.approx(np.mean([got[i, -1][name] for i in asked])) == pytest.approx(ended.json[f"{name}_other"])
        assert said["apart"][name]["estimate"] == pytest.approx(np.mean([got[i, 4][name] - got[i, -1][name] for i in asked]))
    assert ended.err.splitlines()[-1] == said["found"] and "12 misclassified samples x 9 networks at most" in ended.err
    for file in (copied.run / "experiments/sanity").glob("*.parquet"):
        schema = pq.read_schema(file)
        assert {name: str(schema.field(name).type) for name in schema.names} == {"sample_id": "string", "stage": "int32", "layer": "string"} | dict.fromkeys(MEASURES, "double") | {"silent": "bool", "float64": "bool"}
    assert all((copied.run / f"experiments/sanity/{name}{suffix}").stat().st_size > 1000 for name in ("profile", "map") for suffix in (".png", ".svg"))


def summary_of(run):
    return json.loads((run / "experiments/sanity/summary.json").read_text())


class Single(tiny.Net):
    """Computes in float32, whatever it is given."""

    def forward(self, x):
        return super().forward(x + torch.zeros(1)) if x.dtype == torch.float32 else super().forward(x) @ torch.eye(5)


def test_a_network_that_does_not_run_in_float64_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "single", Single, raising=False)
    small = tiny.Small(tmp_path / "run", tiny.make_sources(tmp_path / "sources"))
    assert small.extract("val", model="tiny:single").code == 0
    ended = tiny.call("sanity", "--run", small.run, "--max-samples", 10)
    assert ended.code == 0 and "sanity: the network does not run in float64" in ended.err and "; in float32, since the network does not run in float64" in ended.err.splitlines()[-1], ended.err
    assert not any(row["float64"] for row in rows_of(small.run / "experiments/sanity")) and summary_of(small.run)["map_rank"]["mean"][0] == 1


def test_maps_about_a_filter_that_hardly_answered_are_not_rounding(copied):
    """One whose sigma is a millionth of what it is outweighs all others: of the distance is then left what float32 cannot hold."""
    assert tiny.call("profile", "--run", copied.run).code == 0
    path = copied.run / "statistics/val.parquet"
    table = pq.read_table(path)
    std = table["std"].to_numpy().copy()
    std[1] *= 1e-6
    pq.write_table(table.set_column(table.schema.get_field_index("std"), "std", [std]).cast(table.schema), path)
    assert tiny.call("sanity", "--run", copied.run, "--max-samples", 12, "-k", 3).code == 0
    facts, pictures, mean = profiles(copied.run, "val"), images_of(copied, "val"), table["mean"].to_numpy()
    rows = {(row["sample_id"], row["stage"]): row["map_rank"] for row in rows_of(copied.run / "experiments/sanity")}
    network, some = tiny.net().eval().double(), next(iter(pictures.values()))[None]
    networks = [network, *(copy.deepcopy(shuffled) for shuffled in cascade(network, stages(network, some), 0, some))]
    for i in sorted({i for i, _ in rows})[:4]:
        vector = oracles.standardise(np.array([facts[i]["saliency"]]), mean, std)[0]
        columns, label = [np.argsort(-vector, kind="stable")[:3]], torch.tensor([facts[i]["label"]])
        found = [InputSaliency(one, Reference(mean, std, 60, "abs", "test"))(pictures[i][None], label, columns) for one in networks]
        assert min(one.distance.item() for one in found) < 1e-5
        heats = [one.maps[0].amax(0).flatten().numpy() for one in found]
        for stage, heat in enumerate(heats):
            assert rows[i, stage] == pytest.approx(stats.spearmanr(heats[0], heat)[0], abs=1e-4)


class Deaf(tiny.Net):
    """All that it knows lies in what is no parameter: its filters are all the same number, and what turns them into classes is a buffer."""

    def __init__(self):
        super().__init__()
        for layer, value in ((self.conv1, 0.1), (self.conv2, 0.05), (self.conv3, 0.03)):
            nn.init.constant_(layer.weight, value)
            nn.init.constant_(layer.bias, 0.1)
        self.register_buffer("known", self.linear.weight.detach().clone())
        self.linear = None

    def forward(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = torch.relu(layer(x))
        return x.mean((2, 3)) @ self.known.T


def test_what_does_not_fall_is_said(tmp_path, monkeypatch):
    """Shuffling changes nothing of such a network, and the command must not pass it."""
    monkeypatch.setattr(tiny, "deaf", Deaf, raising=False)
    small = tiny.Small(tmp_path / "run", tiny.make_sources(tmp_path / "sources"))
    assert small.extract("val", model="tiny:deaf").code == 0
    ended = tiny.call("sanity", "--run", small.run, "--max-samples", 10)
    assert ended.code == 0, ended.err
    last = ended.err.splitlines()[-1]
    assert last.count("does not fall") == (4 if summary_of(small.run)["hardly_alive"] else 3) and "(all of it is the image's, as in an edge detector" in last and "falls from" not in last
    said = summary_of(small.run)
    assert all(said[name]["mean"] == pytest.approx([1] * 4, abs=1e-6) for name in MEASURES if name != "profile_rank")
    rank = said["profile_rank"]["mean"]  # of filters that are all alike, which a float32 profile puts in some order
    assert rank == pytest.approx([rank[0]] * 4, abs=1e-6)


def test_the_sentence_says_how_far_it_falls():
    """Above another sample's, below it, not told apart from it, or with none to compare with; blank maps; too few samples."""
    curve = {"mean": [1.0, 0.6, 0.4], "low": [1.0, 0.5, 0.35], "high": [1.0, 0.7, 0.45]}
    interval = lambda at: {"estimate": at, "low": at - 0.05, "high": at + 0.05, "n": 60}  # noqa: E731
    summary = {"samples": 60, "stages": [None, "head", "conv1"], "silent": [0, 0, 0], "hardly_alive": 0, "float64": True, **{name: curve for name in MEASURES}}
    summary |= {"other": {name: interval(0.2) for name in MEASURES}, "apart": dict(zip(MEASURES, (interval(0.2), interval(0.2), interval(-0.2), interval(0.01))))}
    cosine, ranks, maps = sentence(summary).split("; ")
    assert cosine.endswith("where another sample's is 0.200 (0.150 to 0.250): it stays above that (any weights give part of it)")
    assert ranks.endswith("falls from 1.000 to 0.600 (0.500 to 0.700) and 0.400 (0.350 to 0.450), where another sample's is 0.200 (0.150 to 0.250): it goes below that")
    assert maps.endswith("not clearly apart from it")
    assert "; the same without 3 filters that hardly ever answered (sigma below a hundredth of the median) falls from 1.000" in sentence(summary | {"hardly_alive": 3})
    assert "largely rounding" not in sentence(summary) and "; in float32, since the network does not run in float64: maps of shuffled networks may be largely rounding" in sentence(summary | {"float64": False})
    none = {name: None for name in MEASURES}
    alone = sentence(summary | {"samples": 1, "silent": [0, 0, 1], "other": none, "apart": none})
    assert alone.count("no other sample") == 3 and "; 1 map is then blank and counts 0; " in alone and "1 is too few to conclude anything from" in alone


def test_the_same_sample_whoever_is_asked_with_it(copied, tmp_path):
    """What is asked of a few is the beginning of what is asked of more."""
    of = {}
    for name, words in (("few", ("--max-samples", 3)), ("more", ("--max-samples", 6, "--fresh"))):
        assert tiny.call("sanity", "--run", copied.run, *words).code == 0
        of[name] = {(row["sample_id"], row["stage"]): [row[measure] for measure in MEASURES] for row in rows_of(copied.run / "experiments/sanity")}
    assert len(of["few"]) == 3 * 6 and all(np.allclose(row, of["more"][key], atol=1e-4) for key, row in of["few"].items())


def test_intervals_of_two_samples_stay_where_a_correlation_can_be(copied):
    """Student's of two would leave it; to itself a network is 1, by definition."""
    assert tiny.call("sanity", "--run", copied.run, "--max-samples", 2).code == 0
    said = summary_of(copied.run)
    for name in MEASURES:
        assert all(-1 <= end <= 1 for key in ("low", "high") for end in said[name][key][1:]) and all(-1 <= said["other"][name][key] <= 1 for key in ("low", "high"))
        assert said[name]["high"][2] - said[name]["low"][2] > 0.5 and -2 <= said["apart"][name]["low"] < said["apart"][name]["high"] <= 2
    assert said["map_rank"]["low"][0] == said["map_rank"]["high"][0] == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (["-k", "0"], "-k: 0 is not a number from 1 to 24"),
        (["-k", "25", "--boost", "1"], "--boost: 1 boosts nothing"),
        (["--max-samples", "0"], "--max-samples: 0 is less than 1"),
        (["--dataset", "v3"], "v3"),
        (["--format", "parquet"], "--format: 'parquet'"),
    ],
)
def test_what_cannot_be_is_refused(copied, words, says):
    assert says in tiny.call("sanity", "--run", copied.run, *words).refused() and not (copied.run / "experiments").exists()


def test_other_settings_are_refused_by_name_and_images_that_are_gone(copied, tmp_path):
    assert tiny.call("sanity", "--run", copied.run, "--max-samples", 2).code == 0
    assert "max samples 2, not 3" in tiny.call("sanity", "--run", copied.run, "--max-samples", 3).refused()
    assert "boost 100.0, not 10.0" in tiny.call("sanity", "--run", copied.run, "--max-samples", 2, "--boost", 10).refused()
    census = copied.run / "datasets/val.json"
    census.write_text(census.read_text().replace(str(copied.sources), str(tmp_path / "nowhere")))
    assert tiny.call("sanity", "--run", copied.run, "--max-samples", 2).code == 0, "all is there"
    assert "is not what was extracted" in tiny.call("sanity", "--run", copied.run, "--max-samples", 3, "--fresh").refused()
