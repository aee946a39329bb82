"""Class folders: labels by rank, IDs that a tar of the tree shares, and a tree that changed under a run."""

import errno
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st
from test_sources_flat import write_devkit

from pipeline.errors import BadRequest
from pipeline.sources import open_source

TREE = {
    "dog/2.jpg": b"d2",
    "dog/10.PNG": b"d10",
    "cat/1.jpg": b"c1",
    "cat/sub/1.jpeg": b"cs1",
    "cat/notes.txt": b"",
    "cat/.1.jpg": b"hidden",
    "emu/1.jpg": b"e1",
    "bird/": b"",
    ".cache/x.jpg": b"hidden",
    "readme.jpg": b"no class",
}


def test_label_is_the_rank_of_the_folder(tmp_path):
    """What is hidden, of another kind, or in no folder is not there; a folder without an image is no class, and that is said."""
    source, names = open_source(str(shards.write_tree(tmp_path, TREE | {"cat/.git/x.jpg": b"hidden", "cat/@eaDir/1.jpg/thumb.jpg": b"litter"})))
    assert (source.kind, names, source.classes()) == ("class folders", ["."], ["cat", "dog", "emu"])
    assert [(s.sample_id, s.image, s.label) for s in shards.samples(source, ".")] == [("cat/1", b"c1", 0), ("cat/sub/1", b"cs1", 0), ("dog/10", b"d10", 1), ("dog/2", b"d2", 1), ("emu/1", b"e1", 2)]
    assert source.advice(names) == ["no class, since there are no images in it: bird", "images that lie in no class folder are left out: readme.jpg (1 in all)"]


def test_ids_are_those_of_a_tar_of_the_tree(tmp_path):
    """So that an image is known by one ID however its data set was packed."""
    tree = shards.write_tree(tmp_path / "tree", {"cat/1.jpg": b"1", "cat/v1.5/a.b.jpg": b"2", "dog é/x\u202ey.jpg": b"3", os.fsdecode(b"dog/\xff.jpg"): b"4"})
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        for name in sorted(os.listdir(tree)):
            tar.add(tree / name, name)
    ids = [[s.sample_id for s in shards.samples(source, *names)] for source, names in (open_source(str(tree)), open_source(str(tmp_path / "tree.tar")))]
    assert sorted(ids[0]) == sorted(ids[1]) == ["cat/1", "cat/v1.5/a", "dog é/x\u202ey", "dog/\\xff"]


@pytest.mark.parametrize(
    "path, sample_id",
    [
        ("n01440764/ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val_00000293"),
        ("n01440764/ILSVRC2012_val_00000293_n01440764.JPEG", "ILSVRC2012_val_00000293"),
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("n01440764/n01440764_10026_n01440764.JPEG", "n01440764_10026"),
        ("0/ILSVRC2012_val_00000293_copy.JPEG", "0/ILSVRC2012_val_00000293_copy"),
        ("0/1.jpeg", "0/1"),
    ],
)
def test_names_of_imagenet_stand_alone(tmp_path, path, sample_id):
    """The flat folder, class folders and Kaggle's names give one ID for one image."""
    source, names = open_source(str(shards.write_tree(tmp_path, {path: shards.photo(), path[:1] + "99999999/x.jpg" if path[0] == "n" else "1/x.jpg": shards.photo()})))
    assert shards.samples(source, *names)[0].sample_id == sample_id


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), bounds=st.tuples(st.integers(0, 24), st.integers(0, 24)))
def test_class_folders_read_from_any_position(counts, bounds):
    with tempfile.TemporaryDirectory() as folder:
        shards.write_tree(Path(folder), {f"{c}/": b"" for c in range(len(counts))} | {f"{c}/{i}.jpg": b"%d %d" % (c, i) for c, n in enumerate(counts) for i in range(n)})
        source, (name,) = open_source(folder)
        everything = shards.samples(source, name)
        assert [s.label for s in everything] == [c for c, n in enumerate(counts) for _ in range(n)]
        start, stop = sorted(min(b, len(everything)) for b in bounds)
        if start < stop:
            assert shards.samples(source, name, start, stop) == everything[start:stop]


@pytest.mark.parametrize("change", ["file added", "file added after", "file removed", "file renamed", "class removed"])
def test_folder_that_changed_is_refused_on_read(tmp_path, change):
    """Positions would mean other images: no unit is made of them."""
    source, (name,) = open_source(str(shards.write_tree(tmp_path, TREE)))
    shard = source.census(name)
    if change == "file added":
        (tmp_path / "cat/0.jpg").write_bytes(b"new")
    elif change == "file added after":
        (tmp_path / "cat/z.jpg").write_bytes(b"new")
    elif change == "file removed":
        (tmp_path / "cat/1.jpg").unlink()
    elif change == "file renamed":
        (tmp_path / "cat/1.jpg").rename(tmp_path / "cat/z.jpg")
    else:
        shutil.rmtree(tmp_path / "cat")
    assert source.census(name).version != shard.version
    with pytest.raises(BadRequest, match="cat holds other files than when it was counted: put them back, or extract into another --dataset"):
        list(source.read(shard.marks_for(0, 3), name, 0, 3))


