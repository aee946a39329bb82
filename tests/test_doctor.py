"""The doctor: each mistake that people make with labels and pixels is named, and what is right passes; on colours, and on real photographs."""

import io
from dataclasses import replace

import numpy as np
import pytest
import shards
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm
from test_sources_flat import write_devkit

from pipeline import doctor, wnids
from pipeline.samples import Sample
from pipeline.sources import open_source, spread

CLASSES = 1000
LABELS = list(range(3, CLASSES, 10))  # a hundred of them
MODEL = "tiny:colours"


def colour(label, reverse=False):
    """A PNG of the class's colour."""
    pixels = np.full((6, 5, 3), tiny.palette(label), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels[..., ::-1] if reverse else pixels).save(out, "PNG")
    return out.getvalue()


def as_text(label):
    """The label of a numbered folder where folders are sorted as text."""
    return sorted(map(str, range(CLASSES))).index(str(label))


def write(folder, given=lambda label: label, name=lambda label: f"{label:05d}", labels=LABELS, image=colour):
    """Two shards of colours: what is called class `label` gets the label `given(label)`."""
    for i in range(2):
        part = labels[i::2]
        shards.write_tar(folder / f"val-{i}.tar", [m for label in part for m in ((f"{name(label)}.png", image(label)), (f"{name(label)}.cls", str(given(label)).encode()))])
    return folder


def check(source, *more, model=MODEL):
    return tiny.call("check", "--source", source, "--model", model, "--format", "json", *more)


def extract(source, run, *more, model=MODEL):
    return tiny.call("extract", "--run", run, "--dataset", "val", "--source", source, "--model", model, *more)


def test_the_right_way_passes_and_tells_what_was_seen(tmp_path):
    ended = check(write(tmp_path, name=lambda label: f"{wnids.IDS[label]}_7_x"))
    report = ended.json
    assert ended.code == 0, ended.err
    assert (report["kind"], report["shards"], report["samples"], report["samples_exact"]) == ("webdataset", 2, 100, True)
    assert report["label_range"] == [3, 993] and report["labels_seen"] == 100 and report["classes"] == CLASSES
    assert report["seen"] == 100 and report["top1"] == 1.0 and report["top1_low"] == pytest.approx(1 / (1 + norm.ppf(0.975) ** 2 / 100)) and report["promised"] is None
    assert report["class_order"] == "follows the WordNet IDs" and report["filters"] == 1000 and report["mistake"] is None
    assert report["images_per_s"] > 0 and report["hours"] == pytest.approx(100 / report["images_per_s"] / 3600)
    assert extract(tmp_path, tmp_path / "run").code == 0
    assert 0.5 < report["bytes"] / sum(f.stat().st_size for f in (tmp_path / "run/profiles/val").iterdir()) < 2


MISTAKES = {
    "off by one, too high": (lambda label: label + 1, "off by one", "write labels that count from 0"),
    "off by one, too low": (lambda label: label - 1, "off by one", "as the network counts them"),
    "string-sorted": (as_text, "string-sorted folders", "the number of a folder is the label"),
}


@pytest.mark.parametrize("given_label, mistake, remedy", MISTAKES.values(), ids=list(MISTAKES))
def test_wrong_labels_are_named_and_refused_before_anything_is_written(tmp_path, given_label, mistake, remedy):
    source = write(tmp_path / "source", given_label)
    ended = check(source)
    assert ended.code == 2 and ended.json["mistake"] == mistake and ended.json["top1_undone"] == 1.0 and ended.json["top1"] < 0.05
    assert remedy in ended.err and "1.000" in ended.err and len([line for line in ended.err.splitlines() if line.startswith("faultline")]) == 1
    refused = extract(source, tmp_path / "run").refused()
    assert remedy in refused and "--force" in refused and not (tmp_path / "run").exists()


def test_force_goes_on_and_a_run_that_is_there_is_not_checked_again(tmp_path):
    source = write(tmp_path / "source", as_text)
    forced = extract(source, tmp_path / "run", "--force")
    assert forced.code == 0 and "sorted as text" in forced.err and len(list((tmp_path / "run/profiles/val").iterdir())) == 2
    again = extract(source, tmp_path / "run")
    assert again.code == 0 and "nothing to do" in again.err and "sorted as text" not in again.err


