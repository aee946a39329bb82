"""Which folders are classes: whatever lies beside or above them, a label is right or the tree is refused, unpacked and in a tar alike."""

import os
import tarfile

import pytest
import shards

from pipeline import wnids
from pipeline.errors import BadRequest
from pipeline.sources import open_source

WNIDS = [f"n{i:08d}" for i in range(30, 60)]
IMAGENET = {f"{w}/ILSVRC2012_val_{i:08d}.JPEG": b"J%d" % i for i, w in enumerate(WNIDS)}
NUMBERS = {f"{i}/{chr(97 + i % 26)}{i}.jpeg": b"J%d" % i for i in range(30)}
JUNK = ["__MACOSX", "lost+found", "@eaDir", "labels", "train", "ILSVRC2012_devkit_t12", "zzz"]
FORMS = ["folder", "folder above", "tar", "tar.gz"]


def given(tmp_path, files, form):
    """`--source` for a tree, packed or not; `folder above` holds nothing else."""
    tree = shards.write_tree(tmp_path / "above/val", files)
    if form == "folder":
        return tree
    if form == "folder above":
        return tree.parent
    with tarfile.open(tmp_path / f"a.{form}", "w:gz" if form.endswith("gz") else "w") as tar:
        tar.add(tree, "val")
    return tmp_path / f"a.{form}"