def test_class_added_later_moves_no_label_of_a_census(tmp_path):
    """Labels are those of the census, whatever rank a folder would have today; the version says that the tree changed."""
    source, (name,) = open_source(str(shards.write_tree(tmp_path, TREE)))
    shard = source.census(name)
    before = list(source.read(shard.marks, name, 0, 4))
    shards.write_tree(tmp_path, {"ant/1.jpg": b"new"})
    assert list(source.read(shard.marks, name, 0, 4)) == before and source.census(name).version != shard.version


# ---- what is no ordinary file --------------------------------------------------------------------------------------


def facts(spec):
    source, (name,) = open_source(str(spec))
    return {s.sample_id: (s.image, s.label, s.fault) for s in shards.samples(source, name)}


@pytest.mark.parametrize("kind", ["class folders", "flat"])
def test_pipe_that_is_called_like_an_image_is_none(tmp_path, kind):
    """Reading it would wait for ever."""
    if kind == "flat":
        write_devkit(tmp_path, ["n00000001"], ["n00000001"] * 2)
    folder = "val" if kind == "flat" else "val/n00000001"
    shards.write_tree(tmp_path, {f"{folder}/ILSVRC2012_val_00000001.JPEG": b"J", "val/n00000002/": b""})
    os.mkfifo(tmp_path / folder / "ILSVRC2012_val_00000002.JPEG")
    assert facts(tmp_path / "val") == {"ILSVRC2012_val_00000001": (b"J", 0, None)}


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.npz", "train"])
def test_pipe_that_is_called_like_an_archive_is_none(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for spec in (tmp_path, tmp_path / name):
        with pytest.raises(BadRequest, match="^--source: .* is of no kind that is read here|holds nothing that is read here"):
            open_source(str(spec))


def test_what_cannot_be_read_is_set_aside_alone(tmp_path, monkeypatch):
    """A link whose target is gone, an image of absurd size: the reason is said, the others are read."""
    monkeypatch.setattr("pipeline.sources.files.MOST_BYTES", 1 << 20)
    shards.write_tree(tmp_path, {"cat/1.jpg": b"c", "dog/1.jpg": b"d", "dog/big.jpg": bytes((1 << 20) + 1)})
    (tmp_path / "cat/2.jpg").symlink_to("/nowhere/2.jpg")
    (tmp_path / "cat/3.jpg").symlink_to("3.jpg")
    assert facts(tmp_path) == {
        "cat/1": (b"c", 0, None), "cat/2": (b"", -1, "a link that leads nowhere"), "cat/3": (b"", -1, "a link that leads nowhere"),
        "dog/1": (b"d", 1, None), "dog/big": (b"", -1, "larger than 1 MiB"),
    }  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_image_without_permission_is_set_aside_alone(tmp_path):
    shards.write_tree(tmp_path, {"cat/1.jpg": b"c", "dog/1.jpg": b"d"})
    (tmp_path / "cat/1.jpg").chmod(0)
    assert facts(tmp_path) == {"cat/1": (b"", -1, "it cannot be read (Permission denied)"), "dog/1": (b"d", 1, None)}


def test_disk_that_fails_is_no_fault_of_the_images(tmp_path, monkeypatch):
    """A network disk that is gone for a while must not set all samples aside."""
    source, (name,) = open_source(str(shards.write_tree(tmp_path, TREE)))
    shard = source.census(name)
    whole = open

    def fails(path, *args):
        if str(path).endswith(".jpg"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole(path, *args)

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(OSError, match="Stale"):
        list(source.read(shard.marks, name, 0, 3))


def test_links_to_folders_are_followed_and_never_in_circles(tmp_path):
    shards.write_tree(tmp_path, {"tree/cat/1.jpg": b"c", "tree/dog/1.jpg": b"d", "away/1.jpg": b"e", "more/2.jpg": b"f"})
    for link, target in (("emu", "../away"), ("cat/more", "../../more"), ("cat/up", ".."), ("self", "."), ("cat/loop", "loop"), ("dog/above", "../..")):
        (tmp_path / "tree" / link).symlink_to(target)
    assert facts(tmp_path / "tree") == {"cat/1": (b"c", 0, None), "cat/more/2": (b"f", 0, None), "dog/1": (b"d", 1, None), "emu/1": (b"e", 2, None)}


def test_other_content_under_the_same_name_is_noticed(tmp_path):
    """By its size; a copy of the tree elsewhere, with other times, is the same."""
    source, (name,) = open_source(str(shards.write_tree(tmp_path / "tree", TREE)))
    shard = source.census(name)
    shutil.copytree(tmp_path / "tree", tmp_path / "copy", copy_function=shutil.copyfile)
    assert open_source(str(tmp_path / "copy"))[0].census(name).version == shard.version
    (tmp_path / "tree/dog/2.jpg").write_bytes(b"larger")
    assert source.census(name).version != shard.version
    assert len(list(source.read(shard.marks_for(0, 2), name, 0, 2))) == 2
    with pytest.raises(BadRequest, match="dog holds other files than when it was counted"):
        list(source.read(shard.marks_for(2, 3), name, 2, 3))
