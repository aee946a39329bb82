"""ImageNet's flat validation folder: labels through the devkit, whose order is not the networks'; where a devkit is found, and bad ones."""

import gzip
import hashlib
import random
import tarfile

import numpy as np
import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from pipeline.errors import BadRequest
from pipeline.sources import open_source

DEVKIT = "ILSVRC2012_devkit_t12"
FIELDS = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")


def write_devkit(folder, wnids, truth, inner=("n00001740", "n00002137"), seed=0):
    """The devkit's layout: leaves have the IDs 1..C in an order of their own, inner nodes those after. `truth`: a WordNet ID an image."""
    order = list(wnids)
    random.Random(seed).shuffle(order)
    rows = [(float(i), wnid, "a word", "a gloss", 0.0, np.zeros((0, 0)), 0.0, 1300.0) for i, wnid in enumerate(order, 1)]
    rows += [(float(i), wnid, "an inner word", "a gloss", 2.0, np.array([[1.0, 2.0]]), 3.0, 0.0) for i, wnid in enumerate(inner, len(order) + 1)]
    synsets = np.empty((len(rows), 1), [(name, object) for name in FIELDS])
    for at, row in enumerate(rows):
        synsets[at, 0] = row
    (folder / DEVKIT / "data").mkdir(parents=True)
    savemat(folder / DEVKIT / "data/meta.mat", {"synsets": synsets})
    ids = [order.index(wnid) + 1 for wnid in truth]
    shards.write_tree(folder / DEVKIT, {"data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in ids).encode(), "readme.txt": b"", "evaluation/": b""})
    return ids


def pack(folder, remove=True):
    with tarfile.open(folder / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        tar.add(folder / DEVKIT, DEVKIT)
    if remove:
        (folder / DEVKIT).rename(folder / "gone")


WNIDS = [f"n{i:08d}" for i in (1440764, 2119789, 1443537, 7697537, 12998815)]  # not sorted
TRUTH = [WNIDS[i % 5] for i in (3, 0, 1, 4, 2, 2, 0, 1, 3, 4)]
LABELS = [sorted(WNIDS).index(wnid) for wnid in TRUTH]


def write_val(folder, numbers=range(1, 11)):
    return shards.write_tree(folder, {f"ILSVRC2012_val_{n:08d}.JPEG": b"J%d" % n for n in numbers})


def test_label_is_the_rank_of_the_wordnet_id_not_the_devkits_number(tmp_path):
    ids = write_devkit(tmp_path, WNIDS, TRUTH)
    source, (name,) = open_source(str(write_val(tmp_path / "val")))
    got = shards.samples(source, name)
    assert source.kind == "flat ImageNet" and [s.label for s in got] == LABELS and [s.image for s in got] == [b"J%d" % n for n in range(1, 11)]
    assert [i - 1 for i in ids] != LABELS  # what reading the file as labels would have given
    assert [s.sample_id for s in got] == [f"ILSVRC2012_val_{n:08d}" for n in range(1, 11)]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize("where", ["beside", "in", "given"])
def test_devkit_lies_in_or_beside_the_images_or_is_named(tmp_path, where, packed):
    place = {"beside": tmp_path, "in": tmp_path / "val", "given": tmp_path / "elsewhere"}[where]
    val = write_val(tmp_path / "val")
    write_devkit(place, WNIDS, TRUTH)
    if packed:
        pack(place, remove=where != "in")
    devkit = place / (f"{DEVKIT}.tar.gz" if packed else DEVKIT)
    source, (name,) = open_source(str(val) + "/", str(devkit) if where == "given" else None)
    assert [s.label for s in shards.samples(source, name)] == LABELS


def test_folder_above_the_images_stands_for_them(tmp_path):
    """As class folders, all of them would be class 0."""
    write_devkit(tmp_path, WNIDS, TRUTH)
    write_val(tmp_path / "val")
    source, (name,) = open_source(str(tmp_path))
    assert source.root == str(tmp_path / "val") and [s.label for s in shards.samples(source, name)] == LABELS


@pytest.mark.parametrize("top", ["", "./", "val/"])
def test_tar_of_the_flat_images_is_refused_with_the_remedy(tmp_path, top):
    shards.write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(f"{top}ILSVRC2012_val_{n:08d}.JPEG", b"J") for n in range(1, 5)])
    with pytest.raises(BadRequest, match="ILSVRC2012_img_val.tar is a release that is read unpacked: tar xf it into a folder"):
        open_source(str(tmp_path / "ILSVRC2012_img_val.tar"))


def test_subset_keeps_the_labels_of_its_numbers(tmp_path):
    """A first try with a few images: position in the folder is not position in the ground truth."""
    write_devkit(tmp_path, WNIDS, TRUTH)
    source, (name,) = open_source(str(write_val(tmp_path / "val", [2, 5, 9])))
    assert [s.label for s in shards.samples(source, name)] == [LABELS[1], LABELS[4], LABELS[8]]


def test_image_that_the_devkit_does_not_know_is_set_aside_in_place(tmp_path):
    write_devkit(tmp_path, WNIDS, TRUTH)
    val = shards.write_tree(write_val(tmp_path / "val", [1, 50_001]), {"ILSVRC2012_val_00000000.JPEG": b"J", "extra.JPEG": b"J", "._ILSVRC2012_val_00000001.JPEG": b"mac", "notes.txt": b"", "two\nlines.png": b"J"})
    source, (name,) = open_source(str(val))
    got = shards.samples(source, name)
    assert [(s.sample_id, s.label, bool(s.fault)) for s in got] == [("ILSVRC2012_val_00000000", -1, True), ("ILSVRC2012_val_00000001", LABELS[0], False), ("ILSVRC2012_val_00050001", -1, True), ("extra", -1, True), ("two\nlines", -1, True)]
    assert "the devkit has no label for this name" in got[0].fault


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    write_devkit(folder, WNIDS, TRUTH * 60)
    source, (name,) = open_source(str(write_val(folder / "val", range(1, 601))))
    return source, name, shards.samples(source, name)


@given(bounds=st.tuples(st.integers(0, 600), st.integers(0, 600)))
def test_any_interval_is_a_slice_of_the_whole(long, bounds):
    shards.check_interval(*long, *sorted(bounds))


def test_the_same_image_in_class_folders_has_the_same_id_and_label(tmp_path):
    write_devkit(tmp_path, WNIDS, TRUTH)
    write_val(tmp_path / "flat")
    shards.write_tree(tmp_path / "folders", {f"{wnid}/ILSVRC2012_val_{n:08d}.JPEG": b"J%d" % n for n, wnid in enumerate(TRUTH, 1)})
    facts = []
    for spec in ("flat", "folders"):
        source, (name,) = open_source(str(tmp_path / spec))
        facts.append({s.sample_id: (s.label, s.image) for s in shards.samples(source, name)})
    assert facts[0] == facts[1] and len(facts[0]) == 10


def test_without_a_devkit_the_remedy_is_said(tmp_path):
    source, (name,) = open_source(str(write_val(tmp_path / "val")))
    with pytest.raises(BadRequest, match=f"val is ImageNet's flat folder, whose labels are in the devkit, and there is none: put {DEVKIT} .* beside it, or name it by --devkit"):
        source.census(name)
    source, (name,) = open_source(str(tmp_path / "val"), str(tmp_path / "nowhere\u202e"))
    with pytest.raises(BadRequest, match=r"--devkit: there is no .*nowhere\\u202e; name the folder"):
        source.census(name)


@pytest.mark.parametrize("spec", ["a.tar", "folders"])
def test_devkit_is_refused_where_it_has_no_meaning(tmp_path, spec):
    shards.write_shard(tmp_path / "a.tar", [0])
    shards.write_tree(tmp_path / "folders", {"cat/1.jpg": b"J"})
    with pytest.raises(BadRequest, match="^--devkit: it tells the labels of ImageNet's flat validation folder"):
        open_source(str(tmp_path / spec), "devkit")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("data/meta.mat", b"junk" * 100, "its meta.mat cannot be read .*: fetch"),
        ("data/meta.mat", b"", "its meta.mat cannot be read"),
        ("data/meta.mat", None, "holds no data/meta.mat .*: it is not .*: fetch"),
        ("data/ILSVRC2012_validation_ground_truth.txt", None, "holds no data/ILSVRC2012_validation_ground_truth.txt"),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"1\n6\n", "do not belong together .6 is no ILSVRC2012_ID of a leaf"),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"1\n0\n", "do not belong together"),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"1\ncat\x1b[2J\n", "is no list of whole numbers: fetch"),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"\xff\xfe", "is no list of whole numbers"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_bad_devkit_is_refused_by_file(tmp_path, file, content, message, packed):
    """6 is an inner node of the tree: a ground truth must name leaves."""
    write_devkit(tmp_path, WNIDS, TRUTH)
    path = tmp_path / DEVKIT / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if packed:
        pack(tmp_path)
    source, (name,) = open_source(str(write_val(tmp_path / "val")))
    with pytest.raises(BadRequest, match=f"{DEVKIT}.*{message}"):
        source.census(name)


