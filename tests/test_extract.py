"""`faultline extract` in this process: resumes without repeating anything, is free when all is there, and never mixes what does not belong together."""

import json
import os
import shutil
import tarfile

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import tiny
from PIL import Image

from jobs import cluster
from pipeline import failpoints
from pipeline.store import Store, saliency_of


def files(run, dataset="val"):
    """Every file that holds results: name -> (inode, time of change, size)."""
    found = [p for folder in ("profiles", "rejects") for p in (run / folder / dataset).iterdir()]
    return {f"{p.parent.parent.name}/{p.name}": (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in found}


def table_of(run, dataset="val"):
    return pa.concat_tables(pq.read_table(f) for f in Store(run).files(dataset))


def everything(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def status(run, dataset="val"):
    got = tiny.call("status", "--run", run, "--format", "json").json["datasets"][dataset]
    return got["samples"], got["done"], got["pending"], got["rejected"]


@pytest.fixture
def mine(small, tmp_path):
    """Sources of its own to be changed, and a run not yet begun."""
    return tiny.Small(tmp_path / "run", shutil.copytree(small.sources, tmp_path / "sources"))


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine, aggregation", [("fused", "abs"), ("vmap", "abs"), ("fused", "signed"), ("vmap", "signed")])
def test_profiles_are_the_oracles(mine, engine, aggregation):
    """Both engines, both aggregations, on images decoded from the shard by PIL alone: within 1e-5 of the float64 loop."""
    import torch

    assert mine.extract("v2", "--engine", engine, "--aggregation", aggregation).code == 0
    with tarfile.open(mine.sources / "v2/v2-00000.tar") as tar:
        members = {m.name: tar.extractfile(m) for m in tar}
        names = sorted(name.removesuffix(".jpg") for name in members if name.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(members[f"{n}.jpg"]).convert("RGB"), np.float64) / 255 for n in names])
        labels = torch.tensor([int(members[f"{n}.cls"].read()) for n in names])
    images = torch.from_numpy((pixels - 0.5) / 0.25).permute(0, 3, 1, 2)
    table = table_of(mine.run, "v2")
    assert table["sample_id"].to_pylist() == names and table["label"].to_pylist() == labels.tolist() and set(table["shard"].to_pylist()) == {"v2-00000.tar"}
    assert oracles.relative_errors(saliency_of(table), oracles.saliency(tiny.net(), images, labels, aggregation)).max() < 1e-5
    logits = torch.from_numpy(oracles.logits(tiny.net(), images))
    assert table["prediction"].to_pylist() == logits.argmax(1).tolist()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    assert np.allclose(table["loss"], loss, rtol=1e-5) and np.allclose(table["label_confidence"], np.exp(-loss), rtol=1e-4, atol=1e-9)
    assert np.allclose(table["prediction_confidence"], logits.softmax(1).amax(1), rtol=1e-5)
    about = json.loads((mine.run / "run.json").read_text())
    assert (about["engine"], about["aggregation"], about["class_names"]) == (engine, aggregation, list(tiny.Net.class_names))
    assert [(x["name"], x["filters"]) for x in about["layers"]] == tiny.LAYERS


def test_batch_size_changes_no_number(mine, small):
    """1 against 32: within 1e-5. What is filled up for that is told."""
    ended, whole = mine.extract("val", "--batch-size", 1), max(2, cluster.threads_of_an_engine())
    assert ended.code == 0 and f"batches of 1 are filled up to {whole}, " in ended.err and f"--batch-size {whole} takes less time" in ended.err
    one, many = table_of(mine.run), table_of(small.run)
    assert one["sample_id"] == many["sample_id"] and one["prediction"] == many["prediction"]
    assert oracles.relative_errors(saliency_of(one), saliency_of(many).astype(np.float64)).max() < 1e-5