def test_a_second_data_set_of_a_run_is_checked_too(tmp_path):
    assert extract(write(tmp_path / "right"), tmp_path / "run").code == 0
    source = write(tmp_path / "wrong", as_text)
    refused = tiny.call("extract", "--run", tmp_path / "run", "--dataset", "v2", "--source", source, "--model", MODEL).refused()
    assert "sorted as text" in refused and not (tmp_path / "run/datasets/v2.json").exists()


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("where", ["beside", "named"])
def test_labels_in_the_devkits_order_are_named_where_there_is_a_devkit(tmp_path, less, where):
    (tmp_path / "kit").mkdir()
    at = tmp_path if where == "beside" else tmp_path / "kit"
    ids = dict(zip(LABELS, write_devkit(at, wnids.IDS, [wnids.IDS[label] for label in LABELS])))
    source = write(tmp_path / "source", lambda label: ids[label] - less)
    ended = check(source, *(["--devkit", at / "ILSVRC2012_devkit_t12"] if where == "named" else []))
    assert ended.code == 2 and ended.json["mistake"] == "devkit order" and ended.json["top1_undone"] == 1.0 and "meta.mat" in ended.err
    if where == "beside":
        assert "the devkit's ILSVRC2012_IDs" in extract(source, tmp_path / "run").refused()


def test_a_few_class_folders_of_imagenet_are_not_classes_0_to_n(tmp_path):
    tree = {f"{wnids.IDS[label]}/{i}.png": colour(label) for label in (0, 217, 482, 491, 497, 566, 569, 571, 574, 701) for i in range(6)}
    ended = check(shards.write_tree(tmp_path / "imagenette", tree))
    assert ended.code == 2 and ended.json["mistake"] == "WordNet IDs" and ended.json["top1_undone"] == 1.0 and ended.json["class_order"].startswith("differs")
    for wnid in wnids.IDS:
        (tmp_path / "imagenette" / wnid).mkdir(exist_ok=True)  # the remedy that the message gives
    assert "add the missing ones" in ended.err and check(tmp_path / "imagenette").json["top1"] == 1.0


def test_colours_the_wrong_way_round(tmp_path):
    ended = check(write(tmp_path, image=lambda label: colour(label, reverse=True)))
    assert "trying: red and blue are the wrong way round" in ended.err  # a user sees what it is at
    assert ended.code == 2 and ended.json["mistake"] == "RGB/BGR" and ended.json["top1_undone"] == 1.0 and "RGB" in ended.err


def test_missing_normalisation_and_the_option_that_repairs_it(tmp_path):
    source = write(tmp_path / "source")
    ended = check(source, "--preprocess", "mean=0/0/0,std=1/1/1")
    assert ended.code == 2 and ended.json["mistake"] == "missing normalisation" and ended.json["top1_undone"] == 1.0
    option = next(word for word in ended.err.split() if word.startswith("mean="))
    assert check(source, "--preprocess", option).json["top1"] == 1.0


def test_a_network_that_normalises_by_itself(tmp_path):
    ended = check(write(tmp_path), model="tiny:raw_colours")
    assert ended.code == 2 and ended.json["mistake"] == "normalised twice" and "--preprocess mean=0/0/0,std=1/1/1" in ended.err
    assert check(tmp_path, "--preprocess", "mean=0/0/0,std=1/1/1", model="tiny:raw_colours").json["top1"] == 1.0


def test_labels_that_nothing_explains_are_no_better_than_chance(tmp_path):
    """The doctor refuses; an extraction goes on aloud, since nobody promises anything for these weights and the network may be untrained on purpose."""
    order = np.random.default_rng(0).permutation(CLASSES)
    source = write(tmp_path / "source", lambda label: int(order[label]))
    ended = check(source)
    assert ended.code == 2 and ended.json["mistake"] is None and "no more often than chance" in ended.err and "not those of its training" in ended.err
    assert "labels in the devkit's order were not tried, for want of the devkit (faultline check --devkit tries them)" in ended.err
    went_on = extract(source, tmp_path / "run")
    assert went_on.code == 0 and "check: the network is right on 0 of 100 images" in went_on.err


def looked(labels, given, noise=0.0):
    """A look at colours of classes `labels` that the source calls `given`; noise moves each towards another class's colour."""
    pixels = [np.full((6, 5, 3), tiny.palette(label), np.uint8) for label in labels]
    return doctor.Look([Sample(f"x{i}", g, p) for i, (g, p) in enumerate(zip(given, pixels))], [""] * len(pixels), [])


def diagnosed(look, promised=None, network=None):
    return doctor.examine((network or tiny.colours()).eval(), tiny.Palette.preprocessing, look, CLASSES, promised)


