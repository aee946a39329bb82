"""A finished run, every file of which is damaged in turn: the files, the damages, the verbs that read each, and the remedy that mends it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny

UNIT = "val-00001-00000000-00000020"  # the second of three


@dataclass(frozen=True)
class Part:
    """A file of a run. verbs: those that read it; mend: what its messages say to do, the file removed first."""

    path: str
    verbs: tuple[str, ...]
    mend: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.path.replace(f"{UNIT}.", "*.")


PARTS = [
    Part("run.json", ("status", "query", "neighbors", "index", "extract", "profile"), ("restore",)),
    Part("weights.safetensors", ("extract", "extract v3", "explain", "mask --fresh", "finetune --fresh"), ("extract",)),
    Part("datasets/val.json", ("status", "index", "extract", "profile", "prune"), ("extract",)),
    Part(f"profiles/val/{UNIT}.parquet", ("status", "query", "neighbors", "index", "extract", "profile", "finetune --fresh"), ("extract", "index")),
    Part(f"rejects/val/{UNIT}.parquet", ("status", "index", "extract", "profile"), ("extract", "index")),
    Part("statistics/val.parquet", ("query", "neighbors", "index", "profile", "explain", "mask"), ("index",)),
    Part("index/errors/index.faiss", ("query", "neighbors", "finetune --fresh"), ("index",)),
    Part("index/errors/rows.parquet", ("query", "neighbors", "finetune --fresh"), ("index",)),
    Part("index/errors/index.json", ("query", "neighbors", "finetune --fresh"), ("index",)),
    Part("experiments/profile/settings.json", ("profile",), ("profile --fresh",)),
    Part("experiments/profile/summary.json", ("profile",), ("profile",)),
    Part(f"experiments/profile/{UNIT}.parquet", ("profile", "profile anew"), ("profile",)),
    *(Part(f"experiments/{verb}/{UNIT}.parquet", (verb, f"{verb} anew"), (verb,)) for verb in ("prune", "mask", "finetune")),
]


# ---- damages ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)


def in_place(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content(path.read_bytes()))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": in_place(lambda content: b""),
    "cut in half": in_place(lambda content: content[: len(content) // 2]),
    "garbage": in_place(lambda content: random.Random(len(content)).randbytes(len(content))),
    "one bit flipped": flip,
    "a folder": folder,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "another run's": None,  # see `foreign`
    "JSON of another schema": in_place(lambda content: b'{"a": [1, 2]}'),
}


def damage(name: str, run: Path, part: Part, other: Path) -> None:
    path = run / part.path
    if name == "another run's":
        shutil.copyfile(other / part.path, path)
    else:
        DAMAGES[name](path)


def cases() -> list[tuple[Part, str, str]]:
    """(file, damage, verb)."""
    every = [(part, name, verb) for part in PARTS for name in DAMAGES if part.path.endswith(".json") or "JSON" not in name for verb in part.verbs]
    return [case for case in every if case[1:] != ("one bit flipped", "extract") or not case[0].path.startswith("profiles")]  # where nothing is left to do, vectors are not read


# ---- verbs -----------------------------------------------------------------------------------------------------------


EXPERIMENTS = {
    "profile": ("--max-samples", 45),
    "prune": ("--max-samples", 45),
    "mask": ("--max-samples", 8, "--percent", 5, "-k", 3, "--hosts", 1),
    "finetune": ("--from", "val", "--in", "v2", "--max-samples", 8, "-k", 2),
}


def made(small: tiny.Small) -> None:
    """Experiments into a run that is indexed."""
    for verb, words in EXPERIMENTS.items():
        ended = tiny.call(verb, "--run", small.run, *words)
        assert ended.code == 0, ended.err


ASKED = "val:00001"


def call(verb: str, small: tiny.Small) -> tuple[tiny.Ended, object]:
    """(how it ended, its whole answer): stdout, and what it writes where that is its result."""
    run, out = small.run, small.run.parent / "out.parquet"
    out.unlink(missing_ok=True)
    if verb == "status":
        ended = tiny.call("status", "--run", run, "--format", "json")
        return ended, [{**p, "images_per_s": None} for p in ended.json["datasets"].values()] if not ended.code else None
    if verb == "query":
        return (ended := tiny.call("query", "--run", run, ASKED, "--format", "json")), ended.raw
    if verb == "neighbors":
        ended = tiny.call("neighbors", "--run", run, "--from", "val", "--in", "v2", "--out", out)
        return ended, out.read_bytes() if not ended.code else None
    if verb == "index":
        ended = tiny.call("index", "--run", run, "--datasets", "val,v2", "--reference", "val", "--name", "again")
        return ended, [(run / "index/again" / name).read_bytes() for name in ("index.faiss", "rows.parquet")] if not ended.code else None
    if verb in ("extract", "extract v3"):
        dataset = "val" if verb == "extract" else "v3"
        ended = tiny.call("extract", "--run", run, "--dataset", dataset, "--source", small.sources / ("val" if dataset == "val" else "v2"), "--model", tiny.MODEL)
        return ended, _profiles(run, dataset) if not ended.code else None
    if verb == "explain":
        ended = tiny.call("explain", ASKED, "--run", run, "--format", "json", "--device", "cpu", "--out", small.run.parent / "map.png")
        return ended, ended.raw.replace(str(small.run.parent).encode(), b"HERE")
    name, _, how = verb.partition(" ")
    if how == "anew":
        (run / "experiments" / name / "summary.json").unlink(missing_ok=True)
    ended = tiny.call(name, "--run", run, *EXPERIMENTS[name], "--format", "json", *(["--fresh"] if how == "--fresh" else []))
    return ended, ended.raw


FOLDERS = [
    ("profiles", ("status", "query", "index", "extract", "profile")),
    ("profiles/val", ("status", "query", "index", "extract", "profile", "prune")),
    ("rejects", ("status", "query", "index", "extract")),
    ("rejects/val", ("status", "index", "extract")),
    ("datasets", ("status", "query", "index", "extract", "profile")),
    ("statistics", ("query", "neighbors", "index", "profile")),
    ("index", ("query", "neighbors", "status", "index")),
    ("index/errors", ("query", "index")),
    ("experiments", ("status", "query", "profile", "prune")),
    ("experiments/prune", ("prune", "profile")),
]  # that are removed whole, and verbs after that


def _profiles(run: Path, dataset: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "profiles" / dataset).glob("*.parquet")}


def mend(part: Part, small: tiny.Small, whole: Path) -> None:
    """What the messages say."""
    path = small.run / part.path
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for step in part.mend:
        if step == "restore":
            shutil.copyfile(whole / part.path, path)
        elif step == "index":
            assert tiny.call("index", "--run", small.run, "--datasets", "val,v2", "--reference", "val").code == 0
        else:
            ended, _ = call(step, small)
            assert ended.code == 0, ended.err
