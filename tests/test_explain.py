"""`faultline explain`: one image of a run or of a file, what is said about it, what is drawn, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from shards import encoded, picture


@pytest.fixture
def error(small) -> dict:
    """The profile of one misclassified sample of val."""
    return next(row for row in rows(small.run) if row["label"] != row["prediction"])


def rows(run: Path, dataset: str = "val") -> list[dict]:
    return [row for file in sorted((run / "profiles" / dataset).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def standardised(run: Path, saliency: list[float]) -> np.ndarray:
    table = pq.read_table(run / "statistics/val.parquet")
    mean, std = (table[c].to_numpy() for c in ("mean", "std"))
    return np.where(std > 1e-12, (np.array(saliency) - mean) / np.where(std > 1e-12, std, 1), 0)


def test_an_image_of_the_run(small, error, tmp_path):
    """Its most salient filters by layer, as its stored profile has them; confidences, neighbours as query gives them, and a picture."""
    ended = tiny.call("explain", f"val:{error['sample_id']}", "--run", small.run, "-k", 4, "--out", tmp_path / "a.png", "--format", "json")
    assert ended.code == 0, ended.err
    found, vector = ended.json, standardised(small.run, error["saliency"])
    layers = [(name, i) for name, filters in tiny.LAYERS for i in range(filters)]
    best = np.argsort(-vector)[:4]
    assert [(f["layer"], f["filter"]) for f in found["filters"]] == [layers[c] for c in best]
    assert [f["standardised"] for f in found["filters"]] == pytest.approx(vector[best].tolist(), rel=1e-3)
    assert (found["label"], found["prediction"], found["prediction_name"]) == (error["label"], error["prediction"], tiny.Net.class_names[error["prediction"]])
    assert (found["label_confidence"], found["confidence"]) == pytest.approx((error["label_confidence"], error["prediction_confidence"]), rel=1e-4)
    assert 0 < found["distance"] < 1
    asked = tiny.call("query", f"val:{error['sample_id']}", "--run", small.run, "-k", 5, "--format", "json").json
    assert [(n["sample_id"], n["pair"]) for n in found["neighbours"]] == [(n["sample_id"], n["pair"]) for n in asked]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 1500 and len(image.convert("RGB").getcolors(2**24)) > 200


def test_where_the_picture_lies_by_default(copied, error):
    ended = tiny.call("explain", error["sample_id"], "--run", copied.run)
    assert ended.code == 0, ended.err
    (file,) = (copied.run / "experiments/explain").iterdir()
    assert file.suffix == ".png" and str(file) in ended.err
    assert len(ended.out.splitlines()) == 11, "a line a filter under the heading"


def test_a_file_gives_what_the_same_image_of_the_run_gives(small, error, tmp_path):
    """By the run's network, and by a named network with the run's statistics: one answer in three ways."""
    file = tmp_path / "image.png"
    file.write_bytes(image_of(small, error["sample_id"]))
    more = ("--out", tmp_path / "a.svg", "--format", "json")
    ways = [
        tiny.call("explain", f"val:{error['sample_id']}", "--run", small.run, *more),
        tiny.call("explain", file, "--run", small.run, "--label", error["label"], *more),
        tiny.call("explain", file, "--label", error["label"], "--model", tiny.MODEL, "--statistics", small.run / "statistics/val.parquet", *more),
    ]
    assert [w.code for w in ways] == [0, 0, 0], [w.err for w in ways]
    first = ways[0].json
    for way in ways[1:]:
        assert way.json["filters"] == first["filters"] and way.json["distance"] == pytest.approx(first["distance"], rel=1e-5)
    assert ways[1].json["neighbours"][0]["sample_id"] == error["sample_id"], "the file is no sample, so that its twin is its nearest"
    assert ways[2].json["neighbours"] == [] and ways[2].json["dataset"] is None


def image_of(small, sample_id: str) -> bytes:
    import tarfile

    for shard in sorted((small.sources / "val").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.startswith(f"{sample_id}.") and not member.name.endswith("cls"):
                    return tar.extractfile(member).read()
    raise AssertionError(sample_id)


def test_the_choice_of_filters(small, error, tmp_path):
    """Named ones, most salient first; the most salient of some layers; and the map depends on them."""
    ask = lambda *words: tiny.call("explain", f"val:{error['sample_id']}", "--run", small.run, "--out", tmp_path / "a.png", "--format", "json", *words)  # noqa: E731
    named = ask("--filters", "conv1:2, conv3:9").json
    assert {(f["layer"], f["filter"]) for f in named["filters"]} == {("conv1", 2), ("conv3", 9)}
    assert named["filters"][0]["standardised"] >= named["filters"][1]["standardised"]
    assert {f["layer"] for f in ask("--layers", "conv2", "-k", 3).json["filters"]} == {"conv2"}
    assert named["distance"] != ask("-k", 2, "--boost", 3).json["distance"]


@pytest.mark.parametrize(
    "words, said",
    [
        (("val:nobody", "--run", "RUN"), "there is no sample 'val:nobody'"),
        (("ID", "--run", "RUN", "--filters", "conv1:6"), "conv1 has the filters 0..5, not '6'"),
        (("ID", "--run", "RUN", "--filters", "convx:1"), "'convx:1' is not LAYER:CHANNEL of a layer of this network; close to it: conv"),
        (("ID", "--run", "RUN", "--filters", "conv1:1", "--layers", "conv1"), "give one of them"),
        (("ID", "--run", "RUN", "-k", "0", "--boost", "1", "--noise", "1"), "-k: 0 is less than 1"),
        (("ID", "--run", "RUN", "--model", "resnet50"), "--model: the run has its own; leave it out"),
        (("ID", "--run", "RUN", "--out", "a.gif"), "--out: a.gif does not end in"),
        (("ID", "--run", "RUN", "--out", "RUN/profiles/a.png"), "lies among the run's own files"),
        (("ID",), "--label, --model, --statistics: needed for an image file without a run"),
        (("FILE", "--run", "RUN"), "is a file: say its true class"),
        (("FILE", "--run", "RUN", "--label", "5"), "label 5 is outside the network's classes 0..4; give another --label"),
        (("TEXT", "--run", "RUN", "--label", "1"), "not an image in a format that is known here; fetch it again, or give another image"),
        (("nowhere.jpg", "--run", "RUN", "--label", "1"), "nowhere.jpg cannot be read"),
        (("FILE", "--label", "1", "--model", "tiny:net", "--statistics", "RUN/statistics/nobody.parquet"), "nobody.parquet cannot be read as statistics"),
        (("FILE", "--label", "1", "--model", "tiny:colours", "--statistics", "RUN/statistics/val.parquet"), "holds the statistics of another network: 24 filters where the network of --model has"),
        (("FILE", "--label", "1", "--model", "tiny:net", "--statistics", "short.pth", "--aggregation", "abs"), "short.pth is about 3 filters, the network of --model has 24"),
        (("ID", "--run", "RUN", "--reference", "nobody"), "--reference: there is neither a data set nor imported statistics named 'nobody'"),
    ],
)
def test_is_refused(small, error, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.jpg").write_bytes(encoded(picture(3)))
    (tmp_path / "text.jpg").write_text("no image")
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "short.pth")
    places = {"ID": f"val:{error['sample_id']}", "FILE": "image.jpg", "TEXT": "text.jpg"}
    words = [places.get(w, w.replace("RUN", str(small.run))) for w in words]
    assert said in tiny.call("explain", *words).refused()
    assert not list(tmp_path.glob("*.png")) and not (small.run / "experiments/explain").exists()


def test_published_statistics_must_say_how_they_were_aggregated(small, error, tmp_path):
    import torch

    table = pq.read_table(small.run / "statistics/val.parquet")
    torch.save({key: torch.tensor(table[key].to_numpy()) for key in ("mean", "std")}, tmp_path / "stat.pth")
    (tmp_path / "image.png").write_bytes(image_of(small, error["sample_id"]))
    words = ("explain", tmp_path / "image.png", "--label", error["label"], "--model", tiny.MODEL, "--statistics", tmp_path / "stat.pth", "--out", tmp_path / "a.png", "--format", "json")
    assert "--aggregation: published statistics do not say" in tiny.call(*words).refused()
    ended = tiny.call(*words, "--aggregation", "abs")
    assert ended.code == 0, ended.err
    vector = standardised(small.run, error["saliency"])
    assert ended.json["filters"][0]["standardised"] == pytest.approx(vector.max(), rel=1e-3)


def test_an_index_that_cannot_be_asked_is_no_end(copied, error, tmp_path):
    """Absent, or of other statistics: said, and the image is explained without neighbours; an index that is named must do."""
    words = ("explain", f"val:{error['sample_id']}", "--run", copied.run, "--out", tmp_path / "a.png", "--format", "json")
    other = tiny.call(*words, "--reference", "v2")
    assert other.code == 0 and other.json["neighbours"] == [] and "made with the statistics of val, not those asked for" in other.err
    shutil.rmtree(copied.run / "index")
    gone = tiny.call(*words)
    assert gone.code == 0 and gone.json["neighbours"] == [] and "no neighbours are drawn: " in gone.err
    assert "index" in tiny.call(*words, "--name", "errors").refused()


def test_an_image_that_has_changed_is_refused(copied, error, tmp_path):
    sources = tmp_path / "moved"
    census = json.loads((copied.run / "datasets/val.json").read_text())
    shutil.copytree(copied.sources / "val", sources)
    text = (copied.run / "datasets/val.json").read_text().replace(census["root"], str(sources))
    (copied.run / "datasets/val.json").write_text(text)
    for shard in sources.glob("*.tar"):
        shard.unlink()
    assert "is not what was extracted" in tiny.call("explain", f"val:{error['sample_id']}", "--run", copied.run).refused()