@pytest.mark.parametrize("content", [b"", b"junk", gzip.compress(bytes(4000))[:20]], ids=["empty", "junk", "cut off"])
def test_damaged_devkit_archive_is_refused(tmp_path, content):
    (tmp_path / f"{DEVKIT}.tar.gz").write_bytes(content)
    source, (name,) = open_source(str(write_val(tmp_path / "val")))
    with pytest.raises(BadRequest, match=rf"{DEVKIT}.tar.gz (is no tar archive, or damaged|cannot be read .*): fetch"):
        source.census(name)


def test_devkit_that_is_no_archive_is_refused_in_one_line(tmp_path):
    shards.write_tree(tmp_path, {"build.py": b"print(1)\n" * 100})
    source, (name,) = open_source(str(write_val(tmp_path / "val")), str(tmp_path / "build.py"))
    with pytest.raises(BadRequest, match=f"build.py is no tar archive, or damaged: fetch {DEVKIT}.tar.gz again, and name that") as refusal:
        source.census(name)
    assert "\n" not in str(refusal.value)


def test_ground_truth_that_is_cut_off_is_refused_by_its_lines(tmp_path):
    """Otherwise a truncated download would set most of the images aside."""
    write_devkit(tmp_path, WNIDS, TRUTH[:4])
    source, (name,) = open_source(str(write_val(tmp_path / "val")))
    with pytest.raises(BadRequest, match=f"{DEVKIT}: ILSVRC2012_validation_ground_truth.txt has 4 lines, and the images go up to number 10 .the whole one has 50,000.: fetch"):
        source.census(name)


