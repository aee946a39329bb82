"""`faultline explain --all-errors`: rows held to what one image gives, how concentrated a map is, the sheet, and what is refused."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from test_interventions_jobs import images, profiles, rows_of, standardised, summary_of, wrong

from jobs.maps import heat_of
from pipeline.explanation.input_saliency import InputSaliency
from pipeline.filters import FilterLayout
from pipeline.intervals import share_mean
from pipeline.statistics import Reference


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    small = tiny.make(tmp_path_factory.mktemp("maps"))
    ended = tiny.call("explain", "--all-errors", "--run", small.run, "-k", 3, "--format", "json")
    assert ended.code == 0, ended.err
    return small, ended


def test_every_error_has_the_map_that_it_has_alone(done):
    small, ended = done
    facts, vectors, seen = profiles(small.run, "val"), standardised(small.run), images(small, "val")
    rows = {row["sample_id"]: row for row in rows_of(small.run / "experiments/explain")}
    assert set(rows) == set(wrong(facts)) and ended.json["samples"] == len(rows)
    network = tiny.Net().double().eval()
    engine = InputSaliency(network, Reference.read(small.run / "statistics/val.parquet", FilterLayout.of(network)))
    for i, row in rows.items():
        best = np.argsort(-vectors[i], kind="stable")[:3]
        assert row["filters"] == best.tolist() and row["standardised"] == pytest.approx(vectors[i][best].tolist(), rel=1e-3)
        found = engine(seen[i][None], torch.tensor([facts[i]["label"]]), [best])
        heat = found.maps[0].amax(0).numpy()
        assert heat_of(row) == pytest.approx(heat, abs=2e-3 * heat.max()) and row["distance"] == pytest.approx(found.distance.item(), abs=1e-4)
        assert row["hot"] == pytest.approx(np.sort(heat, None)[::-1][:6].sum() / heat.sum(), rel=1e-3)
        with Image.open(io.BytesIO(row["picture"])) as picture:
            assert picture.size == (12, 10)
    single = tiny.call("explain", f"val:{next(iter(rows))}", "--run", small.run, "-k", 3, "--out", small.run.parent / "a.png", "--format", "json").json
    assert single["distance"] == pytest.approx(next(iter(rows.values()))["distance"], abs=1e-4)


def test_what_is_said_drawn_and_kept(done):
    small, ended = done
    summary, folder = summary_of(small.run, "explain"), small.run / "experiments/explain"
    assert ended.err.splitlines()[-1] == summary["found"] and "the hottest 5% of the pixels hold" in summary["found"]
    known = [r["hot"] for r in rows_of(folder)]
    assert summary["hot"] == share_mean(np.array(known)).to_json(), "a share has an interval of shares"
    assert len(summary["examples"]) == 8 and all((folder / f"maps.{end}").exists() for end in ("png", "svg"))
    again = tiny.call("explain", "--all-errors", "--run", small.run, "-k", 3, "--format", "json")
    assert again.code == 0 and again.json == ended.json and "passes" not in again.err
    assert "k 3, not 4" in tiny.call("explain", "--all-errors", "--run", small.run, "-k", 4).refused()
    assert sorted({pq.read_metadata(f).num_columns for f in folder.glob("*.parquet")}) == [12]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--run", "RUN"), "ID or FILE: name an image, or say --all-errors"),
        (("--all-errors",), "--run: say which run's errors are explained"),
        (("ID", "--all-errors", "--run", "RUN", "--out", "a.png"), "ID or FILE, --out: not for --all-errors; leave them out"),
        (("ID", "--run", "RUN", "--max-samples", "3"), "--max-samples: not for one image; leave it out, or say --all-errors"),
        (("--all-errors", "--run", "RUN", "-k", "25"), "-k: 25 is more than the 24 live filters"),
        (("--all-errors", "--run", "RUN", "--boost", "1"), "--boost: 1 boosts nothing"),
    ],
)
def test_is_refused(small, words, said):
    i = wrong(profiles(small.run, "val"))[0]
    assert said in tiny.call("explain", *({"RUN": str(small.run), "ID": f"val:{i}"}.get(w, w) for w in words)).refused()
    assert not (small.run / "experiments/explain").exists()
