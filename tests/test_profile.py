"""`faultline profile`: every number held to a naive loop over the profiles in float64, and the picture to what it is given."""

import json
import math

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
import scipy.stats
import tiny

from jobs.profile import _result as result, found
from pipeline.depth import layer_means, parts, sorted_within_layers
from pipeline.filters import FilterLayout
from pipeline.intervals import bootstrap_difference, bootstrap_mean


def read(run, dataset="val"):
    """(rows of profiles, ŝ float64 [N, F] by val's statistics), by hand."""
    rows = {d: [row for file in sorted((run / "profiles" / d).glob("*.parquet")) for row in pq.read_table(file).to_pylist()] for d in (dataset, "val")}
    mean, std = oracles.mean_and_std(np.array([row["saliency"] for row in rows["val"]]))
    return rows[dataset], oracles.standardise(np.array([row["saliency"] for row in rows[dataset]]), mean, std)


def results(run):
    return [row for file in sorted((run / "experiments/profile").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def naive_row(vector):
    """Mean over filters, by layer, and over thirds of three layers, of one ŝ; no filter of this network is dead."""
    layers, start = [], 0
    for _, filters in tiny.LAYERS:
        layers.append(math.fsum(vector[start : start + filters]) / filters)
        start += filters
    return {"saliency": math.fsum(vector) / len(vector), "early": layers[0], "middle": layers[1], "deep": layers[2], "layers": layers}


def summary_of(run):
    return json.loads((run / "experiments/profile/summary.json").read_text())


@pytest.mark.parametrize("dataset", ["val", "v2"])
def test_rows_and_group_means_are_those_of_a_loop(copied, dataset):
    ended = tiny.call("profile", "--run", copied.run, "--dataset", dataset, "--format", "json")
    assert ended.code == 0, ended.err
    profiles, vectors = read(copied.run, dataset)
    got = {row["sample_id"]: row for row in results(copied.run)}
    assert list(got) == [row["sample_id"] for row in profiles]
    for row, vector in zip(profiles, vectors):
        truth = naive_row(vector)
        assert {key: got[row["sample_id"]][key] for key in ("label", "prediction")} == {key: row[key] for key in ("label", "prediction")}
        for key, value in truth.items():
            assert got[row["sample_id"]][key] == pytest.approx(value, abs=2e-5)
    summary, wrong = summary_of(copied.run), np.array([row["label"] != row["prediction"] for row in profiles])
    for name, which in (("misclassified", wrong), ("correct", ~wrong)):
        group = [naive_row(vector) for vector in vectors[which]]
        gaps = [row["deep"] - row["early"] for row in group]
        assert summary["groups"][name]["samples"] == len(group)
        assert summary["groups"][name]["saliency"]["estimate"] == pytest.approx(np.mean([row["saliency"] for row in group]), abs=2e-5)
        assert summary["groups"][name]["deep_minus_early"]["estimate"] == pytest.approx(np.mean(gaps), abs=2e-5)
        assert summary["groups"][name]["layers"]["mean"] == pytest.approx(np.mean([row["layers"] for row in group], axis=0), abs=2e-5)
        assert summary["groups"][name]["deep_minus_early"]["low"] <= np.mean(gaps) <= summary["groups"][name]["deep_minus_early"]["high"]
        means = vectors[which].mean(0)
        expected = [sorted(means[a:b], reverse=True) for a, b in ((0, 6), (6, 14), (14, 24))]
        for layer, truth in zip(summary["sorted_within_layers"][name], expected):
            assert layer == pytest.approx(truth, abs=2e-5)
        halves = [scipy.stats.t.ppf(0.975, len(vectors[which]) - 1) * scipy.stats.sem(vectors[which][:, f]) for f in range(24)]
        for layer, (a, b) in zip(summary["margins_within_layers"][name], ((0, 6), (6, 14), (14, 24))):
            assert layer == pytest.approx([halves[f] for f in sorted(range(a, b), key=lambda f: -means[f])], rel=0.01), "the interval of a filter stands where its mean does"
    raw = np.array([row["saliency"] for row in profiles]).mean(0)
    assert np.concatenate(summary["sorted_within_layers"]["saliency"]) == pytest.approx(np.concatenate([sorted(raw[a:b], reverse=True) for a, b in ((0, 6), (6, 14), (14, 24))]), rel=1e-6)
    assert ended.json["saliency_difference"] == pytest.approx(ended.json["saliency_misclassified"] - ended.json["saliency_correct"])
    assert ended.err.splitlines()[-1] == summary["found"]


def test_a_part_of_the_samples_has_means_of_its_own(copied):
    """Group means are divided by the number of those that were chosen."""
    assert tiny.call("profile", "--run", copied.run, "--max-samples", 11, "--seed", 5).code == 0
    chosen = {row["sample_id"]: row for row in results(copied.run)}
    profiles, vectors = read(copied.run)
    which = np.array([row["sample_id"] in chosen and row["label"] != row["prediction"] for row in profiles])
    assert len(chosen) == 11 and summary_of(copied.run)["groups"]["misclassified"]["samples"] == which.sum()
    means = vectors[which].mean(0)
    assert summary_of(copied.run)["sorted_within_layers"]["misclassified"][1] == pytest.approx(sorted(means[6:14], reverse=True), abs=2e-5)


def test_one_image_is_drawn_beside_its_groups(copied):
    image = read(copied.run)[0][3]["sample_id"]
    assert tiny.call("profile", "--run", copied.run).code == 0
    folder = copied.run / "experiments/profile"
    assert not (folder / "sample.png").exists()
    assert tiny.call("profile", image, "--run", copied.run).code == 0
    assert all((folder / f"{name}{suffix}").stat().st_size > 1000 for name in ("sample", "saliency", "standardised", "depth") for suffix in (".png", ".svg"))
    before = (folder / "sample.svg").read_bytes()
    assert tiny.call("profile", read(copied.run)[0][4]["sample_id"], "--run", copied.run).code == 0 and (folder / "sample.svg").read_bytes() != before
    assert "no sample 'nobody'" in tiny.call("profile", "nobody", "--run", copied.run).refused()


def test_dead_filters_count_for_no_layer():
    layout = FilterLayout((("a", 3), ("b", 2), ("c", 1)))
    vectors = np.array([[1, 5, 0, 0, 0, 7], [2, 4, 0, 0, 0, -1]], np.float32)
    assert layer_means(vectors, layout, np.array([True, True, False, False, False, True])).tolist() == [[3, 0, 7], [3, 0, -1]]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 55])
