"""Folders and releases whose names, links and layout are not those of a data set."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import shards
from bad_input_archives import TWICE, Refused, special
from bad_input_sources import flat, tree
from bad_input_tables import Aside


def folders(**more: bytes | None) -> Callable[[Path], Path]:
    """The tree of five classes, with more files below it; None takes one away."""
    return lambda folder: shards.write_tree(folder / "source", {name: content for name, content in (tree(folder) | more).items() if content is not None})


def renamed(names: dict[str, str]) -> Callable[[Path], Path]:
    """The tree with its class folders called otherwise."""
    return lambda folder: shards.write_tree(folder / "source", {f"{names.get(path[0], path[0])}{path[1:]}": content for path, content in tree(folder).items()})


def linked(link: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        source = folders()(folder)
        (source / link).parent.mkdir(exist_ok=True)
        (source / link).symlink_to(target)
        return source

    return make


PNG = shards.encoded(shards.picture(77), "PNG")
ALL = 20  # images of the tree
FOLDERS = [
    Refused("folders: nothing", lambda folder: shards.write_tree(folder / "source", {"a/": b""}), "source holds nothing that is read here; what is: "),
    Refused("folders: text alone", lambda folder: shards.write_tree(folder / "source", {"a/x.txt": b"x", "b/y.csv": b"y"}), "source holds nothing that is read here; what is: "),
    Refused("folders: images without a class", lambda folder: shards.write_tree(folder / "source", {"a.png": PNG, "b.png": PNG}), "no class folders that tell their labels: put the images of each class"),
    Refused("folders: one class alone", lambda folder: shards.write_tree(folder / "source", {"cat/a.png": PNG}), "images in one folder alone, .*cat.*: give the folder"),
    Refused("folders: counted from 1", renamed({str(i): str(i + 1) for i in range(5)}), "numbered 1 to 5, and labels count from 0: rename"),
    Refused("folders: one number twice", renamed({"3": "02"}), "are the same one: rename"),
    Refused("folders: numbers that are no labels", renamed({"4": "123456"}), "numbers that cannot be labels .*: rename"),
    Refused("folders: a word among numbers", renamed({"4": "four"}), "named by numbers, and four holds images too: move"),
    Refused("folders: splits", lambda folder: shards.write_tree(folder / "source", {f"{split}/{name}": content for split in ("train", "val") for name, content in tree(folder).items()}), "holds several splits .*: give .*val"),
    Refused("folders: two files of one ID", folders(**{"1/0_1.jpg": shards.photo(1)}), TWICE),
    Refused("folders: an archive beside images", folders(**{"a.tar": b"x"}), "holds images .* and tar shards .*: name the one by"),
    Refused("folders: not there", lambda folder: folder / "nowhere", "there is no .*nowhere; give"),
    Refused("folders: a pattern of nothing", lambda folder: folders()(folder) / "*.tar", r"there is no .*\*\.tar; give"),
    Refused("folders: an image", lambda folder: folders()(folder) / "1/0_1.png", "0_1.png is of no kind that is read here; what is: "),
    Refused("folders: a NUL in its name", lambda folder: folder / "a\0b", r"there is no .*a\\x00b; give"),
    Refused("folders: a name without end", lambda folder: folder / ("long" * 2000), "there is no .*longlong.*; give"),
    Refused("folders: half sorted", lambda folder: shards.write_tree(flat(folder).spec, {"n01440764/x.JPEG": PNG}), "beside class folders with images .*: move"),
    Refused("folders: flat without a devkit", lambda folder: shards.write_tree(folder / "val", {"ILSVRC2012_val_00000001.JPEG": PNG}), "there is none: put ILSVRC2012_devkit_t12"),
    Aside("folders: names of files", folders(**{"1/new\nline.png": b"?", "1/\x1b[31mred.png": b"?", "1/gpj\u202e.png": b"?", "1/caf\udce9.png": b"?", "1/" + "n" * 250 + ".png": b"?"}),
          dict.fromkeys(["1/new\nline", "1/\x1b[31mred", "1/gpj\u202e", "1/caf\\xe9", "1/" + "n" * 250], "not an image"), ALL),
    Aside("folders: names of classes", renamed({"0": "a\nb", "1": "b\x1b[31m", "2": "c\u202e", "3": "d\udce9", "4": "e'\""}), {}, ALL),
    Aside("folders: hidden files and litter", folders(**{"1/._0_1.png": b"?", "1/.DS_Store": b"?", "__MACOSX/1/._x.png": b"?", ".git/x.png": b"?", "1/Thumbs.db": b"?", "readme.txt": b"?"}), {}, ALL),
    Aside("folders: a link to the folder above", linked("1/again", ".."), {}, ALL),
    Aside("folders: a link to itself", linked("1/loop", "loop"), {}, ALL),
    Aside("folders: a link to a file elsewhere", linked("1/passwd.png", "/etc/passwd"), {"1/passwd": "not an image"}, ALL),
    Aside("folders: deeper", folders(**{"1/deeper/still/x.png": PNG}), {}, ALL + 1),
    Aside("flat: numbers that the devkit does not know", lambda folder: shards.write_tree(flat(folder).spec, {"ILSVRC2012_val_99999999.JPEG": PNG, "ILSVRC2012_val_00000000.JPEG": PNG, "other.JPEG": PNG}),
          dict.fromkeys(["ILSVRC2012_val_99999999", "ILSVRC2012_val_00000000", "other"], "the devkit has no label for this name"), 10),
]  # fmt: skip


# ---- a release of class folders in a tar -----------------------------------------------------------------------------


def release(*more: tuple[str | tarfile.TarInfo, bytes]) -> Callable[[Path], Path]:
    return lambda folder: shards.write_tar(folder / "v2.tar", [*((f"v2/{name}", content) for name, content in sorted(tree(folder).items())), *more])


RELEASES = [
    Refused("release: an image in no folder", release(("stray.png", PNG)), "v2.tar holds an image that lies in no class folder .stray.png.: pack it without"),
    Refused("release: labels beside images", release(("v2/1/0_1.cls", b"1")), TWICE),
    Refused("release: one file twice", release(("v2/1/0_1.png", PNG)), TWICE),
    Refused("release: flat images", lambda folder: shards.write_tar(folder / "v2.tar", [("ILSVRC2012_val_00000001.JPEG", PNG)]), "v2.tar is a release that is read unpacked: tar xf it"),
    Aside("release: links in the place of images", release((special("v2/1/soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (special("v2/2/hard.png", tarfile.LNKTYPE, "v2/1/0_1.png"), b"")),
          {"1/soft": "the archive holds a link in its place: pack the images themselves", "2/hard": "the archive holds a link in its place"}, ALL),
    Aside("release: devices and pipes", release((special("v2/1/d.png", tarfile.CHRTYPE), b""), (special("v2/1/p.png", tarfile.FIFOTYPE), b"")), {}, ALL),
    Aside("release: a path that climbs out", release(("../../1/out.png", PNG)), {}, ALL),
    Aside("release: strange names", release(("v2/1/a\nb.png", b"?"), ("v2/1/\u202egpj.png", b"?"), ("v2/1/\x1b[2J.png", b"?"), ("v2/1/" + "l" * 3000 + ".png", b"?")),
          dict.fromkeys(["1/a\nb", "1/\u202egpj", "1/\x1b[2J", "1/" + "l" * 3000], "not an image"), ALL),
]  # fmt: skip
