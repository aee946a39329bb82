"""`faultline neighbors --evaluate`: every share and distance held to brute force over the profiles, one pair at a time in float64."""

import io
import json

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from index.evaluate import Best, chances, colour_distance, colours, ends
from jobs.evaluation import found
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from shards import encoded, picture

MOST = 50


def ask(small, tmp_path, *words):
    ended = tiny.call("neighbors", "--run", small.run, "--out", tmp_path / "n.parquet", "--evaluate", "--format", "json", *words)
    assert ended.code == 0, ended.err
    return ended, json.loads((small.run / "experiments/neighbors/summary.json").read_text())


def everything(run):
    """(dataset, row of its profile, s̄, ŝ) of every sample of val and v2."""
    rows = [(d, row) for d in ("val", "v2") for file in sorted((run / "profiles" / d).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    mean, std = oracles.mean_and_std(np.array([row["saliency"] for d, row in rows if d == "val"]))
    raw = np.array([row["saliency"] for _, row in rows])
    return [(d, row, s, z) for (d, row), s, z in zip(rows, raw, oracles.standardise(raw, mean, std))]


def wrong(sample):
    return sample[1]["label"] != sample[1]["prediction"]


def pair(a, b):
    own, other = (a[1]["label"], a[1]["prediction"]), (b[1]["label"], b[1]["prediction"])
    return "same" if own == other else "reverse" if own == other[::-1] else "other"


def naive(run, source, within, split=None):
    """setting -> query ID -> [(dataset, ID, cosine, pair, whether an error)] of its 50 nearest, best first."""
    samples = everything(run)
    first, last = (slice(0, 8), slice(16, 24)) if split is None else (slice(0, split), slice(split, 24))
    vector = {"standardised": lambda s: s[3], "unstandardised": lambda s: s[2], "first": lambda s: s[3][first], "last": lambda s: s[3][last], "all_samples": lambda s: s[3]}
    answers = {}
    for setting, of in vector.items():
        answers[setting] = {}
        for query in (s for s in samples if s[0] == source and wrong(s)):
            others = [s for s in samples if s[0] in within and (wrong(s) or setting == "all_samples") and (s[0], s[1]["sample_id"]) != (source, query[1]["sample_id"])]
            at, cosine = oracles.cosine_neighbours(of(query)[None], np.array([of(s) for s in others]), MOST)
            answers[setting][query[1]["sample_id"]] = [(others[i][0], others[i][1]["sample_id"], c, pair(query, others[i]), wrong(others[i])) for i, c in zip(at[0], cosine[0])]
    return answers


def tables(run):
    return [row for file in sorted((run / "experiments/neighbors").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("source, within, split", [("val", ["v2"], None), ("v2", ["val", "v2"], "conv1"), ("val", ["val", "v2"], None)])
def test_neighbours_and_shares_are_those_of_brute_force(copied, tmp_path, source, within, split):
    words = ["--from", source, *(["--in", within[0]] if len(within) == 1 else []), *(["--split", split] if split else [])]
    ended, summary = ask(copied, tmp_path, *words)
    truth = naive(copied.run, source, within, 6 if split else None)
    rows = tables(copied.run)
    for setting, answers in truth.items():
        mine = [row for row in rows if row["setting"] == setting]
        k = min(len(answer) for answer in answers.values())
        assert len(mine) == k * len(answers)
        for row in mine:
            dataset, sample_id, cosine, kind, error = answers[row["sample_id"]][row["rank"] - 1]
            assert row["similarity"] == pytest.approx(cosine, abs=2e-5)
            near = [a[:2] for a in answers[row["sample_id"]] if abs(a[2] - cosine) < 4e-5]  # equals within float32
            assert (row["neighbor_dataset"], row["neighbor_id"]) in near
            if len(near) == 1:
                assert row["pair"] == kind and (row["neighbor_label"] != row["neighbor_prediction"]) == error
        for at in (1, 5, k):
            shares = {kind: np.mean([[a[3] == kind for a in answer[:at]] for answer in answers.values()]) for kind in ("same", "reverse")}
            got = summary["pair_shares"][setting]
            for kind, share in (shares | {"either": sum(shares.values())}).items():
                assert got[kind]["mean"][at - 1] == pytest.approx(share, abs=0.5 / len(answers) / at + 1e-9)
                assert got[kind]["low"][at - 1] - 1e-9 <= got[kind]["mean"][at - 1] <= got[kind]["high"][at - 1] + 1e-9
    share = np.mean([[a[4] for a in answer[:10]] for answer in truth["all_samples"].values()])
    assert ended.json["errors_among_all"] == pytest.approx(share, abs=0.1 / len(truth["all_samples"]))
    samples = [s for s in everything(copied.run) if s[0] in within]
    assert summary["base_rate"] == pytest.approx(np.mean([wrong(s) for s in samples])) == ended.json["base_rate"]
    assert summary["chance"] == pytest.approx(ended.json["chance"]) and ended.err.splitlines()[-1] == summary["found"]
    assert ended.json["either_standardised"] == pytest.approx(ended.json["either"])


def naive_colours(thumbnail):
    pixels = np.asarray(Image.open(io.BytesIO(thumbnail)).convert("RGB")).reshape(-1, 3).tolist()
    counts = {}
    for red, green, blue in pixels:
        key = red // 64, green // 64, blue // 64
        counts[key] = counts.get(key, 0) + 1 / len(pixels)
    return counts


def naive_distance(a, b):
    return sum(abs(a.get(key, 0) - b.get(key, 0)) for key in {*a, *b}) / 2


def test_colours_are_compared_pixel_by_pixel(copied, tmp_path):
    _, summary = ask(copied, tmp_path, "--from", "val", "--in", "v2")
    palette = {(d, row["sample_id"]): naive_colours(row["thumbnail"]) for d, row, _, _ in everything(copied.run)}
    by = {}
    for row in tables(copied.run):
        error = row["neighbor_label"] != row["neighbor_prediction"]
        distance = naive_distance(palette["val", row["sample_id"]], palette[row["neighbor_dataset"], row["neighbor_id"]])
        assert row["colour_distance"] == (pytest.approx(distance, abs=1e-5) if error else None)
        if row["rank"] <= 10 and error:
            by.setdefault(row["setting"], {}).setdefault(row["sample_id"], []).append(distance)
    means = {setting: {i: np.mean(distances) for i, distances in queries.items()} for setting, queries in by.items()}
    for setting in ("standardised", "first", "last", "random"):
        assert summary["colour_distance"][setting]["estimate"] == pytest.approx(np.mean(list(means[setting].values())), abs=1e-5)
    for other in ("last", "random"):
        assert summary["colour_differences"][f"first_minus_{other}"]["estimate"] == pytest.approx(np.mean([means["first"][i] - means[other][i] for i in means["first"]]), abs=1e-5)


def test_random_errors_are_errors_never_the_query_and_the_same_again(copied, tmp_path):
    ask(copied, tmp_path, "--from", "v2", "--in", "v2")
    drawn = {}
    for row in tables(copied.run):
        if row["setting"] == "random":
            assert row["neighbor_label"] != row["neighbor_prediction"] and row["neighbor_id"] != row["sample_id"] and row["similarity"] is None
            drawn.setdefault(row["sample_id"], []).append(row["neighbor_id"])
    assert all(len(set(ids)) == len(ids) == min(MOST, len(drawn) - 1) for ids in drawn.values()) and len({ids[0] for ids in drawn.values()}) > 3
    before = tables(copied.run)
    ask(copied, tmp_path, "--from", "v2", "--in", "val")
    ask(copied, tmp_path, "--from", "v2", "--in", "v2")
    assert tables(copied.run) == before


def test_other_questions_take_the_place_of_earlier_ones_and_say_so(copied, tmp_path):
    ask(copied, tmp_path, "--from", "val", "--in", "v2")
    folder = copied.run / "experiments/neighbors"
    before = {p.name: p.stat().st_ino for p in folder.glob("*.parquet")}
    ended, _ = ask(copied, tmp_path, "--from", "val", "--in", "v2")
    assert {p.name: p.stat().st_ino for p in folder.glob("*.parquet")} == before and "made anew" not in ended.err
    ended, summary = ask(copied, tmp_path, "--from", "val", "--in", "v2", "--max-samples", 4)
    assert "experiments/neighbors is made anew: max samples null, not 4" in ended.err and summary["queries"] == 4 == len({row["sample_id"] for row in tables(copied.run)})


def test_figures_are_there_and_the_run_itself_is_as_it_was(copied, tmp_path):
    before = {p: p.read_bytes() for folder in ("profiles", "index", "statistics") for p in (copied.run / folder).rglob("*") if p.is_file()}
    ask(copied, tmp_path, "--from", "val", "--in", "v2")
    folder = copied.run / "experiments/neighbors"
    assert all((folder / f"{name}{suffix}").stat().st_size > 1000 for name in ("agreement", "errors", "colours", "neighbours", "ends") for suffix in (".png", ".svg"))
    assert before == {p: p.read_bytes() for folder in ("profiles", "index", "statistics") for p in (copied.run / folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("words, says", [(["--split", "conv9"], "no layer 'conv9'"), (["--split", "conv3"], "'conv3' is the last layer"), (["--max-samples", "0"], "--max-samples: 0"), (["--seed", "-1"], "--seed: -1")])
def test_a_request_that_is_wrong_is_refused_before_anything_is_written(copied, tmp_path, words, says):
    message = tiny.call("neighbors", "--run", copied.run, "--from", "val", "--out", tmp_path / "n.parquet", "--evaluate", *words).refused()
    assert says in message and not (tmp_path / "n.parquet").exists() and not (copied.run / "experiments").exists()


def test_the_reference_is_the_indexs(copied, tmp_path):
    """Whatever --reference the index was built with standardises here too."""
    assert tiny.call("index", "--run", copied.run, "--datasets", "val,v2", "--reference", "v2").code == 0
    _, summary = ask(copied, tmp_path, "--from", "val", "--in", "v2", "-k", 3)
    assert summary["settings"]["reference"] == "v2"
    best = {row["query_id"]: row["sample_id"] for row in pq.read_table(tmp_path / "n.parquet").to_pylist() if row["rank"] == 1}
    assert best == {row["sample_id"]: row["neighbor_id"] for row in tables(copied.run) if row["setting"] == "standardised" and row["rank"] == 1}


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_ends_of_a_network():
    layout = FilterLayout((("a", 3), ("b", 4), ("c", 3)))
    assert ends(layout, None) == (slice(0, 3), slice(7, 10)) and ends(layout, "a") == (slice(0, 3), slice(3, 10)) and ends(layout, "b") == (slice(0, 7), slice(7, 10))
    with pytest.raises(BadRequest, match="nothing comes after it"):
        ends(layout, "c")


def test_vgg19_is_split_at_relu4_1():
    """The paper's first and last layers: filters 0..1919, and those after."""
    widths = [64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512]
    at = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    first, last = ends(FilterLayout(tuple((f"features.{i}", w) for i, w in zip(at, widths))), "features.19")
    assert (first.start, first.stop, last.stop) == (0, 1920, 5504)


def test_colours_of_images():
    red, blue = (encoded(Image.new("RGB", (8, 8), colour)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert colour_distance(colours(red), colours(blue)) == 1 and colour_distance(colours(red), colours(red)) == 0
    photo = encoded(picture(3, (20, 14)))
    assert colours(photo).sum() == pytest.approx(1) and 0 < colour_distance(colours(photo), colours(red)) <= 1
    assert np.isnan(colours(b"no image")).all()


def test_the_best_of_blocks_are_the_best_of_all():
    """Cut anywhere, with equals among them, each query left out of its own neighbours."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (5, 40)).astype(np.float32)
    own = np.array([-1, 0, 17, 39, 20])
    best = Best(own, 7)
    for part in np.split(np.arange(40), [1, 13, 14, 30]):
        best.see(scores[:, part], part)
    similarity, rows = best.sorted()
    for query in range(5):
        order = sorted((i for i in range(40) if i != own[query]), key=lambda i: (-scores[query, i], i))[:7]
        assert rows[query].tolist() == order and similarity[query].tolist() == scores[query, order].tolist()


def test_chance_is_counted_pair_by_pair():
    random = np.random.default_rng(1)
    label, prediction = random.integers(0, 4, 30), random.integers(0, 4, 30)
    asked, inside = [(int(a), int(b)) for a, b in zip(label, prediction)] + [(9, 9), (0, 1)], [True] * 30 + [False] * 2
    got = chances(label, prediction, *np.array(asked).T, np.array(inside))
    for at, ((a, b), share) in enumerate(zip(asked, got)):
        others = [(c, d) for i, (c, d) in enumerate(zip(label, prediction)) if i != at]
        assert share == pytest.approx(sum(other in ((a, b), (b, a)) for other in others) / len(others))


def test_the_sentence_says_what_the_numbers_say(copied, tmp_path):
    _, summary = ask(copied, tmp_path, "--from", "val", "--in", "v2")
    gap = {"estimate": -0.1, "low": -0.2, "high": -0.05, "n": 9}
    closer = found(summary | {"colour_differences": {"first_minus_last": gap, "first_minus_random": gap}})
    assert "first layers are closer in colour than those by the last (-0.100" in closer and "closer than random errors" in closer
    none = gap | {"high": 0.1}
    assert "not clearly closer in colour than" in found(summary | {"colour_differences": {"first_minus_last": none, "first_minus_random": none}}) and "colour" not in found(summary | {"colour_differences": {}})


def test_shares_of_neighbours_have_intervals_with_a_length_inside_their_range(copied, tmp_path):
    """Where no neighbour, or every one, has the property, and of few queries too."""
    for most in (1, 4, 60):
        _, summary = ask(copied, tmp_path, "--from", "val", "--in", "v2", "--max-samples", most)
        curves = [curve for of in summary["pair_shares"].values() for curve in of.values()] + [summary["error_shares"]]
        points = [point for curve in curves for point in zip(curve["low"], curve["mean"], curve["high"])]
        points += [tuple(i[key] for key in ("low", "estimate", "high")) for i in summary["colour_distance"].values()]
        assert {mean for _, mean, _ in points} & {0.0, 1.0} and all(0 <= low <= mean <= high <= 1 and high > low for low, mean, high in points)
        assert all(-1 <= i["low"] < i["high"] <= 1 for i in summary["colour_differences"].values())


@pytest.mark.parametrize("words, said", [(("--from", "val", "--in", "v2"), "--in: the index holds no sample of v2"), (("--from", "v2"), "--from: v2 has no misclassified sample")])
def test_where_there_is_nothing_to_evaluate_the_file_stays_as_it_was(copied, tmp_path, words, said):
    for file in (copied.run / "profiles/v2").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(table.column_names.index("prediction"), "prediction", table["label"]), file)
    assert tiny.call("index", "--run", copied.run, "--datasets", "val,v2", "--reference", "val").code == 0
    (tmp_path / "n.parquet").write_bytes(b"what was there")
    assert said in tiny.call("neighbors", "--run", copied.run, *words, "--out", tmp_path / "n.parquet", "--evaluate").refused()
    assert (tmp_path / "n.parquet").read_bytes() == b"what was there"