def test_class_folders_give_the_ids_of_the_tar_of_the_tree(mine, tmp_path):
    """From the images to a query: a tree of class folders and a tar of it name the same samples and give the same numbers."""
    tree = {f"{c}/img_{i:02d}.png": shards.encoded(shards.picture(10 * c + i), "PNG") for c in range(tiny.CLASSES) for i in range(6)}
    shards.write_tree(tmp_path / "tree", tree)
    members = [(name.rpartition(".")[0] + end, content) for name, image in tree.items() for end, content in ((".png", image), (".cls", name[:1].encode()))]
    shards.write_tar(tmp_path / "tar/tree.tar", members)
    for dataset, source in (("folders", "tree"), ("tars", "tar")):
        ended = tiny.call("extract", "--run", mine.run, "--dataset", dataset, "--source", tmp_path / source, "--model", tiny.MODEL)
        assert ended.code == 0, ended.err
    ours, theirs = table_of(mine.run, "folders"), table_of(mine.run, "tars")
    assert ours["sample_id"].to_pylist() == theirs["sample_id"].to_pylist() == [name.removesuffix(".png") for name in tree]
    assert ours.drop(["shard"]) == theirs.drop(["shard"])
    assert tiny.call("index", "--run", mine.run).code == 0
    error = next(row for row in ours.to_pylist() if row["label"] != row["prediction"])["sample_id"]
    found = tiny.call("query", "--run", mine.run, f"folders:{error}", "--format", "json", "-k", 1).json
    assert [(row["dataset"], row["sample_id"], row["pair"], round(row["similarity"], 5)) for row in found] == [("tars", error, "same", 1.0)]


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_what_is_done_is_never_computed_again(mine, small):
    """First 7 samples, then 25, then all, then all again: files only ever appear, and the rows are those of one go."""
    seen = {}
    for more, samples in (["--max-samples", 7], 7), (["--max-samples", 25], 25), ([], 60), ([], 60):
        before = everything(mine.run)
        ended = mine.extract("val", *more)
        assert ended.code == 0 and not ended.out
        now = files(mine.run)
        assert {name: now[name] for name in seen} == seen and status(mine.run) == (samples, samples, 0, 0)
        seen = now
    assert "nothing to do" in ended.err and set(everything(mine.run)) == set(before) and "loading" not in ended.err
    assert table_of(mine.run) == table_of(small.run)


def test_first_shards_then_all(mine):
    assert mine.extract("val", "--shards", 1).code == 0 and status(mine.run) == (20, 20, 0, 0)
    seen = files(mine.run)
    assert mine.extract("val").code == 0 and status(mine.run) == (60, 60, 0, 0)
    assert {name: files(mine.run)[name] for name in seen} == seen


def test_a_first_shard_asked_for_again_forgets_none_of_the_others(mine):
    """`--shards 1` after everything: the rest stays counted, and a change in it is still noticed."""
    assert mine.extract("val").code == 0
    assert mine.extract("val", "--shards", 1).code == 0 and status(mine.run) == (60, 60, 0, 0)
    says = changed_shard(mine)
    assert says in mine.extract("val").refused()


def test_a_lost_unit_is_done_again_alone(mine, small):
    assert mine.extract("val").code == 0
    store, seen = Store(mine.run), files(mine.run)
    lost = store.files("val")[1]
    lost.unlink()
    (lost.parent / f".{lost.name}.dead.tmp").write_bytes(b"half")
    assert status(mine.run) == (60, 40, 20, 0)
    assert mine.extract("val").code == 0
    now = files(mine.run)
    assert {name for name in seen if now[name] != seen[name]} == {f"profiles/{lost.name}", f"rejects/{lost.name}"} and set(now) == set(seen)
    assert table_of(mine.run) == table_of(small.run)


def test_a_new_shard_is_added(mine):
    assert mine.extract("v2").code == 0
    seen = files(mine.run, "v2")
    shards.write_shard(mine.sources / "v2/v2-00001.tar", [0, 1, 2], first=2000)
    assert mine.extract("v2").code == 0 and status(mine.run, "v2") == (33, 33, 0, 0)
    assert {name: files(mine.run, "v2")[name] for name in seen} == seen


# ---- what does not belong together ---------------------------------------------------------------------------------


def changed_shard(mine):
    shards.write_shard(mine.sources / "val/val-00001.tar", [1] * 20, first=900)
    return "val-00001.tar has changed since this data set was begun"


def lost_shard(mine):
    (mine.sources / "val/val-00001.tar").unlink()
    return "val-00001.tar is part of this data set, but not in --source"


def damaged_shard(mine):
    path = mine.sources / "val/val-00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    return "val-00001.tar cannot be read to its end"