def test_thirds_are_equally_long_at_both_ends(layers):
    early, middle, deep = parts(layers)
    assert early.start == 0 and deep.stop == layers and early.stop == deep.stop - deep.start == max(1, layers // 3)
    assert layers < 3 or (early.stop, middle.stop) == (middle.start, deep.start)


def test_filters_are_sorted_within_their_layer_alone():
    layout = FilterLayout((("a", 3), ("b", 2)))
    halves = sorted_within_layers(np.array([1, 3, 2, 9, 10]), layout, np.array([0.1, 0.3, 0.2, 0.9, 1.0]))
    assert [mean.tolist() for mean, _ in halves] == [[3, 2, 1], [10, 9]] and [half.tolist() for _, half in halves] == [[0.3, 0.2, 0.1], [1.0, 0.9]]


def group(mean, gap):
    return {"samples": 10, **{key: {"estimate": value, "low": value - 0.1, "high": value + 0.1, "n": 10} for key, value in (("saliency", mean), ("deep_minus_early", gap))}}


@pytest.mark.parametrize(
    "wrong, right, difference, says",
    [
        (group(1, 0.5), group(-1, -0.5), (1.8, 2.2), ["are more salient than", "misclassified samples the deep layers stand out (deep minus early +0.50", "correct ones the early layers stand out"]),
        (group(0, 0.05), group(0, -0.05), (-0.2, 0.2), ["not clearly more salient", "neither end of the network stands out (deep minus early +0.05"]),
        (group(-1, -0.5), group(1, 0.5), (-2.2, -1.8), ["less salient than", "misclassified samples the early layers stand out", "correct ones the deep layers stand out"]),
    ],
    ids=["as in the paper", "nothing", "the contrary"],
)
def test_the_sentence_says_what_the_intervals_say(wrong, right, difference, says):
    text = found({"misclassified": wrong, "correct": right}, {"saliency_difference": {"estimate": sum(difference) / 2, "low": difference[0], "high": difference[1], "n": 20}})
    assert all(part in text for part in says)


def test_where_all_are_right_there_is_nothing_to_compare(copied):
    for file in (copied.run / "profiles/v2").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(2, table.schema.field("prediction"), table["label"]), file)
    ended = tiny.call("profile", "--run", copied.run, "--dataset", "v2")
    assert ended.code == 0 and "all 30 samples are correct" in ended.err


def test_real_errors_are_more_salient(data, tmp_path):
    """resnet56's own profiles of 500 images: errors far above correct ones, as in the reference figures."""
    words = ["--source", data / "cifar10/holdout-00000.tar", "--model", "resnet56", "--weights", data / "cifar10/resnet56.safetensors"]
    assert tiny.call("extract", "--run", tmp_path / "run", "--dataset", "val", *words).code == 0
    ended = tiny.call("profile", "--run", tmp_path / "run", "--format", "json")
    assert ended.code == 0 and ended.json["saliency_misclassified"] == pytest.approx(1.62, abs=0.35) and ended.json["saliency_correct"] == pytest.approx(-0.33, abs=0.1)


def test_a_group_of_one_has_no_interval():
    """One error among the correct ones: its mean is a number, and nothing more is known of it; the difference is as uncertain as the others are spread."""
    rows = [{"saliency": 2.0, "deep": 1.0, "early": 0.5}, *({"saliency": 0.1 * i, "deep": 0.1, "early": 0.2} for i in range(30))]
    values = np.array([row["saliency"] for row in rows])
    alone, others = bootstrap_mean(values[:1]), bootstrap_mean(values[1:])
    groups = {name: {"samples": n, "saliency": one.to_json(), "deep_minus_early": one.to_json()} for name, n, one in (("misclassified", 1, alone), ("correct", 30, others))}
    summary = {"saliency_difference": bootstrap_difference(values[:1], values[1:]).to_json()}
    assert "(mean standardised saliency 2.00 (one sample: no interval) against 1.45 (1." in found(groups, summary)
    flat = result(groups, summary)
    assert "saliency_misclassified" in flat and not {"saliency_misclassified_low", "saliency_misclassified_high"} & set(flat) and {"saliency_correct_low", "saliency_difference_low"} <= set(flat)
    assert flat["saliency_difference_high"] - flat["saliency_difference_low"] > 1