@pytest.mark.parametrize("count", [2, 60], ids=["few", "enough"])
@pytest.mark.parametrize("model", ["tiny:zeros", "tiny:constant"])
def test_a_network_that_says_nothing_is_refused_before_anything_is_written(tmp_path, model, count):
    """Whatever the labels: where all are the class that it always gives, it is right on every image."""
    shards.write_shard(tmp_path / "source/a.tar", [4 if model == "tiny:constant" else 0] * count)
    text = f"the network gives the very same answer to all {count} images"
    assert text in extract(tmp_path / "source", tmp_path / "run", model=model).refused() and not (tmp_path / "run").exists()
    ended = check(tmp_path / "source", model=model)
    assert ended.code == 2 and f"--weights: {text}" in ended.err
    assert extract(tmp_path / "source", tmp_path / "run", "--force", model=model).code == 0
    ended = tiny.call("index", "--run", tmp_path / "run", "--subset", "all")
    assert ended.code == 0 and "no filter tells the samples of val apart, so that every similarity is 0: are these the network's weights" in ended.err


def test_one_image_alone_or_the_same_again_does_not_accuse_a_network(tmp_path):
    """Nor does one that answers differently without its filters: its profiles do, when they are indexed."""
    shards.write_shard(tmp_path / "one/a.tar", [0])
    shards.write_tar(tmp_path / "same/a.tar", [(f"{i}.{end}", content) for i in range(30) for end, content in (("jpg", shards.photo(1)), ("cls", b"%d" % (i % 5)))])
    for name, model in (("one", "tiny:zeros"), ("same", "tiny:zeros"), ("same", "tiny:net"), ("same", "tiny:bypass")):
        assert "the very same answer" not in extract(tmp_path / name, tmp_path / f"run {name} {model}", model=model).err
    shards.write_shard(tmp_path / "other/a.tar", [i % 5 for i in range(40)])
    assert extract(tmp_path / "other", tmp_path / "run", model="tiny:bypass").code == 0
    assert "no filter tells the samples of val apart" in tiny.call("index", "--run", tmp_path / "run").err


def test_errors_that_lean_to_one_class_are_no_mistake_of_the_source():
    """The images of one class are all taken for its neighbour, or those of two: the labels are right, the network is not."""
    one = diagnosed(looked([8] * 60, [7] * 60))
    two = diagnosed(looked([8, 12] * 40, [7, 11] * 40))
    assert one.mistake is None and two.mistake is None


def test_what_helps_a_little_explains_nothing():
    """Undone, a fifth would be right: far from what the network is sure of."""
    rng = np.random.default_rng(0)
    given = [label - 1 if i % 5 == 0 else int(rng.integers(CLASSES)) for i, label in enumerate(LABELS)]
    found = diagnosed(looked(LABELS, given))
    assert found.mistake is None and found.doubts and found.puzzling


def test_a_shape_that_the_network_fails_on_is_set_aside_and_not_an_end(tmp_path):
    source = write(tmp_path, image=lambda label: colour(label) if label % 20 == 3 else encoded_wide(label))
    ended = check(source, model="tiny:narrow")
    assert ended.code == 0 and ended.json["top1"] == 1.0 and any("50 of 100 samples would be set aside, 50 of them because: the network fails on it: too wide" in w for w in ended.json["warnings"])


class Choosy(tiny.Palette):
    """Raises at one colour, and wherever a pixel lies outside what normalised pixels can be."""

    def forward(self, x):
        if (x.mean((2, 3)) - torch.tensor(colour_seen(3))).abs().sum(1).min() < 1e-3 or x.abs().max() > 3:
            raise ValueError("I do not like it")
        return super().forward(x)


def colour_seen(label):
    mean, std = np.array(tiny.Palette.preprocessing.mean), np.array(tiny.Palette.preprocessing.std)
    return (np.uint8(tiny.palette(label)) / 255 - mean) / std


def test_one_image_that_the_network_fails_on_is_set_aside_and_so_is_a_trial_of_other_pixels():
    """Whatever shares its batch is looked at all the same; pixels that were changed to try a mistake are no ground to end."""
    found = diagnosed(looked(LABELS, LABELS), network=Choosy())
    fails = LABELS.count(3) if isinstance(LABELS, list) else int((np.array(LABELS) == 3).sum())
    assert fails and found.seen == found.correct == len(LABELS) - fails and not found.faults
    assert any(f"{fails} of {len(LABELS)} samples would be set aside" in w and "the network fails on it: I do not like it" in w for w in found.warnings)


def encoded_wide(label):
    return shards.encoded(Image.new("RGB", (9, 6), tuple(map(int, tiny.palette(label)))), "PNG")


