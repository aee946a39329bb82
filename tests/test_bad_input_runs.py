"""Damage to a finished run, as a user meets it: a verb gives the very answer of the undamaged run, or names the damaged file and the remedy, and the remedy mends the run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import bad_input
import bad_input_runs as table
import pytest
import tiny


@dataclass(frozen=True)
class Runs:
    """whole: a finished run with indexes and experiments; other: of the same names and sources, other weights; answers: by verb, of the whole one."""

    whole: tiny.Small
    other: Path
    answers: dict[str, object]


def blank(self, store, summary, folder) -> None:
    """The figures of an experiment, drawn by somebody in a hurry."""
    for figure in self.figures:
        for suffix in (".png", ".svg"):
            (folder / f"{figure}{suffix}").write_bytes(b"")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("whole")
    with ExitStack() as patched:
        for verb in ("profile.Profile", "prune.Prune", "mask.Mask", "finetune.FineTune"):
            patched.enter_context(mock.patch(f"jobs.{verb}.draw", blank))
        whole = tiny.make(folder)
        table.made(whole)
        other = tiny.Small(folder / "other" / "run", whole.sources)
        for dataset in ("val", "v2"):
            assert other.extract(dataset, model="tiny:other_weights").code == 0
        assert tiny.call("index", "--run", other.run, "--datasets", "val,v2", "--reference", "val").code == 0
        table.made(other)
        answers = {}
        for verb in {verb for part in table.PARTS for verb in part.verbs}:
            ended, answers[verb] = table.call(verb, copy(whole, folder / verb))
            assert ended.code == 0, ended.err
        yield Runs(whole, other.run, answers)


def copy(small: tiny.Small, folder: Path) -> tiny.Small:
    """The same run and sources, to be changed."""
    folder.mkdir(exist_ok=True)
    return tiny.Small(shutil.copytree(small.run, folder / "run", symlinks=True), small.sources)


STANDS_FOR = {
    "run.json": ("run.json", "was made with"),
    "weights": ("weights",),
    "profiles/": ("its profiles", "index/errors", "unfinished"),
    "rejects/": ("its profiles", "index/errors", "unfinished"),
    "datasets": ("datasets/val.json",),
    "statistics/": ("statistics",),
    "index/": ("index/errors", "has no index"),
    **{f"experiments/{verb}/": (verb,) for verb in table.EXPERIMENTS},
}  # a damaged file, and what a message may call it, beside its name


def named(path: str, text: str) -> bool:
    """Whether a message says which file is damaged, or what it stands for."""
    return Path(path).name in text or any(word in text for place, words in STANDS_FOR.items() if path.startswith(place) or place == f"{path}/" for word in words)


def pending(path: str, verb: str, answer: object) -> bool:
    """Units that are gone are said to be still to do: that is the truth."""
    return verb == "status" and path.startswith(("profiles", "rejects")) and sum(p["pending"] for p in answer) in (20, 60, 90) and sum(p["samples"] for p in answer) == 90


def check(runs: Runs, small: tiny.Small, path: str, verb: str) -> None:
    """After damage: the answer of the whole run, or a refusal that changes nothing."""
    before = bad_input.digests(small.run)
    with bad_input.no_hanging(small.run.parent):
        ended, answer = table.call(verb, small)
    if ended.code == 0:
        assert answer == runs.answers[verb] or pending(path, verb, answer), "another answer, and nobody says why"
        return
    text = bad_input.message(ended, 2, 4)
    assert named(path, text), text
    after = bad_input.digests(small.run)
    assert {file for file in before if after.get(file) != before[file]} <= {f"experiments/{name}/summary.json" for name in table.EXPERIMENTS}, "a refusal that changed something"


@pytest.mark.parametrize("part, name, verb", table.cases(), ids=lambda value: (value.id if isinstance(value, table.Part) else value).replace(" ", "-"))
def test_a_damaged_file_of_a_run(runs, tmp_path, part, name, verb):
    """Every file under every damage, with every verb that reads it."""
    small = copy(runs.whole, tmp_path / "mine")
    table.damage(name, small.run, part, runs.other)
    check(runs, small, part.path, verb)


@pytest.mark.parametrize("name", ["garbage", "a folder", "another run's"], ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("part", table.PARTS, ids=lambda part: part.id)
def test_the_remedy_mends_the_run(runs, tmp_path, part, name):
    """What the messages say to do, done: every verb that reads the file answers as ever."""
    small = copy(runs.whole, tmp_path / "mine")
    table.damage(name, small.run, part, runs.other)
    table.mend(part, small, runs.whole.run)
    for verb in part.verbs:
        ended, answer = table.call(verb, small)
        assert ended.code == 0 and answer == runs.answers[verb], (verb, ended.err)


@pytest.mark.parametrize("folder, verb", [(folder, verb) for folder, verbs in table.FOLDERS for verb in verbs], ids=lambda word: word.replace(" ", "-"))
def test_a_run_that_is_half_deleted(runs, tmp_path, folder, verb):
    small = copy(runs.whole, tmp_path / "mine")
    shutil.rmtree(small.run / folder)
    check(runs, small, folder, verb)


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts by `mount`'s words, taken away again."""
    places = []

    def mount(*words: str) -> Path:
        at = tmp_path / f"mount{len(places)}"
        at.mkdir()
        if subprocess.run(["mount", *words, str(at)], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here (that needs root)")
        places.append(at)
        return at

    yield mount
    for at in places:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.parametrize("verb", ["status", "query", "neighbors", "index", "extract", "extract v3", "profile", "profile --fresh"], ids=lambda verb: verb.replace(" ", "-"))
def test_a_run_that_is_read_only(runs, tmp_path, mounted, verb):
    """Verbs that only read answer as ever; the others say what cannot be written."""
    small = copy(runs.whole, tmp_path / "mine")
    at = mounted("--bind", str(small.run))
    if subprocess.run(["mount", "-o", "remount,ro,bind", str(at)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted read-only here")
    before = bad_input.digests(small.run)
    ended, answer = table.call(verb, tiny.Small(at, small.sources))
    if verb in ("status", "query", "neighbors"):
        assert ended.code == 0 and answer == runs.answers[verb]
    else:
        assert str(at) in bad_input.message(ended, 2) and "Read-only file system" in ended.err
    assert bad_input.digests(small.run) == before


@pytest.mark.parametrize("verb", ["index", "extract v3", "profile"], ids=lambda verb: verb.replace(" ", "-"))
def test_a_disk_without_space(runs, mounted, verb):
    """Stopped, resumable, nothing half written; with space again the same command gives the answer of any other disk."""
    at = mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    small = tiny.Small(shutil.copytree(runs.whole.run, at / "run"), runs.whole.sources)
    shutil.rmtree(small.run / "experiments")
    before, ballast = bad_input.digests(small.run), at / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    ended, _ = table.call(verb, small)
    assert str(small.run) in bad_input.message(ended, 2, 4) and "No space left on device" in ended.err
    after = bad_input.digests(small.run)
    assert before.items() <= after.items() and not [path for path in after if path.endswith((".parquet", ".tmp")) and path not in before]
    ballast.unlink()
    ended, answer = table.call(verb, small)
    assert ended.code == 0 and answer == runs.answers[verb]


def test_a_run_is_begun_on_a_disk_without_space(small, mounted):
    """Its weights do not fit: nothing is begun, and with space the same command begins it."""
    at = mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    (at / "ballast").write_bytes(bytes(60 * 1024))
    ended = small.extract("val", run=at / "run")
    assert str(at / "run") in bad_input.message(ended, 4) and "No space left on device): make room" in ended.err
    assert not [path for path in (at / "run").glob("**/*") if path.is_file() and not path.name.endswith(".lock")]
    subprocess.run(["mount", "-o", "remount,size=8m", str(at)], check=True)
    assert small.extract("val", run=at / "run").code == 0