@pytest.mark.parametrize("flat, sorted_", [(1, 5), (5, 1)])
def test_folder_that_is_half_sorted_into_classes_is_refused(tmp_path, flat, sorted_):
    """A script that was interrupted, or one image left behind: either reading would lose images without a word."""
    write_devkit(tmp_path, WNIDS, TRUTH)
    write_val(tmp_path / "val", range(1, flat + 1))
    shards.write_tree(tmp_path / "val", {f"{wnid}/ILSVRC2012_val_{n:08d}.JPEG": b"J" for n, wnid in enumerate(WNIDS[:sorted_], flat + 1)})
    with pytest.raises(BadRequest, match=f"val holds images of ImageNet's flat folder .ILSVRC2012_val_00000001.JPEG, {flat} in all. beside class folders with images .*, {sorted_} in all.: move the ones or the others elsewhere"):
        open_source(str(tmp_path / "val"))


@pytest.mark.parametrize("change", ["image added", "image removed", "image renamed", "other content"])
def test_folder_that_changed_is_refused_and_another_devkit_is_another_version(tmp_path, change):
    write_devkit(tmp_path, WNIDS, TRUTH)
    write_devkit(tmp_path / "other", WNIDS, TRUTH[::-1])
    val = write_val(tmp_path / "val")
    source, (name,) = open_source(str(val))
    shard = source.census(name)
    assert open_source(str(val), str(tmp_path / "other" / DEVKIT))[0].census(name).version != shard.version == source.census(name).version
    if change == "image added":
        write_val(val, [0])
    elif change == "other content":
        (val / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"larger")
    elif change == "image removed":
        (val / "ILSVRC2012_val_00000003.JPEG").unlink()
    else:
        (val / "ILSVRC2012_val_00000003.JPEG").rename(val / "ILSVRC2012_val_00000003.png")
    with pytest.raises(BadRequest, match="val holds other files than when it was counted"):
        list(source.read(shard.marks, name, 0, 10))
    assert source.census(name).version != shard.version


def test_all_thousand_classes_with_real_photographs(tmp_path, data):
    """The sample's 1,000 photographs as validation images in an order of their own: every label is the sample's `.cls`."""
    wnids = [line.split("\t")[0] for line in (data / "imagenet-sample/classes.txt").read_text().splitlines()]
    real = {}
    for shard in range(8):
        with tarfile.open(data / f"imagenet-sample/sample-{shard:05d}.tar") as tar:
            real |= {m.name: tar.extractfile(m).read() for m in tar}
    images = [n for n in real if n.endswith(".jpg")]
    write_devkit(tmp_path, wnids, [n.removesuffix(".jpg") for n in images], inner=[f"n{i:08d}" for i in range(860)])
    shards.write_tree(tmp_path / "val", {f"ILSVRC2012_val_{n:08d}.JPEG": real[image] for n, image in enumerate(images, 1)})
    source, (name,) = open_source(str(tmp_path / "val"))
    got = shards.samples(source, name)
    assert len(got) == 1000 and [s.label for s in got] == [int(real[n.replace(".jpg", ".cls")]) for n in images]
    assert [hashlib.sha1(s.image).digest() for s in got] == [hashlib.sha1(real[n]).digest() for n in images]