def other_source(mine):
    (mine.sources / "val").rename(mine.sources / "other")
    shutil.copytree(mine.sources / "v2", mine.sources / "elsewhere")
    (mine.sources / "elsewhere").rename(mine.sources / "val")
    return "val-00000.tar, val-00001.tar, val-00002.tar is part of this data set, but not in --source"


@pytest.mark.parametrize("change", [changed_shard, lost_shard, damaged_shard, other_source])
def test_another_source_than_at_first_is_refused(mine, change):
    assert mine.extract("val", "--max-samples", 25).code == 0
    says, before = change(mine), everything(mine.run)
    assert says in mine.extract("val").refused() and everything(mine.run) == before


def test_another_place_is_refused(mine):
    assert mine.extract("val").code == 0
    before = everything(mine.run)
    message = tiny.call("extract", "--run", mine.run, "--dataset", "val", "--source", mine.sources / "v2", "--model", tiny.MODEL).refused()
    assert "data set 'val' of this run comes from" in message and "give another --dataset or --run" in message and everything(mine.run) == before


@pytest.mark.parametrize(
    "words, says",
    [
        (["--model", "tiny:other_weights"], "model tiny:net, not tiny:other_weights"),
        (["--preprocess", "resize=8"], "preprocessing"),
        (["--aggregation", "signed"], "aggregation abs, not signed"),
        (["--batch-size", "7"], "batch_size 32, not 7"),
        (["--engine", "vmap"], "engine fused, not vmap"),
        (["--precision", "bf16"], "precision fp32, not bf16"),
        (["--aggregation", "signed", "--batch-size", "7"], "aggregation abs, not signed; batch_size 32, not 7"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
@pytest.mark.parametrize("dataset", ["val", "third"])
def test_other_settings_are_refused_naming_the_difference(copied, words, says, dataset):
    """For a data set that is there and for a new one; nothing is written."""
    before = everything(copied.run)
    source = copied.sources / "val"
    model = [] if "--model" in words else ["--model", tiny.MODEL]
    message = tiny.call("extract", "--run", copied.run, "--dataset", dataset, "--source", source, *model, *words).refused()
    assert says in message and "never mixed" in message and everything(copied.run) == before


def test_other_weights_are_refused(copied, tmp_path):
    import torch

    torch.save(tiny.other_weights().state_dict(), tmp_path / "other.pth")
    before = everything(copied.run)
    assert "weights_sha256" in copied.extract("val", "--weights", tmp_path / "other.pth").refused() and everything(copied.run) == before


# ---- samples that are set aside ------------------------------------------------------------------------------------


@pytest.fixture
def dirty(tmp_path):
    """Twelve samples, of which five cannot be used, each for a reason of its own."""
    good = [(f"{i:03d}{end}", content) for i in range(7) for end, content in ((".jpg", shards.photo(i)), (".cls", str(i % 5).encode()))]
    bad = [("bad_label.jpg", shards.photo(7)), ("bad_label.cls", b"5"), ("negative.jpg", shards.photo(8)), ("negative.cls", b"-1"), ("text.jpg", b"no image"), ("text.cls", b"1")]
    bad += [("empty.jpg", b""), ("empty.cls", b"1"), ("unlabelled.jpg", shards.photo(9))]
    shards.write_tar(tmp_path / "sources/val/a.tar", good[:6] + bad + good[6:])
    return tiny.Small(tmp_path / "run", tmp_path / "sources")


def test_bad_samples_are_set_aside_with_their_reasons(dirty):
    """Exit code 3, at once and when there is nothing left to do; the rest is profiled; an unknown-looking ID tells why."""
    for turn in range(2):
        ended = dirty.extract("val")
        assert ended.code == 3 and "filled up" not in ended.err and "7 profiles, 5 set aside" in ended.err and "more than --max-rejects 0" in ended.err and "rejects/val/" in ended.err
    assert status(dirty.run) == (12, 7, 0, 5)
    reasons = {row["sample_id"]: row["reason"] for row in Store(dirty.run).rejects("val").to_pylist()}
    assert reasons == {
        "bad_label": "label 5 is outside the network's classes 0..4",
        "negative": "label -1 is outside the network's classes 0..4",
        "text": "not an image in a format that is known here",
        "empty": "the image is empty (0 bytes)",
        "unlabelled": 'no label (.cls, or .json with "label") under this key',
    }
    assert dirty.extract("val", "--max-rejects", 5).code == 0 and dirty.extract("val", "--max-rejects", 4).code == 3
    assert tiny.call("index", "--run", dirty.run).code == 0
    assert "'text' was set aside when val was extracted: not an image" in tiny.call("query", "--run", dirty.run, "text").refused()


def test_nothing_but_bad_samples_is_refused(tmp_path):
    shards.write_tar(tmp_path / "a.tar", [("a.jpg", b"no image"), ("a.cls", b"1")])
    message = tiny.call("extract", "--run", tmp_path / "run", "--dataset", "val", "--source", tmp_path / "a.tar", "--model", tiny.MODEL).refused()
    assert "none of the 1 samples that were tried can be used" in message and not (tmp_path / "run").exists()


# ---- requests that are wrong ---------------------------------------------------------------------------------------


def test_a_mistyped_model_is_told_before_any_shard_is_counted(mine):
    ended = mine.extract("val", model="resnet5o")
    assert "resnet50" in ended.refused() and "counting" not in ended.err


@pytest.mark.parametrize(
    "model, says",
    [
        ("tiny:nan", "not finite"),
        ("tiny:pair", "the network gives tuple for 3 images"),
        ("tiny:one_number", "the network gives shape [3] for 3 images"),
        ("tiny:absent", "tiny:absent cannot be made (AttributeError"),
        ("absent:net", "absent:net cannot be made (ModuleNotFoundError"),
        ("resnet18x", "there is no 'resnet18x'; close to it: resnet18"),
    ],
)
def test_network_that_cannot_be_used_is_refused(mine, model, says):
    message = mine.extract("val", model=model).refused()
    assert says in message and "--model" in message and not mine.run.exists()


@pytest.mark.parametrize("times", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("fault", [SystemExit(0), GeneratorExit()], ids=["exit", "generator"])
def test_a_network_that_asks_to_exit_while_it_is_tried_is_refused(mine, monkeypatch, times, fault):
    """At whichever of its first answers: it must not look as if all had been done."""
    answers = iter(range(1000))

    def answer(logits):
        if next(answers) >= times:
            raise fault
        return logits

    monkeypatch.setattr(tiny, "pair", lambda: tiny.Broken(answer))
    message = mine.extract("val", model="tiny:pair").refused()
    assert any(said in message for said in ("--model: its code ended the program", f"the network fails on it: {type(fault).__name__}")) and not mine.run.exists()


def test_all_faults_of_the_settings_are_told_together(mine):
    message = mine.extract("../val", "--engine", "fast", "--batch-size", 0, "--max-samples", -1, "--aggregation", "sum").refused()
    assert all(f"--{name}:" in message for name in ("dataset", "engine", "batch-size", "max-samples", "aggregation")) and not mine.run.exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--batch-size", "2000"], "more than a unit of work"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--precision", "tf32", "--device", "cpu"], "tf32 exists on CUDA GPUs alone"),
    ],
)
def test_settings_that_do_not_exist_are_refused(mine, words, says):
    assert says in mine.extract("val", *words).refused() and not mine.run.exists()


def test_a_run_cannot_be_a_file(mine):
    mine.run.write_text("a file")
    assert "is a file; name a folder" in mine.extract("val").refused() and mine.run.read_text() == "a file"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can write")
def test_a_run_where_nobody_can_write_is_refused(mine):
    message = mine.extract("val", run="/proc/self/run").refused()
    assert "--run: /proc/self/run cannot be written" in message


def test_a_disk_that_refuses_stops_the_job_and_the_same_command_resumes(mine, small, tmp_path, monkeypatch):
    assert mine.extract("val", "--shards", 1).code == 0
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "0.json").write_text('{"point": "profiles.written", "action": "error", "errno": "EROFS", "times": null}')
    monkeypatch.setenv(failpoints.VARIABLE, str(tmp_path / "plan"))
    ended = mine.extract("val")
    assert ended.code == 4 and "cannot be written" in ended.err and "the same command resumes" in ended.err and "Traceback" not in ended.err
    monkeypatch.delenv(failpoints.VARIABLE)
    assert mine.extract("val").code == 0 and table_of(mine.run) == table_of(small.run)


def test_a_second_job_on_the_same_data_set_is_refused(copied):
    import fcntl

    with open(copied.run / "datasets/.val.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another job is writing val" in copied.extract("val").refused()
