"""The machinery of experiments, with a small one: which samples, their images read again, one file a unit, resumed, refused, told."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import tiny
from PIL import Image
from jobs.chaos.processes import running

from jobs.experiment import Request, carry_out
from pipeline import experiment as machinery
from pipeline.errors import BadRequest, Stopped
from pipeline.experiment import Choice
from pipeline.store import Store

SHADES = pa.schema([("sample_id", pa.string()), ("shade", pa.float64()), ("saliency", pa.float64())])


@dataclass(frozen=True)
class Shades:
    """The mean pixel of each image, its mean s̄ beside it. `refuses`: an ID on which it fails."""

    power: int = 1
    refuses: str = ""
    name: str = "shades"
    images: bool = True
    columns: tuple[str, ...] = ("saliency",)
    weight: float = 1.0

    @property
    def schema(self) -> pa.Schema:
        return SHADES

    def settings(self) -> dict:
        return {"power": self.power}

    def start(self, run, device):
        def rows(samples, profiles):
            assert [s.sample_id for s in samples] == profiles["sample_id"].to_pylist() and device == "cpu"
            if self.refuses in profiles["sample_id"].to_pylist():
                raise RuntimeError("a shade too many")
            saliency = [float(np.mean(s)) for s in profiles["saliency"].to_pylist()]
            return pa.table([profiles["sample_id"], pa.array([float(s.pixels.mean()) ** self.power for s in samples]), pa.array(saliency)], schema=SHADES)

        return rows


@dataclass(frozen=True)
class Verb:
    experiment: Shades = Shades()
    subset: str = "errors"
    figures: tuple[str, ...] = ("shades",)
    also: tuple[str, ...] = ()

    def check(self, store, samples):
        if self.experiment.power > 9:
            raise BadRequest(f"no network can do that, as {len(samples)} images show")

    def cost(self, samples):
        return f"{samples} images are looked at"

    def summarise(self, store, dataset, reference, rows):
        return {"result": {"mean": float(np.mean(rows["shade"].to_numpy()))}, "found": "images have shades"}

    def draw(self, store, summary, folder):
        for suffix in (".png", ".svg"):
            (folder / f"shades{suffix}").write_text(str(summary["result"]["mean"]))


@pytest.fixture
def mine(small, tmp_path):
    """A finished run and its sources, both to be changed."""
    shutil.copytree(small.run, tmp_path / "run")
    shutil.copytree(small.sources, tmp_path / "sources")
    for census in (tmp_path / "run/datasets").glob("*.json"):
        census.write_text(census.read_text().replace(str(small.sources), str(tmp_path / "sources")))
    return tiny.Small(tmp_path / "run", tmp_path / "sources")


def oracle(small, dataset="val"):
    """ID -> mean pixel of every misclassified image, from tar and profiles by hand."""
    wrong = {row["sample_id"] for row in rows_of(small.run / "profiles" / dataset) if row["label"] != row["prediction"]}
    found = {}
    for path in sorted((small.sources / dataset).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind == "jpg" and key in wrong:
                    found[key] = float(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"), np.float64).mean())
    return found


def rows_of(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def shades(small, **options):
    return carry_out(Verb(**({"experiment": options.pop("experiment")} if "experiment" in options else {})), Request(small.run, **options))


def ids(small):
    return [row["sample_id"] for row in rows_of(small.run / "experiments/shades")]


def stamps(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir() if p.name != ".lock"}


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_every_error_is_looked_at_once_with_its_own_image_and_profile(mine, capsys):
    summary = shades(mine)
    found, truth = rows_of(mine.run / "experiments/shades"), oracle(mine)
    assert len(found) == len(truth) and {row["sample_id"]: row["shade"] for row in found} == pytest.approx(truth)
    saliency = {row["sample_id"]: np.mean(row["saliency"]) for row in rows_of(mine.run / "profiles/val")}
    assert all(row["saliency"] == pytest.approx(saliency[row["sample_id"]]) for row in found)
    files = {p.name for p in (mine.run / "experiments/shades").iterdir()}
    assert {f for f in files if f.endswith(".parquet")} == {p.name for p in (mine.run / "profiles/val").glob("*.parquet")}
    assert files >= {"settings.json", "summary.json", "shades.png", "shades.svg"} and summary["result"]["mean"] == pytest.approx(np.mean(list(truth.values())))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("statistics") or lines[0] == f"shades: {len(truth)} images are looked at"


def test_a_choice_of_samples_does_not_depend_on_units(mine, tmp_path):
    """The same ten of a run whose units were cut elsewhere; ten are the beginning of twenty; another seed chooses others."""
    chosen = {}
    for most, seed in ((10, 0), (20, 0), (10, 1)):
        shades(mine, max_samples=most, seed=seed, fresh=True)
        chosen[most, seed] = set(ids(mine))
        assert len(chosen[most, seed]) == len(ids(mine)) == most
    assert chosen[10, 0] < chosen[20, 0] and chosen[10, 0] != chosen[10, 1]
    cut = tiny.Small(tmp_path / "cut", mine.sources)
    assert cut.extract("val", "--max-samples", 27).code == 0 and cut.extract("val").code == 0
    assert len(list((cut.run / "profiles/val").iterdir())) == 4
    shades(cut, max_samples=10)
    assert set(ids(cut)) == chosen[10, 0]


def test_all_errors_are_chosen_where_fewer_exist_than_asked_for(mine):
    shades(mine, max_samples=1000)
    assert set(ids(mine)) == set(oracle(mine))


def test_images_of_a_second_data_set_are_gathered_in_place(mine):
    store = Store(mine.run)
    got = {s.sample_id: s.pixels.mean() for samples, _ in machinery.gathered(store, "v2", Choice("errors", 0)) for s in samples}
    assert got == pytest.approx(oracle(mine, "v2"))


# ---- the same command again ----------------------------------------------------------------------------------------


def test_the_same_command_is_free_when_all_is_there(mine, monkeypatch):
    before = shades(mine)
    seen = stamps(mine.run / "experiments/shades")
    monkeypatch.setattr(Shades, "start", None)
    assert shades(mine) == before and stamps(mine.run / "experiments/shades") == seen


def test_a_figure_that_was_lost_is_drawn_again_from_the_summary(mine, monkeypatch):
    shades(mine)
    figure = mine.run / "experiments/shades/shades.svg"
    before = figure.read_bytes()
    figure.unlink()
    monkeypatch.setattr(Shades, "start", None)
    shades(mine)
    assert figure.read_bytes() == before


def test_what_is_done_is_not_done_again(mine, capsys):
    """A job that stopped in its second unit: the first stays as it is, the others follow, and the result is that of one go."""
    third = sorted((mine.run / "profiles/val").glob("*.parquet"))[2]
    bad = next(i for i in oracle(mine) if i in pq.read_table(third)["sample_id"].to_pylist())
    with pytest.raises(Stopped, match="a shade too many\nwhat is done is kept; the same command resumes"):
        shades(mine, experiment=Shades(refuses=bad))
    folder = mine.run / "experiments/shades"
    done = stamps(folder)
    assert sorted(n for n in done if n.endswith(".parquet")) == sorted(p.name for p in (mine.run / "profiles/val").glob("*.parquet"))[:2]
    assert not (folder / "summary.json").exists()
    capsys.readouterr()
    shades(mine)
    assert "2 of 3 units are done" in capsys.readouterr().err
    assert {name: stamps(folder)[name] for name in done} == done | {"settings.json": stamps(folder)["settings.json"]}
    assert {row["sample_id"]: row["shade"] for row in rows_of(folder)} == pytest.approx(oracle(mine))


def test_rows_without_settings_are_nobodys_and_discarded(mine):
    shades(mine)
    folder = mine.run / "experiments/shades"
    (folder / "settings.json").unlink()
    shades(mine, experiment=Shades(power=2))
    assert {row["sample_id"]: row["shade"] for row in rows_of(folder)} == pytest.approx({i: v**2 for i, v in oracle(mine).items()})


# ---- what does not belong together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [({"experiment": Shades(power=2)}, "power 1, not 2"), ({"seed": 3}, "seed 0, not 3"), ({"max_samples": 5}, "max samples null, not 5"), ({"dataset": "v2"}, "dataset val, not v2"), ({"reference": "v2"}, "reference val, not v2")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_settings_are_refused_until_discarded(mine, options, says):
    shades(mine)
    folder = mine.run / "experiments/shades"
    before = stamps(folder)
    with pytest.raises(BadRequest, match=f"{says}.*add --fresh"):
        shades(mine, **options)
    assert stamps(folder) == before
    shades(mine, fresh=True, **options)
    assert shades(mine, **options) and set(ids(mine)) <= set(oracle(mine, options.get("dataset", "val")))
    assert not {p.stem for p in folder.glob("*.parquet")} - {p.stem for p in (mine.run / "profiles" / options.get("dataset", "val")).glob("*.parquet")}


def test_more_profiles_than_before_are_another_experiment(mine):
    shades(mine)
    shards.write_shard(mine.sources / "val/val-00003.tar", [0, 1, 2], first=300)
    assert mine.extract("val").code == 0
    with pytest.raises(BadRequest, match="the profiles of val have changed"):
        shades(mine)


def test_an_unfinished_data_set_is_refused(tmp_path):
    small = tiny.Small(tmp_path / "run", tiny.make_sources(tmp_path / "sources"))
    assert small.extract("val").code == 0
    next((small.run / "profiles/val").glob("*.parquet")).unlink()
    with pytest.raises(BadRequest, match="val is unfinished: 20 of 60 samples are still to do"):
        shades(small)
    assert not (small.run / "experiments").exists()


@pytest.mark.parametrize("options, says", [({"dataset": "nothing"}, "no data set 'nothing'"), ({"max_samples": 0}, "--max-samples: 0"), ({"seed": -1}, "--seed: -1"), ({"device": "tpu"}, "--device: 'tpu'"), ({"reference": "nothing"}, "--reference: there is neither")])
def test_a_request_that_is_wrong_is_refused(mine, options, says):
    with pytest.raises(BadRequest, match=says):
        shades(mine, **options)
    assert not (mine.run / "experiments").exists()


def test_a_network_that_cannot_do_it_is_refused_before_anything_is_done(mine):
    with pytest.raises(BadRequest, match="as 3 images show"):
        shades(mine, experiment=Shades(power=10))
    assert not [p for p in (mine.run / "experiments/shades").iterdir() if p.name != ".lock"]


def test_a_second_job_is_refused(mine):
    import fcntl

    shades(mine)
    with open(mine.run / "experiments/shades/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadRequest, match="another job is writing"):
            shades(mine)


# ---- sources and images that are not what they were ----------------------------------------------------------------


def moved(path):
    path.rename(path.with_suffix(".gone"))
    return "val-00001.tar"


def changed(path):
    shards.write_shard(path, [1] * 20, first=900)
    return "val-00001.tar is not what was extracted: it has changed"


@pytest.mark.parametrize("change", [moved, changed])
def test_a_source_that_moved_or_changed_is_refused_by_name(mine, change):
    says = change(mine.sources / "val/val-00001.tar")
    with pytest.raises(BadRequest, match=says):
        shades(mine)
    assert not list((mine.run / "experiments/shades").glob("*.parquet"))


def test_an_image_that_cannot_be_read_any_more_is_set_aside_and_told(mine, capsys):
    """Its bytes are overwritten in place, so that names, sizes and times stay: nothing else shows it."""
    path, truth = mine.sources / "val/val-00000.tar", oracle(mine)
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".jpg") and m.name[:-4] in truth)
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * member.size)
    lost = member.name[:-4]
    for _ in range(2):
        summary = shades(mine)
        assert summary["set_aside"] == [[lost, "not an image in a format that is known here"]]
        assert f"{lost} was set aside: not an image" in capsys.readouterr().err
    assert set(ids(mine)) == set(truth) - {lost}


def test_a_label_that_changed_in_place_is_refused(mine):
    """Though every header says what it said: the tar is not the one that was extracted."""
    path, truth = mine.sources / "val/val-00000.tar", oracle(mine)
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name.endswith(".cls") and m.name[:-4] in truth)
        label = tar.extractfile(member).read()
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"0" if label != b"0" else b"1")
    with pytest.raises(BadRequest, match="val-00000.tar is not what was extracted"):
        shades(mine)


# ---- many workers --------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_on_ray_the_rows_are_the_same(mine):
    """The command with engines of its own, and the same numbers as in one process; another job finds nothing to do."""
    assert tiny.call("profile", "--run", mine.run).code == 0
    alone = rows_of(mine.run / "experiments/profile")
    with running(mine.run.parent, "profile", "--run", mine.run, "--fresh", "--address", "local", "--actors", 1, env=tiny.surroundings()) as job:
        assert job.wait() == 0 and "Ray's workers are starting" in job.stderr(), job.stderr()
        assert json.loads(json.dumps(rows_of(mine.run / "experiments/profile"))) == json.loads(json.dumps(alone))


def test_a_request_can_be_replaced(mine):
    """Of what is cheap to make again (`fresh=None`) other results take the place of earlier ones."""
    shades(mine)
    carry_out(Verb(experiment=replace(Shades(), power=2)), Request(mine.run, fresh=None))
    assert {row["sample_id"]: row["shade"] for row in rows_of(mine.run / "experiments/shades")} == pytest.approx({i: v**2 for i, v in oracle(mine).items()})