def test_the_wordnet_id_in_a_parquet_path_is_looked_at(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": colour(label), "path": f"ILSVRC2012_val_{label:08d}_{wnids.IDS[label]}.JPEG"} for label in LABELS]
    order = np.random.default_rng(0).permutation(CLASSES)
    pq.write_table(pa.table({"image": images, "label": pa.array([int(order[label]) for label in LABELS])}), tmp_path / "val.parquet")
    ended = check(tmp_path / "val.parquet")
    assert ended.code == 2 and ended.json["mistake"] == "WordNet IDs" and ended.json["top1_undone"] == 1.0


def test_where_few_samples_puzzle_extract_looks_at_more(tmp_path):
    order = np.random.default_rng(0).permutation(CLASSES)
    source = write(tmp_path / "source", lambda label: int(order[label]))
    assert "looking at more" in extract(source, tmp_path / "run").err
    assert "looking at more" not in extract(write(tmp_path / "right"), tmp_path / "other").err


def test_labels_of_another_label_set_and_images_that_are_none(tmp_path):
    many = check(write(tmp_path / "many", lambda label: label + 5000))
    assert many.code == 2 and "outside the network's classes 0..999" in many.err
    huge = check(write(tmp_path / "huge", lambda label: 10**25 if label == 3 else label))
    assert huge.code == 0 and any("outside the network's classes" in line for line in huge.json["warnings"])
    few = check(write(tmp_path / "few", image=lambda label: colour(label) if label % 20 == 3 else b""))
    assert few.code == 0 and few.json["top1"] == 1.0 and "50 of 100 samples would be set aside, 50 of them because: the image is empty (0 bytes)" in few.json["warnings"]
    assert "can be used (the image is empty (0 bytes))" in check(write(tmp_path / "none", image=lambda label: b"")).refused()


def test_a_network_of_one_convolution_is_told_what_its_profile_is(tmp_path):
    source = write(tmp_path / "source")
    assert any("its profile is that layer alone" in line for line in check(source).json["warnings"])
    assert "check: Palette has one 4-D weight, conv" in extract(source, tmp_path / "run").err


def test_an_id_that_stands_twice_is_told(tmp_path):
    shards.write_shard(tmp_path / "a.tar", [1, 2, 3])
    shards.write_shard(tmp_path / "b.tar", [4, 5], first=2)
    message = check(tmp_path).refused()
    assert "'00002' stands twice" in message and "a.tar" in message and "b.tar" in message


def test_names_of_the_training_set_are_noticed(tmp_path):
    ended = check(write(tmp_path, name=lambda label: f"{wnids.IDS[label]}_{label}"))
    assert ended.code == 0 and any("training set" in line for line in ended.json["warnings"])


def test_a_long_count_is_estimated_and_called_so(tmp_path, monkeypatch):
    for i in range(12):
        write(tmp_path / f"{i}", labels=LABELS[:40], name=lambda label, i=i: f"{i}_{label}")
    monkeypatch.setattr("jobs.check.COUNTING", -1.0)
    report = check(str(tmp_path / "*/*.tar")).json
    assert report["shards"] == 24 and not report["samples_exact"] and 400 < report["samples"] < 600


@given(st.integers(0, 3000), st.integers(1, 500), st.integers(1, 20))
def test_picks_are_spread_over_all_of_a_shard(samples, wanted, together):
    chosen = spread(samples, wanted, together)
    assert chosen == sorted(set(chosen)) and all(0 <= at < samples for at in chosen)
    assert len(chosen) <= max(wanted + together, 1) or wanted >= samples
    if wanted >= 4 * together and samples > wanted:
        assert len(chosen) >= wanted / 2 and chosen[0] <= samples / 2 and max(np.diff(chosen)) <= 3 * samples * together / wanted + together


@pytest.mark.parametrize("together", [1, 4, 16])
def test_pick_gives_what_reading_gives(tmp_path, together):
    shards.write_shard(tmp_path / "a.tar", list(range(300)))
    source, (name,) = open_source(str(tmp_path / "a.tar"))
    shard = source.census(name)
    object.__setattr__(source, "together", together)
    picked = list(source.pick(shard, 40))
    everything = list(source.read(shard.marks, name, 0, 300))
    assert picked == [everything[at] for at in spread(300, 40, together)] and len(picked) >= 32


def test_training_images_are_noticed():
    """A network that is right on everything, and sure of it."""
    samples = [Sample(str(label), label, np.full((6, 5, 3), tiny.palette(label), np.uint8)) for label in LABELS * 3]
    found = doctor.examine(tiny.colours().eval(), tiny.Palette.preprocessing, doctor.Look(samples, [""] * 300, []), CLASSES, 0.76)
    assert any("trained on" in line for line in found.warnings) and not found.faults
    torch.manual_seed(0)
    noisy = [replace(s, label=s.label if i % 4 else 0) for i, s in enumerate(samples)]
    assert not doctor.examine(tiny.colours().eval(), tiny.Palette.preprocessing, doctor.Look(noisy, [""] * 300, []), CLASSES, 0.76).warnings


def test_the_list_of_wordnet_ids_is_imagenets(data):
    ours = [line.split()[0] for line in (data / "imagenet-sample/classes.txt").read_text().splitlines()]
    assert list(wnids.IDS) == ours