def labels(spec):
    """Image -> label of what is read."""
    source, (name,) = open_source(str(spec))
    return {s.image: s.label for s in shards.samples(source, name)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("files", [IMAGENET, NUMBERS], ids=["WordNet IDs", "numbers"])
def test_what_is_no_class_moves_no_label(tmp_path, files, junk, form):
    """An empty folder of any name, in front of the others, behind or between."""
    spec = given(tmp_path, files | {f"{junk}/": b""}, form)
    assert labels(spec) == {b"J%d" % i: i for i in range(30)}
    source, names = open_source(str(spec))
    if form != "tar.gz":
        assert source.advice(names) == ([] if "devkit" in junk else [f"no class, since there are no images in it: {junk}"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("files, scheme", [(IMAGENET, "WordNet IDs"), (NUMBERS, "numbers")], ids=["WordNet IDs", "numbers"])
def test_images_in_what_cannot_be_a_class_are_refused_by_folder(tmp_path, files, scheme, form):
    with pytest.raises(BadRequest, match=f"(val|a.tar.*): the other class folders are named by {scheme}, and docs holds images too: move it elsewhere, or rename"):
        labels(given(tmp_path, files | {"docs/fig.png": b"J"}, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", [0, 7, 29])
def test_empty_class_keeps_the_ranks_of_the_others(tmp_path, empty, form):
    """A subset of ImageNet, with folders for the classes that it lacks."""
    files = {name: content for name, content in IMAGENET.items() if not name.startswith(WNIDS[empty])} | {f"{WNIDS[empty]}/": b""}
    assert labels(given(tmp_path, files, form)) == {b"J%d" % i: i for i in range(30) if i != empty}


@pytest.mark.parametrize(
    "files, give",
    [
        ({f"{split}/{c}/{split}{c}.jpg": b"J" for split in ("train", "val", "test") for c in ("cat", "dog")}, "val"),
        ({f"{split}/{c}/{split}{c}.jpg": b"J" for split in ("train", "test") for c in "01"}, "test"),
        ({f"{split}/{split}{i}.jpg": b"J" for split in ("training", "validation") for i in range(3)}, "validation"),
        ({f"val/{c}/{c}.jpg": b"J" for c in ("cat", "dog")} | {"docs/fig.png": b"J"}, "val"),
        ({f"val/{w}/x.jpg": b"J" for w in WNIDS} | {"docs/fig.png": b"J"}, "val"),
        ({f"{severity}/{w}/x{severity}.jpg": b"J" for severity in (1, 2, 3) for w in WNIDS}, "1"),
        ({f"fog/{severity}/{w}/x{severity}.jpg": b"J" for severity in (1, 2) for w in WNIDS} | {"frost/1/n00000001/x.jpg": b"J"}, "fog/1"),
        ({f"{blur}/{c}/x.jpg": b"J" for blur in ("blur", "fog") for c in range(10)}, "blur"),
        (
            {f"Data/CLS-LOC/train/{w}/{w}_1.JPEG": b"J" for w in WNIDS} | {f"Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG": b"J" for i in (1, 2)} | {"Annotations/x.png": b"J", "ImageSets/x.txt": b""},
            "Data/CLS-LOC/val",
        ),
    ],
    ids=["train, val, test", "train and test", "flat splits", "val beside docs", "wnids beside docs", "severities", "corruptions", "corruptions of numbers", "ILSVRC"],
)
@pytest.mark.parametrize("form", FORMS)
def test_folder_above_the_class_folders_is_refused_naming_the_one_to_give(tmp_path, files, give, form):
    """Otherwise splits or severities would be the classes."""
    with pytest.raises(BadRequest) as refusal:
        labels(given(tmp_path, files, form))
    way = "unpack it, and give the folder val/" if form.startswith("tar") else f"give {tmp_path}/above/val/"
    assert str(refusal.value).endswith(f"{way}{give}") and len(str(refusal.value).splitlines()) == 1


def test_class_that_is_called_like_a_split_is_a_class(tmp_path):
    """CIFAR-100 and PASCAL VOC have trains."""
    assert labels(shards.write_tree(tmp_path, {f"{c}/1.jpg": c.encode() for c in ("bus", "car", "train")})) == {b"bus": 0, b"car": 1, b"train": 2}


@pytest.mark.parametrize("form", FORMS)
def test_single_folder_of_images_has_no_labels(tmp_path, form):
    """Images in one folder, their labels elsewhere or nowhere: all of them would be class 0."""
    with pytest.raises(BadRequest, match="holds images in one folder alone, .*, and no labels follow from that: give the folder that holds all class folders"):
        labels(given(tmp_path, {f"images/{i}.jpg": b"J" for i in range(3)}, form))


def test_images_in_no_folder_are_seen_and_said(tmp_path):
    with pytest.raises(BadRequest, match=r"holds images \(0.jpg\), but no class folders that tell their labels: put the images of each class into a folder of its own"):
        open_source(str(shards.write_tree(tmp_path, {f"{i}.jpg": b"J" for i in range(3)})))


@pytest.mark.parametrize("form", FORMS)
def test_older_release_of_v2_is_known_whatever_lies_beside(tmp_path, form):
    files = {f"{w}/{i:02d}{w}.jpeg": b"J" for w in WNIDS for i in range(20)} | {"labels/": b"", "n00000001/": b"", f"{WNIDS[0]}/more.jpg": b"J"}
    with pytest.raises(BadRequest, match="looks like the older release of ImageNet-v2"):
        labels(given(tmp_path, files, form))


def test_subset_of_imagenet_is_said_to_be_one(tmp_path):
    """Its ranks are not the labels of a network of all classes, until the others have a folder too."""
    source, names = open_source(str(shards.write_tree(tmp_path, {f"{w}/x{w}.jpg": b"J" for w in wnids.IDS[::2]})))
    assert source.advice(names) == ["500 of ImageNet's 1,000 classes have a folder: a label is the rank among these; for a network of all 1,000, add an empty folder for every other class"]
    shards.write_tree(tmp_path, {f"{w}/": b"" for w in wnids.IDS})
    assert source.advice(names) == [] and [s.label for s in shards.samples(source, *names)] == list(range(0, 1000, 2))


# ---- archives that only begin as class folders do ------------------------------------------------------------------


@pytest.mark.parametrize(
    "members, message",
    [
        ([(f"val/{i:03d}.jpg", b"J") for i in range(40)] + [(f"val/{i:03d}.cls", b"%d" % i) for i in range(40)], r"holds labels as well \(val/000.cls\): pack it so that each image is followed by its label"),
        ([(f"{c}/{i:03d}.jpg", b"J") for c in "ab" for i in range(40)] + [("b/000.json", b"{}")], r"holds labels as well \(b/000.json\)"),
        ([(f"val/{i:03d}.{e}", b"5") for i in range(40) for e in ("jpg", "txt")], "holds images in one folder alone, val"),
        ([("cat/1.jpg", b"J"), ("dog/1.jpg", b"J"), ("fig.png", b"J")], r"holds an image that lies in no class folder \(fig.png\): pack it without"),
        ([("top/fig.png", b"J")] + [(f"top/{c}/x.jpg", b"J") for c in range(30)], "has its class folders further down, .* give the folder top"),
    ],
)
def test_archive_with_labels_elsewhere_is_refused(tmp_path, members, message):
    source, (name,) = open_source(str(shards.write_tar(tmp_path / "a.tar", members)))
    assert source.kind == "tar of class folders"
    with pytest.raises(BadRequest, match=f"a.tar .*{message}"):
        source.census(name)


def test_other_files_of_an_archive_are_passed_over(tmp_path):
    members = [*((f"v/{c}/x.jpg", b"%d" % c) for c in range(3)), ("v/README.md", b""), ("v/1/notes.txt", b""), ("v/1/.x.jpg", b""), ("v/1/.x.cls", b""), ("v/.git/x.jpg", b""), ("__MACOSX/v/1/._x.jpg", b"")]
    assert labels(shards.write_tar(tmp_path / "a.tar", members)) == {b"0": 0, b"1": 1, b"2": 2}


def test_hard_link_in_an_archive_is_set_aside(tmp_path):
    """tar packs the second name of a file as a link to the first."""
    shards.write_tree(tmp_path / "v", {"cat/1.jpg": b"c", "dog/1.jpg": b"d"})
    os.link(tmp_path / "v/cat/1.jpg", tmp_path / "v/dog/2.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "v", "v")
    source, (name,) = open_source(str(tmp_path / "a.tar"))
    got = {s.sample_id: (s.image, s.label, s.fault) for s in shards.samples(source, name)}
    assert got["cat/1"] == (b"c", 0, None) and got["dog/1"] == (b"d", 1, None) and "holds a link in its place: pack the images themselves" in got["dog/2"][2]
