"""Bad sources: every kind of source under every damage to a file, then what archives, labels and tables can hold that they should not."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shards

COUNT = 10  # samples of a file


@dataclass(frozen=True)
class Good:
    """A source as it should be: what --source names, and the file of it that will be damaged."""

    spec: Path
    victim: Path


def labels(first: int = 0) -> list[int]:
    return [(first + i) % 5 for i in range(COUNT)]


def tars(folder: Path, suffix: str = ".tar") -> Good:
    for at, name in enumerate("ab"):
        made = shards.write_shard(folder / f"source/{name}.tar", labels(), first=COUNT * at)
        if suffix != ".tar":
            made.with_suffix(suffix).write_bytes(gzip.compress(made.read_bytes(), mtime=0))
            made.unlink()
    return Good(folder / "source", folder / f"source/b{suffix}")


def parquet(folder: Path) -> Good:
    (folder / "source").mkdir()
    for at, name in enumerate("ab"):
        images = [{"bytes": shards.photo(COUNT * at + i), "path": None} for i in range(COUNT)]
        pq.write_table(pa.table({"image": images, "label": labels()}), folder / f"source/{name}.parquet", row_group_size=4)
    return Good(folder / "source", folder / "source/b.parquet")


def tree(folder: Path) -> dict[str, bytes]:
    return {f"{label}/{i}_{label}.png": shards.encoded(shards.picture(5 * i + label), "PNG") for i in range(4) for label in range(5)}


def folders(folder: Path) -> Good:
    shards.write_tree(folder / "source", tree(folder))
    return Good(folder / "source", folder / "source/3/1_3.png")


def flat(folder: Path) -> Good:
    from test_sources_flat import TRUTH, WNIDS, write_devkit

    write_devkit(folder, WNIDS, TRUTH)
    shards.write_tree(folder / "val", {f"ILSVRC2012_val_{n:08d}.JPEG": shards.photo(n) for n in range(1, 11)})
    return Good(folder / "val", folder / "val/ILSVRC2012_val_00000004.JPEG")


def devkit(folder: Path, name: str) -> Good:
    good = flat(folder)
    return Good(good.spec, folder / "ILSVRC2012_devkit_t12/data" / name)


def release(folder: Path, suffix: str) -> Good:
    """As ImageNet-v2 is released."""
    made = shards.write_tar(folder / "source/imagenetv2.tar", [(f"imagenetv2/{name}", content) for name, content in sorted(tree(folder).items())])
    if suffix != ".tar":
        made.with_suffix(suffix).write_bytes(gzip.compress(made.read_bytes(), mtime=0))
        made.unlink()
    return Good(folder / "source", folder / f"source/imagenetv2{suffix}")


def pictures(count: int = COUNT, size: int = 32) -> np.ndarray:
    return np.stack([np.asarray(shards.picture(i, (size, size))) for i in range(count)])


def cifar(folder: Path) -> Good:
    (folder / "source").mkdir()
    data = np.ascontiguousarray(pictures().transpose(0, 3, 1, 2)).reshape(COUNT, 3072)
    (folder / "source/test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": labels()}, protocol=2))
    return Good(folder / "source", folder / "source/test_batch")


def npz(folder: Path) -> Good:
    (folder / "source").mkdir()
    np.savez(folder / "source/images.npz", images=pictures(), labels=np.array(labels()))
    return Good(folder / "source", folder / "source/images.npz")


def npy(folder: Path, which: str) -> Good:
    (folder / "source").mkdir()
    np.save(folder / "source/v_data.npy", pictures())
    np.save(folder / "source/v_labels.npy", np.array(labels()))
    return Good(folder / "source", folder / f"source/v_{which}.npy")


KINDS: dict[str, Callable[[Path], Good]] = {
    "tar": tars,
    "tar.gz": lambda folder: tars(folder, ".tar.gz"),
    "parquet": parquet,
    "class folders": folders,
    "flat": flat,
    "meta.mat": lambda folder: devkit(folder, "meta.mat"),
    "ground truth": lambda folder: devkit(folder, "ILSVRC2012_validation_ground_truth.txt"),
    "v2 tar.gz": lambda folder: release(folder, ".tar.gz"),
    "v2 tar": lambda folder: release(folder, ".tar"),
    "cifar": cifar,
    "npz": npz,
    "npy images": lambda folder: npy(folder, "data"),
    "npy labels": lambda folder: npy(folder, "labels"),
}


# ---- damages to a file -----------------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes((content := path.read_bytes())[: int(len(content) * share)])


def zeros_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    path.write_bytes(content)


def replaced(by: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        by(path)

    return damage


def bind(path: Path) -> None:
    """A socket. Its address may not be long."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def garbage(size: int) -> bytes:
    return random.Random(size).randbytes(size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": cut(0),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:1]),
    "cut early": cut(0.1),
    "cut in half": cut(0.5),
    "cut by its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros inside": zeros_inside,
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(garbage(path.stat().st_size)),
    "garbage after it": lambda path: path.write_bytes(path.read_bytes() + garbage(3000)),
    "an error page": lambda path: path.write_bytes(b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n" * 40),
    "a zip": lambda path: path.write_bytes(zipped()),
    "a folder": replaced(lambda path: path.mkdir()),
    "a folder with files": replaced(lambda path: shards.write_tree(path, {"a.txt": b"a"})),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a pipe": replaced(lambda path: os.mkfifo(path)),
    "a socket": replaced(bind),
    "a link to /dev/zero": replaced(lambda path: path.symlink_to("/dev/zero")),
}


def zipped() -> bytes:
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    return out.getvalue()


# ---- what becomes of each --------------------------------------------------------------------------------------------

NO_FILE = {"a folder", "a folder with files", "a pipe", "a socket", "a link to /dev/zero"}
LINKS = {"a dangling link", "a link to itself"}
SHARDS = {"tar": "b.tar", "tar.gz": "b.tar.gz", "parquet": "b.parquet"}  # kinds of which another file stays
HARMLESS = {  # what no reader can tell, or need not
    "cut by its last byte": {"tar", "v2 tar", "class folders", "ground truth"},
    "zeros inside": {"flat", "npy images"},
    "garbage after it": {"class folders", "flat", "meta.mat", "cifar", "npz", "npy images", "npy labels"},
}


def becomes(kind: str, damage: str) -> str:
    """`refused`; `aside`, the one image alone; `passed over`, as if it were not there; or `profiled`, all of it."""
    if kind in HARMLESS.get(damage, ()):
        return "profiled"
    if kind in ("class folders", "flat"):
        return "passed over" if damage in NO_FILE else "aside"
    return "passed over" if kind in SHARDS and damage in NO_FILE else "refused"


DAMAGED = [(kind, damage) for kind in KINDS for damage in DAMAGES]
NAMED = [(kind, damage) for kind in ("tar", "tar.gz", "parquet", "v2 tar", "v2 tar.gz", "cifar", "npz", "npy images") for damage in DAMAGES if damage in NO_FILE | LINKS]
