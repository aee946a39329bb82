"""`faultline prune` and `faultline finetune`: rows held to networks copied and edited by hand, on images decoded by hand; settings, refusals, figures."""

import io
import json
import shutil
import tarfile

import intervention_oracles as naive
import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from index import Run
from jobs import finetune, servers
from jobs.prune import filters_of, found as sentence, grid_of
from pipeline import failpoints
from pipeline.statistics import Reference
from pipeline.filters import FilterLayout
from pipeline.errors import BadRequest

KS = (1, 3, 24)


def rows_of(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def profiles(run, dataset):
    return {row["sample_id"]: row for row in rows_of(run / "profiles" / dataset)}


def images(small, dataset):
    """ID -> float64 [3, H, W], normalised as the tiny network's preprocessing says."""
    found = {}
    for path in (small.sources / dataset).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"), np.float64)
                    found[member.name[:-4]] = torch.from_numpy((pixels / 255 - 0.5) / 0.25).permute(2, 0, 1)
    return found


def standardised(run):
    """(ID -> ŝ float64 [F] of val, by val's statistics)."""
    rows = profiles(run, "val")
    raw = np.array([row["saliency"] for row in rows.values()])
    return dict(zip(rows, oracles.standardise(raw, *oracles.mean_and_std(raw))))


def summary_of(run, verb):
    return json.loads((run / "experiments" / verb / "summary.json").read_text())


def wrong(rows):
    return [i for i, row in rows.items() if row["label"] != row["prediction"]]


@pytest.mark.parametrize("mode", ["map", "weights-and-bias"])
def test_prune_turns_off_what_the_profiles_say(copied, mode):
    ended = tiny.call("prune", "--run", copied.run, "-k", "3,1,24", "--mode", mode, "--format", "json")
    assert ended.code == 0, ended.err
    got = {(row["sample_id"], row["strategy"], row["k"]): row for row in rows_of(copied.run / "experiments/prune")}
    rows, pictures, vectors = profiles(copied.run, "val"), images(copied, "val"), standardised(copied.run)
    assert set(got) == {(i, s, k) for i in wrong(rows) for s in ("salient", "random", "random_live", "least") for k in KS}
    corrected = {}
    for i in wrong(rows):
        before = naive.softmax(naive.alone(tiny.net().double(), pictures[i]))
        for strategy, order in (("salient", np.argsort(-vectors[i], kind="stable")), ("least", np.argsort(vectors[i], kind="stable"))):
            for k in KS:
                after = naive.softmax(naive.alone(naive.pruned(tiny.net(), order[:k].tolist(), {}, mode), pictures[i]))
                row = got[i, strategy, k]
                assert row["wrong_confidence_change"] == pytest.approx(after[rows[i]["prediction"]] - before[rows[i]["prediction"]], abs=1e-4)
                assert row["true_confidence_change"] == pytest.approx(after[rows[i]["label"]] - before[rows[i]["label"]], abs=1e-4)
                assert row["corrected"] == (after.argmax() == rows[i]["label"])
                corrected.setdefault((strategy, k), []).append(row["corrected"])
    for (strategy, k), values in corrected.items():
        curve = summary_of(copied.run, "prune")["curves"][strategy]["corrected"]
        at = KS.index(k)
        assert curve["mean"][at] == pytest.approx(np.mean(values)) and curve["low"][at] <= np.mean(values) + 1e-12 and curve["high"][at] >= np.mean(values) - 1e-12
    assert ended.json["samples"] == len(wrong(rows)) and ended.err.splitlines()[-1] == summary_of(copied.run, "prune")["found"]
    assert f"{len(wrong(rows))} misclassified samples x 4 strategies x 3 sizes = {12 * len(wrong(rows))} prunings" in ended.err
    assert all((copied.run / f"experiments/prune/{name}{suffix}").stat().st_size > 1000 for name in ("wrong_confidence", "true_confidence", "corrected") for suffix in (".png", ".svg"))


def test_prune_chooses_filters_of_the_layers_that_were_asked_for(copied):
    """Also where it draws them. Their k is counted among these layers, and another choice of layers is another experiment."""
    layout = Run.open(copied.run).manifest.layers
    name, columns = list(layout.slices.items())[-1]
    ended = tiny.call("prune", "--run", copied.run, "-k", "1,2", "--layers", name, "--format", "json")
    assert ended.code == 0, ended.err
    assert f"2 most salient filters of {name} corrects" in ended.err and summary_of(copied.run, "prune")["layers"] == name
    rows, pictures, vectors = profiles(copied.run, "val"), images(copied, "val"), standardised(copied.run)
    got = {(row["sample_id"], row["strategy"], row["k"]): row for row in rows_of(copied.run / "experiments/prune")}
    inside = np.arange(columns.start, columns.stop)
    for i in wrong(rows)[:4]:
        before = naive.softmax(naive.alone(tiny.net().double(), pictures[i]))[rows[i]["label"]]
        changes = {c: naive.softmax(naive.alone(naive.pruned(tiny.net(), [c], {}, "map"), pictures[i]))[rows[i]["label"]] - before for c in inside.tolist()}
        assert got[i, "salient", 1]["true_confidence_change"] == pytest.approx(changes[int(inside[np.argmax(vectors[i][inside])])], abs=1e-4)
        assert got[i, "least", 1]["true_confidence_change"] == pytest.approx(changes[int(inside[np.argmin(vectors[i][inside])])], abs=1e-4)
        for strategy in ("random", "random_live"):
            assert min(abs(got[i, strategy, 1]["true_confidence_change"] - change) for change in changes.values()) < 1e-4
    assert f"layers {name}, not null" in tiny.call("prune", "--run", copied.run, "-k", "1,2").refused()
    assert f"from 1 to {len(inside)}" in tiny.call("prune", "--run", copied.run, "-k", f"{len(inside) + 1}", "--layers", name, "--fresh").refused()


def test_finetune_moves_filters_of_the_layers_that_were_asked_for(copied):
    name, columns = list(Run.open(copied.run).manifest.layers.slices.items())[0]
    ended = tiny.call("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "2", "--layers", name, "--rates", "2", "--max-samples", 4)
    assert ended.code == 0, ended.err
    rows, pictures, vectors = profiles(copied.run, "val"), images(copied, "val"), standardised(copied.run)
    inside, checked = np.arange(columns.start, columns.stop), 0
    for row in rows_of(copied.run / "experiments/finetune"):
        i = row["sample_id"]
        if row["strategy"] in ("salient", "least"):
            order = np.argsort(vectors[i][inside] * (-1 if row["strategy"] == "salient" else 1), kind="stable")
            label = rows[i]["label"]
            after = naive.alone(naive.stepped(tiny.net(), pictures[i], label, inside[order[:2]].tolist(), 2.0, "global"), pictures[i])
            change = naive.softmax(after)[label] - naive.softmax(naive.alone(tiny.net().double(), pictures[i]))[label]
            assert row["confidence_change"] == pytest.approx(change, abs=1e-4)
            checked += 1
    assert checked == 8


def test_finetune_steps_are_tried_on_the_nearest_and_on_those_that_were_right(copied):
    """v2 has fewer correct samples than are drawn as controls, so that they are all of them."""
    ended = tiny.call("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "2", "--rates", "0.5,2", "--max-samples", 5, "--format", "json")
    assert ended.code == 0, ended.err
    rows, held, pictures, vectors = profiles(copied.run, "val"), profiles(copied.run, "v2"), images(copied, "val") | images(copied, "v2"), standardised(copied.run)
    got = rows_of(copied.run / "experiments/finetune")
    assert len(got) == 5 * 5 * 2 and {(row["strategy"], row["k"], row["rate"]) for row in got} >= {("salient", 2, 0.5), ("least", 2, 2.0), ("all", 24, 0.5), ("conv", 24, 2.0)}
    right = [i for i, row in held.items() if row["label"] == row["prediction"]]
    run, checked = Run.open(copied.run), 0
    for row in got:
        if row["strategy"] == "random_live":
            continue
        i = row["sample_id"]
        columns = {"salient": np.argsort(-vectors[i], kind="stable")[:2].tolist(), "least": np.argsort(vectors[i], kind="stable")[:2].tolist()}.get(row["strategy"], row["strategy"])
        network = naive.stepped(tiny.net(), pictures[i], rows[i]["label"], columns, row["rate"], "global")
        near = run.neighbors(f"val:{i}", k=10, within="v2")["sample_id"].to_pylist()
        assert row["corrected"] == (naive.alone(network, pictures[i]).argmax() == rows[i]["label"])
        repaired = [naive.alone(network, pictures[n]).argmax() == held[n]["label"] for n in near]
        broken = [naive.alone(network, pictures[n]).argmax() != held[n]["label"] for n in right]
        assert row["neighbors_corrected"] == pytest.approx(np.mean(repaired)) and row["broken"] == pytest.approx(np.mean(broken))
        change = [naive.softmax(naive.alone(network, pictures[n]))[held[n]["label"]] - naive.softmax(naive.alone(tiny.net().double(), pictures[n]))[held[n]["label"]] for n in near]
        assert row["neighbors_confidence_change"] == pytest.approx(np.mean(change), abs=1e-4)
        checked += 1
    assert checked == 40
    effect = next(e for e in summary_of(copied.run, "finetune")["effects"] if (e["strategy"], e["rate"]) == ("all", 2.0))
    own = [row["corrected"] for row in got if (row["strategy"], row["rate"]) == ("all", 2.0)]
    assert effect["corrected"]["estimate"] == np.mean(own) and effect["corrected"]["low"] < effect["corrected"]["high"], "a share of samples has an interval even where all or none are corrected"
    assert effect["broken"]["estimate"] == pytest.approx(np.mean([row["broken"] for row in got if (row["strategy"], row["rate"]) == ("all", 2.0)]))
    assert all((copied.run / f"experiments/finetune/{name}{suffix}").stat().st_size > 1000 for name in ("neighbours", "broken", "frontier") for suffix in (".png", ".svg"))


def test_a_sample_is_neither_its_own_neighbour_nor_control_in_its_own_data_set(copied):
    assert tiny.call("finetune", "--run", copied.run, "--from", "v2", "--in", "v2", "-k", "1", "--max-samples", 4).code == 0
    assert len({row["sample_id"] for row in rows_of(copied.run / "experiments/finetune")}) == 4


@pytest.mark.parametrize(
    "words, says",
    [
        (["prune", "-k", "0,5"], "-k: '0,5'"),
        (["prune", "-k", "1,25"], "from 1 to 24"),
        (["prune", "-k", "some"], "-k: 'some'"),
        (["prune", "-k", ""], "-k: ''"),
        (["prune", "--layers", ""], "--layers: it is empty"),
        (["finetune", "--from", "val", "--in", "v2", "-k", ""], "-k: ''"),
        (["finetune", "--from", "val", "--in", "v2", "--rates", ""], "--rates: ''"),
        (["finetune", "--from", "val", "--in", "v2", "--layers", ""], "--layers: it is empty"),
        (["prune", "--mode", "hard"], "--mode: 'hard'"),
        (["prune", "--layers", "deep"], "--layers: this network has no layer 'deep'"),
        (["finetune", "--from", "val", "--in", "v2", "--layers", "deep"], "--layers: this network has no layer 'deep'"),
        (["finetune", "--from", "val", "--in", "v3"], "--in: the index errors does not hold 'v3'"),
        (["finetune", "--from", "val", "--in", "v2", "--rates", "0"], "--rates: '0'"),
        (["finetune", "--from", "val", "--in", "v2", "--scope", "layer"], "--scope: 'layer'"),
    ],
)
def test_what_does_not_exist_is_refused(copied, words, says):
    assert says in tiny.call(words[0], "--run", copied.run, *words[1:]).refused() and not (copied.run / "experiments").exists()


def test_other_settings_are_refused_by_name(copied):
    assert tiny.call("prune", "--run", copied.run, "-k", "1").code == 0
    assert "k [1], not [1, 2]" in tiny.call("prune", "--run", copied.run, "-k", "1,2").refused()
    assert "mode map, not weights-and-bias" in tiny.call("prune", "--run", copied.run, "-k", "1", "--mode", "weights-and-bias").refused()
    assert tiny.call("prune", "--run", copied.run, "-k", "1,2", "--fresh").code == 0


def test_a_held_out_source_that_is_gone_is_refused(small, tmp_path):
    mine = tiny.Small(tmp_path / "run", tmp_path / "sources")
    shutil.copytree(small.run, mine.run)
    shutil.copytree(small.sources, mine.sources)
    for census in (mine.run / "datasets").glob("*.json"):
        census.write_text(census.read_text().replace(str(small.sources), str(mine.sources)))
    shutil.rmtree(mine.sources / "v2")
    assert "the images of v2 are read again" in tiny.call("finetune", "--run", mine.run, "--from", "val", "--in", "v2", "-k", "1").refused()


def nowhere(address):
    raise BadRequest(f"--address: no Ray cluster can be joined at {address}")


def test_fresh_discards_nothing_that_cannot_be_made_again(small, tmp_path, monkeypatch):
    """With a source that is gone, or for a GPU or a cluster that is not there, a run is refused, and the earlier rows and numbers are there as before."""
    shutil.copytree(small.run, tmp_path / "run")
    shutil.copytree(small.sources, tmp_path / "sources")
    census = tmp_path / "run/datasets/val.json"
    census.write_text(census.read_text().replace(str(small.sources), str(tmp_path / "sources")))
    assert tiny.call("prune", "--run", tmp_path / "run", "-k", "1").code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/experiments/prune").glob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(servers, "start", nowhere)
        for verb in ("prune", "profile"):
            assert "no Ray cluster can be joined" in tiny.call(verb, "--run", tmp_path / "run", "--seed", "3", "--fresh", "--address", "10.0.0.1:6379").refused()
        assert {p.name: p.read_bytes() for p in (tmp_path / "run/experiments/prune").glob("*") if p.is_file()} == before
    if not torch.cuda.is_available():
        assert "torch sees no CUDA GPU" in tiny.call("prune", "--run", tmp_path / "run", "-k", "2", "--fresh", "--device", "cuda").refused()
        assert {p.name: p.read_bytes() for p in (tmp_path / "run/experiments/prune").glob("*") if p.is_file()} == before
    for shard in (tmp_path / "sources").rglob("*.tar"):
        shard.unlink()
    assert "is not what was extracted" in tiny.call("prune", "--run", tmp_path / "run", "-k", "2", "--fresh").refused()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run/experiments/prune").glob("*") if p.is_file()} == before


def test_earlier_figures_go_with_the_rows_that_they_are_of(copied, tmp_path, monkeypatch):
    """A job that is stopped leaves no picture beside the settings of others."""
    folder = copied.run / "experiments/prune"
    assert tiny.call("prune", "--run", copied.run, "-k", "2").code == 0 and list(folder.glob("*.png"))
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/0.json").write_text(json.dumps({"point": "rows.written", "action": "error", "errno": "ENOSPC", "times": None}))
    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path / "faults"))
    assert tiny.call("prune", "--run", copied.run, "-k", "3", "--fresh").code == 4
    assert not [p for p in folder.iterdir() if p.suffix in (".png", ".svg", ".parquet")]


def test_a_step_is_tried_on_errors_alone(copied):
    """An index of all samples would give neighbours that are right already."""
    assert tiny.call("index", "--run", copied.run, "--subset", "all", "--name", "everything").code == 0
    words = ("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "1")
    assert "the index everything holds correctly classified samples too" in tiny.call(*words, "--name", "everything").refused()


def test_few_samples_conclude_nothing(copied):
    for verb, words in (("prune", ()), ("finetune", ("--from", "val", "--in", "v2"))):
        ended = tiny.call(verb, "--run", copied.run, "-k", "1", "--max-samples", 2, *words)
        assert ended.code == 0 and "too few to conclude anything from" in ended.err.splitlines()[-1]


def test_shares_corrected_are_compared_on_the_same_samples(copied):
    assert tiny.call("prune", "--run", copied.run, "-k", "3").code == 0
    rows = rows_of(copied.run / "experiments/prune")
    of = {s: np.array([row["corrected"] for row in sorted(rows, key=lambda row: row["sample_id"]) if row["strategy"] == s], float) for s in ("salient", "random_live", "least")}
    for pair, interval in summary_of(copied.run, "prune")["paired"].items():
        a, b = pair.split("_minus_")
        assert interval["estimate"] == pytest.approx((of[a] - of[b]).mean()) and interval["n"] == len(of[a])


def test_steps_are_compared_on_the_same_samples(copied):
    """What the sentence says of two strategies is the difference on each sample, not two intervals side by side."""
    ended = tiny.call("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "2", "--rates", "0.5")
    assert ended.code == 0, ended.err
    rows = rows_of(copied.run / "experiments/finetune")
    of = {s: {c: np.array([row[c] for row in sorted(rows, key=lambda row: row["sample_id"]) if row["strategy"] == s], float) for c in ("neighbors_corrected", "broken")} for s in ("salient", "random_live", "least", "all", "conv")}
    paired = summary_of(copied.run, "finetune")["paired"]
    assert [entry["strategy"] for entry in paired] == ["random_live", "least", "all", "conv"]
    for entry in paired:
        for column, values in of[entry["strategy"]].items():
            difference = values - of["salient"][column]
            assert entry[column]["estimate"] == pytest.approx(difference.mean()) and entry[column]["n"] == len(difference)
            shown = f"{entry[column]['estimate']:+.3f} ({entry[column]['low']:+.3f} to {entry[column]['high']:+.3f})"
            assert (shown in ended.err.splitlines()[-1].partition("on the same errors, less the most salient:")[2]) or entry["strategy"] == "conv"


def test_at_equal_damage_each_strategy_is_at_its_best_and_compared_on_the_same_samples():
    """Of every strategy what repairs most within a budget of damage; a strategy that breaks more whatever it does is not there."""
    made = [(i, s, k, rate, repaired + 0.1 * (i % 2), broken) for i in range(12) for s, k, rate, repaired, broken in (("salient", 1, 0.1, 0.1, 0.01), ("salient", 20, 0.1, 0.3, 0.04), ("salient", 20, 0.5, 0.6, 0.15), ("all", 99, 0.1, 0.4, 0.05), ("all", 99, 0.5, 0.5, 0.3), ("least", 1, 0.5, 0.0, 0.9))]
    rows = pa.table({name: list(column) for name, column in zip(("sample_id", "strategy", "k", "rate", "neighbors_corrected", "broken"), zip(*made))})
    effects = [{"strategy": s, "k": k, "rate": rate, "neighbors_corrected": {"estimate": repaired + 0.05}, "broken": {"estimate": broken}} for i, s, k, rate, repaired, broken in made[:6]]
    got = {(b["budget"], b["strategy"]): b for b in finetune.bargains(rows, effects)}
    assert {key: (b["k"], b["rate"]) for key, b in got.items()} == {
        (0.02, "salient"): (1, 0.1), (0.05, "salient"): (20, 0.1), (0.05, "all"): (99, 0.1), (0.1, "salient"): (20, 0.1), (0.1, "all"): (99, 0.1), (0.2, "salient"): (20, 0.5), (0.2, "all"): (99, 0.1),
    }  # fmt: skip
    gap = got[0.05, "all"]["less_salient"]["neighbors_corrected"]
    assert gap["estimate"] == pytest.approx(0.1) and gap["n"] == 12 and "less_salient" not in got[0.05, "salient"]
    assert got[0.2, "all"]["less_salient"]["broken"]["estimate"] == pytest.approx(-0.1)


def test_a_step_that_may_do_no_better_is_said_to_be_unclear():
    effect = lambda strategy, k: {"strategy": strategy, "k": k, "rate": 0.5} | {c: {"estimate": 0.5, "low": 0.1, "high": 0.9, "n": 60} for c in ("corrected", "neighbors_corrected", "broken")}  # noqa: E731
    gap = lambda low, high: {"estimate": (low + high) / 2, "low": low, "high": high, "n": 60}  # noqa: E731
    paired = [{"strategy": "random_live", "neighbors_corrected": gap(-0.2, -0.1), "broken": gap(-0.1, 0.1)}, {"strategy": "all", "neighbors_corrected": gap(-0.05, 0.1), "broken": gap(0.2, 0.4)}]
    summary = {"dataset": "val", "within": "v2", "samples": 60, "rates": [0.5], "layers": None, "paired": paired, "effects": [effect(s, k) for s, k in (("salient", 20), ("random_live", 20), ("least", 20), ("all", 99), ("conv", 99))]}
    text = finetune.found(summary)
    assert "random, live alone -0.150 (-0.200 to -0.100) and +0.000 (-0.100 to +0.100) (not clearly apart); whole network +0.025 (-0.050 to +0.100) (not clearly apart) and +0.300" in text
    assert "equal damage" not in text, "there is one rate"
    best = {"budget": 0.05, "strategy": "salient", "k": 20, "rate": 0.5} | {c: {"estimate": 0.5, "low": 0.1, "high": 0.9, "n": 60} for c in ("neighbors_corrected", "broken")}
    text = finetune.found(summary | {"rates": [0.5, 5.0], "bargains": [best]})
    assert "; no step of the whole network breaks 0.05 or less, so that they are not compared at equal damage: try smaller --rates" in text


def test_a_source_without_errors_is_refused_by_its_own_option(copied):
    """finetune has no --dataset: what it was given with is --from."""
    for file in (copied.run / "profiles/val").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(table.column_names.index("prediction"), "prediction", table["label"]), file)
    assert tiny.call("index", "--run", copied.run, "--datasets", "val,v2", "--reference", "v2").code == 0
    assert tiny.call("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "1").refused().startswith("faultline: --from: val has no misclassified sample")
    assert tiny.call("prune", "--run", copied.run, "--dataset", "val", "--reference", "v2", "-k", "1").refused().startswith("faultline: --dataset: val has no misclassified sample")


def test_no_interval_has_length_zero_and_none_leaves_what_can_be(copied):
    """Of few samples, of none corrected and of all: shares stay in 0..1, differences and changes in -1..1."""
    for most, rate in ((1, "1e-6"), (3, "100"), (25, "1e-6")):
        assert tiny.call("prune", "--run", copied.run, "-k", "1,24", "--max-samples", most, "--fresh").code == 0
        assert tiny.call("finetune", "--run", copied.run, "--from", "val", "--in", "v2", "-k", "1", "--rates", rate, "--max-samples", most, "--fresh").code == 0
        pruned, tuned = (summary_of(copied.run, verb) for verb in ("prune", "finetune"))
        found = [(column, dict(zip(("estimate", "low", "high"), point))) for curve in pruned["curves"].values() for column, c in curve.items() for point in zip(c["mean"], c["low"], c["high"])]
        found += [("change", interval) for pairs in (pruned["paired"], pruned["paired_wrong"]) for interval in pairs.values()]
        found += [("change" if "change" in c else c, e[c]) for e in tuned["effects"] for c in ("corrected", "neighbors_corrected", "neighbors_confidence_change", "broken")]
        found += [("change", e[c]) for e in tuned["paired"] for c in ("neighbors_corrected", "broken")]
        for column, interval in found:
            assert (-1 if "change" in column else 0) <= interval["low"] <= interval["estimate"] <= interval["high"] <= 1 and interval["high"] > interval["low"], (column, interval)


def test_no_more_filters_can_be_asked_for_than_are_live():
    layout = FilterLayout((("a", 3), ("b", 2)))
    reference = Reference(np.zeros(5), np.array([1, 0, 1, 0, 0.0]), 9, "abs", "test")
    assert (filters_of(layout, None, reference), filters_of(layout, "a", reference)) == (2, 2)
    with pytest.raises(BadRequest, match="all filters of b are dead"):
        filters_of(layout, "b", reference)
    with pytest.raises(BadRequest, match="from 1 to 2, the live filters"):
        grid_of("1,3", (1,), 2)


def test_the_sentence_of_a_reversal_says_so():
    """Salient filters that do clearly worse than random ones are not merely "not clearly apart"."""
    shares = {"salient": 0.0, "random": 0.1, "random_live": 0.1, "least": 0.01}
    curves = {name: {column: {"mean": [share], "low": [share], "high": [share]} for column in ("wrong_confidence_change", "true_confidence_change", "corrected")} for name, share in shares.items()}
    gaps = {"salient_minus_random_live": {"estimate": -0.1, "low": -0.2, "high": -0.02, "n": 60}, "random_live_minus_least": {"estimate": 0.09, "low": 0.01, "high": 0.2, "n": 60}}
    summary = {"curves": curves, "samples": 60, "k": [20], "mode": "map", "layers": None, "paired": gaps, "paired_wrong": gaps}
    assert "the reverse of what the paper found" in sentence(summary, 0)
    gaps["salient_minus_random_live"]["high"] = 0.02
    assert "(not all clearly apart)" in sentence(summary, 0)
