"""ImageNet-v2 and class folders in a tar: a folder's number is its label, and the archive, unpacked or not, gives the same samples."""

import gzip
import hashlib
import pickle
import tarfile

import pytest
import shards

from pipeline.errors import BadRequest
from pipeline.sources import open_source

TOP = "imagenetv2-matched-frequency-format-val"


def write_release(folder, classes, each=2, top=TOP, image=None):
    """The release's layout: class folders in string order, files named by a hash of their content. -> the tree's root."""
    for c in classes:
        for i in range(each):
            content = image(c, i) if image else shards.photo(c * 31 + i)
            shards.write_tree(folder / top, {f"{c}/{hashlib.sha1(content).hexdigest()}.jpeg": content})
    return folder / top


def pack(tree, path):
    """As `tar cf` or `tar czf` of the tree makes it, folders in string order and their own members too."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        tar.add(tree, tree.name, filter=lambda info: info)
    return path


def labels(spec):
    source, names = open_source(str(spec))
    return {s.sample_id: (s.label, hashlib.sha1(s.image).hexdigest()) for name in names for s in shards.samples(source, name)}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """All 1,000 folders, one image each: what string order would ruin."""
    folder = tmp_path_factory.mktemp("v2")
    tree = write_release(folder, range(1000), 1, image=lambda c, i: b"image %d" % c)
    return tree, pack(tree, folder / "imagenetv2-matched-frequency.tar.gz"), pack(tree, folder / "imagenetv2-matched-frequency.tar")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["folder", "tar.gz", "tar"])
def test_label_is_the_number_of_the_folder(release, which):
    source, (name,) = open_source(str(release[which]))
    got = shards.samples(source, name)
    assert len(got) == 1000 and all(s.image == b"image %d" % s.label and s.sample_id == f"{s.label}/{hashlib.sha1(s.image).hexdigest()}" for s in got)
    assert source.kind == ("class folders" if which == 0 else "tar of class folders")


def test_folder_archive_and_folder_of_the_archive_give_the_same(tmp_path):
    tree = write_release(tmp_path / "made", [0, 1, 10, 100, 999])
    (tmp_path / "one").mkdir()
    specs = [tree, tmp_path / "made", pack(tree, tmp_path / "a.tar"), pack(tree, tmp_path / "one/b.tar.gz"), tmp_path / "one"]
    got = [labels(spec) for spec in specs]
    assert all(g == got[0] for g in got) and sorted({label for label, _ in got[0].values()}) == [0, 1, 10, 100, 999] and len(got[0]) == 10


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("interval", [(0, 1), (0, 128), (127, 130), (990, 1000), (255, 700)])
def test_any_interval_is_a_slice(release, which, interval):
    source, (name,) = open_source(str(release[which]))
    assert shards.samples(pickle.loads(pickle.dumps(source)), name, *interval) == shards.samples(source, name)[slice(*interval)]


def test_named_folders_in_a_tar_are_ranked_as_unpacked(tmp_path):
    shards.write_tree(tmp_path / "val", {"n02/b.JPEG": b"2", "n01/ILSVRC2012_val_00000001.JPEG": b"1", "n10/a.JPEG": b"3", "n01/._x.JPEG": b"mac", "n01/notes.txt": b""})
    tree = labels(tmp_path / "val")
    assert labels(pack(tmp_path / "val", tmp_path / "val.tar")) == tree and {k: v[0] for k, v in tree.items()} == {"ILSVRC2012_val_00000001": 0, "n02/b": 1, "n10/a": 2}


def test_tar_with_labels_of_its_own_is_webdataset(tmp_path):
    for order in (("0/a.jpg", "0/a.cls"), ("0/a.cls", "0/a.jpg")):
        source, _ = open_source(str(shards.write_tar(tmp_path / "a.tar", [(name, b"7") for name in order])))
        assert source.kind == "webdataset"


@pytest.mark.parametrize("packed", [False, True])
def test_older_release_is_refused_with_the_remedy(tmp_path, packed):
    tree = write_release(tmp_path, [0, 1, 2], 20)
    for c in range(3):
        (tree / f"{c}").rename(tree / f"n0000000{c}")
    spec = pack(tree, tmp_path / "a.tar.gz") if packed else tree
    source, (name,) = open_source(str(spec))
    with pytest.raises(BadRequest, match="older release of ImageNet-v2 .*: fetch imagenetv2-matched-frequency.tar.gz, which has folders 0..999"):
        source.census(name)


def test_twenty_images_of_imagenet_itself_in_each_folder_are_fine(tmp_path):
    shards.write_tree(tmp_path, {f"n0000000{c}/ILSVRC2012_val_{c * 20 + i:08d}.JPEG": b"J" for c in range(2) for i in range(20)})
    source, (name,) = open_source(str(tmp_path))
    assert source.census(name).samples == 40


@pytest.mark.parametrize(
    "folders, expected, advised",
    [
        (["0", "1", "2", "10"], [0, 1, 2, 10], True),
        ([str(i) for i in range(12)], list(range(12)), False),
        (["00", "01", "02"], [0, 1, 2], False),
        (["911", "audi", "fiat"], [0, 1, 2], False),
        (["0", "2", "10/"], [0, 2], True),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_number_of_a_folder_is_its_label(tmp_path, folders, expected, advised, packed):
    """Gaps keep the number, and it is said; a number among words is a word."""
    tree = shards.write_tree(tmp_path / "tree", {f if f.endswith("/") else f"{f}/x.jpg": f.encode() for f in folders})
    source, (name,) = open_source(str(pack(tree, tmp_path / "a.tar") if packed else tree))
    assert sorted(s.label for s in shards.samples(source, name)) == expected
    assert bool(source.advice([name])) == advised


@pytest.mark.parametrize(
    "folders, message",
    [
        ([str(i) for i in range(1, 1001)], "are numbered 1 to 1000, and labels count from 0: rename them to 0..999, or, if class 0 is merely missing, add an empty folder 0"),
        (["1", "2", "10", "1000"], r"are numbers that cannot be labels \(1 to 1000, 4 of them\): rename them to 0..3, or pack"),
        (["1", "01", "2"], "are numbers, and 0?1, 0?1 are the same one: rename"),
        (["1001", "2002"], "are numbers that cannot be labels"),
        (["١", "٢"], "are numbered 1 to 2"),
        (["0", "1", "cat"], "the other class folders are named by numbers, and cat holds images too: move it elsewhere, or rename"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_numbers_that_cannot_be_labels_are_never_sorted_as_text(tmp_path, folders, message, packed):
    tree = shards.write_tree(tmp_path / "tree", {f"{f}/x.jpg": f.encode() for f in folders})
    source, (name,) = open_source(str(pack(tree, tmp_path / "a.tar") if packed else tree))
    with pytest.raises(BadRequest, match=f"(tree|a.tar).*{message}"):
        source.census(name)


def test_hostile_members_are_only_names(tmp_path):
    link = tarfile.TarInfo("v2/1/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [("v2/0/a.jpg", b"a"), (link, b""), ("v2/1/../../../../etc/b.jpg", b"b"), ("v2/1/two\nlines.jpg", b"c"), ("v2/0/a.jpg", b"again"), ("v2/0/a.jpg", b"again")]
    path = shards.write_tar(tmp_path / "a.tar", members)
    source, (name,) = open_source(str(path))
    got = shards.samples(source, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"] and [(s.sample_id, s.label, s.fault) for s in got] == [
        ("0/a", 0, None),
        ("1/link", -1, "the archive holds a link in its place: pack the images themselves (tar --dereference --hard-dereference)"),
        ("1/two\nlines", 1, None),
        ("0/a", -1, "two members of this name in a row"),
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_archive_that_is_cut_or_changed_is_refused(tmp_path, suffix):
    path = pack(write_release(tmp_path, [0, 1, 2]), tmp_path / f"a{suffix}")
    source, (name,) = open_source(str(path))
    shard, whole = source.census(name), path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3] if suffix == ".tar.gz" else whole[:4000])
    with pytest.raises(BadRequest, match="cannot be read to its end"):
        source.census(name)
    pack(write_release(tmp_path / "other", [0, 1]), path)
    with pytest.raises(BadRequest, match="when it was counted"):
        list(source.read(shard.marks, name, 0, shard.samples))
    assert source.census(name).version != shard.version


def test_photographs_in_the_layout_of_the_release(tmp_path, data):
    """Real ImageNet photographs, one a class: the archive's labels are those of the shard they come from."""
    with tarfile.open(data / "imagenet-sample/sample-00000.tar") as tar:
        real = {m.name: tar.extractfile(m).read() for m in tar}
    truth = {hashlib.sha1(image).hexdigest(): int(real[name.replace(".jpg", ".cls")]) for name, image in real.items() if name.endswith(".jpg")}
    for name, image in real.items():
        if name.endswith(".jpg"):
            digest = hashlib.sha1(image).hexdigest()
            shards.write_tree(tmp_path / TOP, {f"{truth[digest]}/{digest}.jpeg": image})
    got = labels(pack(tmp_path / TOP, tmp_path / "a.tar.gz"))
    assert len(got) == len(truth) > 100 and all(truth[digest] == label for label, digest in got.values())
    assert gzip.open(tmp_path / "a.tar.gz").read(1)
