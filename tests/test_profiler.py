"""A unit's rows: right, in order, bit-equal however the shard was cut; and a sample that fails takes no other with it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import oracles
import pyarrow as pa
import pytest
import shards
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import MANIFEST

from pipeline.filters import FilterLayout
from pipeline.profiler import Profiler
from pipeline.saliency import Saliency
from pipeline.samples import Preprocessing, Sample, decode
from pipeline.sources import RawSample
from pipeline.store import profiles_schema, saliency_of

RECIPE = Preprocessing(resize=None, crop=None)


def profiler_of(animal: str, engine: str = "fused", batch_size: int = 4) -> Profiler:
    network = next(a for a in zoo.ZOO if a.id == animal).make()
    return Profiler(replace(MANIFEST, layers=FilterLayout.of(network), preprocessing=RECIPE, classes=zoo.CLASSES, batch_size=batch_size, engine=engine), network, "cpu")


def samples_of(count: int, size: tuple[int, int] = (8, 11)) -> list[Sample]:
    return [decode(RawSample(f"{i:02d}", shards.photo(i, size), i % zoo.CLASSES), RECIPE, zoo.CLASSES) for i in range(count)]


def table_rows(table: pa.Table) -> dict:
    return {row["sample_id"]: row for row in table.to_pylist()}


def test_rows_are_those_of_the_oracle():
    """Every column of a row, in the order of the samples, the last batch padded."""
    profiler, samples = profiler_of("batchnorm"), samples_of(7)
    table, rejects = profiler.profile(samples, "a.tar", 0)
    images, labels = RECIPE.normalise(torch.from_numpy(np.stack([s.pixels for s in samples]))), torch.tensor([s.label for s in samples])
    network = profiler.engine.network
    logits = torch.from_numpy(oracles.logits(network, images))
    assert table["sample_id"].to_pylist() == [s.sample_id for s in samples] and rejects.num_rows == 0 and table.schema == profiles_schema(FilterLayout.of(network).total)
    assert np.median(oracles.relative_errors(saliency_of(table), oracles.saliency(network, images, labels, "abs"))) < 1e-5
    assert table["label"].to_pylist() == labels.tolist() and table["prediction"].to_pylist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(table["loss"], F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4)
    np.testing.assert_allclose(np.exp(-table["loss"].to_numpy()), table["label_confidence"], rtol=1e-5)
    np.testing.assert_allclose(table["prediction_confidence"], logits.softmax(1).max(1).values, rtol=1e-4)
    assert table["thumbnail"].to_pylist() == [s.thumbnail for s in samples] and set(table["shard"].to_pylist()) == {"a.tar"}


PROFILERS: dict[str, Profiler] = {}


@pytest.mark.parametrize("animal, engine", [("batchnorm", "fused"), ("depth-multiplied", "fused"), ("depth-multiplied", "vmap"), ("many-weights-dilated", "fused"), ("batch-statistics", "vmap")])
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 10), max_size=5), lost=st.sets(st.integers(0, 10), max_size=4))
def test_bits_do_not_depend_on_the_cut(animal, engine, cuts, lost):
    """However a shard is cut into units, and whichever samples beside it are set aside, a row is the same bit for bit: the second
    network on the list is one in which a row's place in its batch would show."""
    profiler, samples = PROFILERS.setdefault(f"{animal} {engine}", profiler_of(animal, engine)), samples_of(11)
    whole = table_rows(profiler.profile(samples, "a.tar", 0)[0])
    kept = [replace(s, pixels=None, reason="lost") if i in lost else s for i, s in enumerate(samples)]
    parts = {}
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 11]):
        parts |= table_rows(profiler.profile(kept[start:stop], "a.tar", start)[0])
    assert parts == {name: row for name, row in whole.items() if int(name) not in lost}


class Picky(torch.nn.Module):
    """Fails on a batch with an image whose first pixel is white, and answers NaN where it is black."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, zoo.CLASSES)

    def forward(self, x):
        first = x[:, 0, 0, 0]
        if (first > 2).any():
            raise ValueError("too\x1b[2J bright\nfor me")
        return self.linear(torch.relu(self.conv(x)).mean((2, 3))) + torch.where(first < -2, torch.nan, 0.0)[:, None]


class Played(NamedTuple):
    """An engine that computes as a function does: when a batch is begun, or, `late`, when it is waited for, as what fails in a team is raised."""

    compute: Callable[[torch.Tensor, torch.Tensor], Saliency]
    late: bool = False

    def begin(self, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Saliency]:
        if self.late:
            return lambda: self.compute(images, labels)
        found = self.compute(images, labels)
        return lambda: found


LATE = pytest.mark.parametrize("late", [False, True], ids=["at once", "when waited for"])


def picky(batch_size: int = 4, ahead: int = 0) -> Profiler:
    """ahead: batches that are begun before the rows of an earlier one are made."""
    network = Picky().eval()
    profiler = Profiler(replace(MANIFEST, layers=FilterLayout.of(network), preprocessing=RECIPE, classes=zoo.CLASSES, batch_size=batch_size), network, "cpu")
    profiler.ahead = ahead
    return profiler


def with_corners(samples: list[Sample], corners: list[int]) -> list[Sample]:
    """The samples with a first pixel of these values; 100 is one that `Picky` takes."""
    changed = [replace(sample, pixels=sample.pixels.copy()) for sample in samples]
    for sample, corner in zip(changed, corners, strict=True):
        sample.pixels[0, 0] = corner
    return changed


AHEAD = pytest.mark.parametrize("ahead", [0, 1], ids=["batch by batch", "one ahead"])


@AHEAD
def test_sample_that_fails_is_set_aside_alone(ahead):
    """The rows of the others are those of a run in which it did not fail; its reason is safe to print."""
    samples = with_corners(samples_of(11), [100, 255, 100, 0, 100, 255, 255, 100, 100, 0, 100])
    samples[7] = Sample("07", reason="no label")
    table, rejects = picky(ahead=ahead).profile(samples, "a.tar", 0)
    assert list(zip(rejects["sample_id"].to_pylist(), rejects["reason"].to_pylist())) == [
        ("01", "the network fails on it: too\\x1b[2J bright"),
        ("03", "the network's output for it is not finite"),
        ("05", "the network fails on it: too\\x1b[2J bright"),
        ("06", "the network fails on it: too\\x1b[2J bright"),
        ("07", "no label"),
        ("09", "the network's output for it is not finite"),
    ]
    assert table["sample_id"].to_pylist() == ["00", "02", "04", "08", "10"]
    good = table_rows(picky().profile(with_corners(samples_of(11), [100] * 11), "a.tar", 0)[0])
    assert table_rows(table) == {name: good[name] for name in table["sample_id"].to_pylist()}


def test_the_next_batch_is_begun_before_this_one_is_waited_for():
    """With a network that is the profiler's own: no team would compute meanwhile for one whose parameters ask for a gradient."""
    network = Picky().eval()
    profiler = Profiler(replace(MANIFEST, layers=FilterLayout.of(network), preprocessing=RECIPE, classes=zoo.CLASSES, batch_size=4), network, "cpu")
    engine, seen = profiler.engine, []

    class Watched:
        def begin(self, images, labels):
            seen.append("begun")
            wait = engine.begin(images, labels)
            return lambda: (seen.append("waited"), wait())[1]

    profiler.engine = Watched()
    profiler.profile(with_corners(samples_of(11), [100] * 11), "a.tar", 0)
    assert seen == ["begun", "begun", "waited", "begun", "waited", "waited"] and not any(p.requires_grad for p in network.parameters())


@AHEAD
@LATE
@pytest.mark.parametrize("fault, reason", [(SystemExit(3), "SystemExit: 3"), (GeneratorExit(), "GeneratorExit"), (BaseException("of its own"), "BaseException: of its own")], ids=["exit", "generator", "own"])
def test_a_network_that_asks_to_exit_fails_like_any_other(fault, reason, ahead, late):
    profiler, engine = picky(ahead=ahead), picky().engine
    profiler.engine = Played(lambda images, labels: (_ for _ in ()).throw(fault) if (images[:, 0, 0, 0] > 2).any() else engine(images, labels), late)
    table, rejects = profiler.profile(with_corners(samples_of(3), [100, 255, 100]), "a.tar", 0)
    assert table["sample_id"].to_pylist() == ["00", "02"] and rejects["reason"].to_pylist() == [f"the network fails on it: {reason}"]


@AHEAD
@LATE
def test_ctrl_c_is_no_samples_fault(ahead, late):
    profiler = picky(ahead=ahead)
    profiler.engine = Played(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), late)
    with pytest.raises(KeyboardInterrupt):
        profiler.profile(samples_of(3), "a.tar", 0)


@LATE
@pytest.mark.parametrize(
    "fault",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), RuntimeError("CUDA error: unspecified launch failure"), OSError(28, "No space left on device")],
    ids=["memory of the device", "of the machine", "GPU", "GPU, as older versions say it", "disk"],
)
def test_what_the_machine_does_is_no_samples_fault(fault, late):
    """No sample goes to the rejects for a batch that was too large for the device, for a GPU that fails, or for a kernel that found no space to be compiled."""
    profiler = picky()
    profiler.engine = Played(lambda *_: (_ for _ in ()).throw(fault), late)
    with pytest.raises(type(fault)):
        profiler.profile(samples_of(3), "a.tar", 0)


def short_of_memory(profiler: Profiler, most: int, fault: Exception, halves: bool = True) -> list[int]:
    """A device on which more than `most` images do not fit, and which, as a GPU is, is given halves then; returns the sizes of the batches that were tried."""
    tried, engine, profiler.halves = [], profiler.engine, halves

    def small(images, labels):
        tried.append(len(images))
        if len(images) > most:
            raise fault
        return engine(images, labels)

    profiler.engine = Played(small)
    return tried


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")], ids=["CUDA", "cuDNN", "CPU"])
@AHEAD
@pytest.mark.parametrize("most, tried", [(4, [8, 4, 4, 4]), (3, [8, 4, 2, 2, 2, 2, 2, 2]), (1, [8, 4, 2, *[1] * 11])])
def test_a_batch_that_does_not_fit_is_halved(most, tried, fault, ahead):
    """And goes on, for all that follows: every sample is there, none set aside, the numbers those of the whole batch, and the run's batch size what it was."""
    samples = with_corners(samples_of(11), [100] * 11)
    whole, profiler = picky(8).profile(samples, "a.tar", 0)[0], picky(8, ahead)
    seen = short_of_memory(profiler, most, fault)
    table, rejects = profiler.profile(samples, "a.tar", 0)
    assert rejects.num_rows == 0 and seen == tried and profiler.manifest.batch_size == 8
    assert table.drop(["saliency", "loss", "label_confidence", "prediction_confidence"]) == whole.drop(["saliency", "loss", "label_confidence", "prediction_confidence"])
    np.testing.assert_allclose(saliency_of(table), saliency_of(whole), rtol=1e-5)


def test_on_a_cpu_a_batch_that_does_not_fit_is_not_done_otherwise():
    """Halves would be rounded otherwise by some networks, and bits are promised there: nothing is set aside, and what comes once the memory is free again are whole batches."""
    samples, whole = with_corners(samples_of(11), [100] * 11), picky(8).profile(with_corners(samples_of(11), [100] * 11), "a.tar", 0)
    profiler = picky(8)
    engine, tried = profiler.engine, short_of_memory(profiler, 4, MemoryError(), picky().halves)
    with pytest.raises(MemoryError):
        profiler.profile(samples, "a.tar", 0)
    profiler.engine = engine
    assert tried == [8] and profiler.profile(samples, "a.tar", 0) == whole


def test_rows_of_halves_follow_from_their_positions():
    """However the shard is cut, on devices that hold as much: bit for bit; and a sample that fails is still set aside alone."""
    samples = with_corners(samples_of(11), [100, 100, 255, *[100] * 8])
    one, two = picky(8), picky(8)
    for profiler in (one, two):
        short_of_memory(profiler, 4, torch.OutOfMemoryError("CUDA out of memory"))
    two.profile(samples[:1], "a.tar", 0)
    whole, rejects = one.profile(samples, "a.tar", 0)
    parts = pa.concat_tables(two.profile(samples[a:b], "a.tar", a)[0] for a, b in ((0, 3), (3, 7), (7, 11)))
    assert whole == parts and rejects["sample_id"].to_pylist() == ["02"]


def test_threads_with_a_unit_each_take_turns():
    """The numbers are those of a unit alone, a sample that fails is set aside in the midst of them, and a thread that gives up in the midst of its unit is in nobody's way."""
    units = [with_corners(samples_of(11), [100, 255, *[100] * 9]) for _ in range(6)]
    alone, rejects = picky().profile(units[0], "a.tar", 0)
    profiler = picky(ahead=1)
    engine, used = profiler.engine, []

    def watched(images, labels):
        used.append(threading.get_ident())
        time.sleep(0.002)
        return engine(images, labels)

    def profile(turn: int):
        if turn % 3 == 0:
            with closing(profiler.parts(units[turn], "a.tar", 0)) as parts:
                return next(parts)
        return profiler.profile(units[turn], "a.tar", 0)

    profiler.engine = Played(watched)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(profile, range(6)))
    assert all(found[i] == (alone, rejects) for i in (1, 2, 4, 5)) and all(found[i][0] == alone.slice(0, 3) for i in (0, 3))
    assert len(set(used)) > 1


def test_images_of_several_sizes_share_a_unit():
    """Each size in batches of its own; rows stay in order."""
    samples = [sample for pair in zip(samples_of(5), samples_of(5, (9, 12))) for sample in pair]
    samples = with_corners([replace(s, sample_id=str(i)) for i, s in enumerate(samples)], [100] * 10)
    table, rejects = picky().profile(samples, "a.tar", 3)
    assert table["sample_id"].to_pylist() == [str(i) for i in range(10)] and rejects.num_rows == 0


def test_unit_without_a_good_sample_has_tables_all_the_same():
    table, rejects = picky().profile([Sample("a", reason="empty")], "a.tar", 0)
    assert table.num_rows == 0 and table.schema == profiles_schema(4) and rejects.to_pylist() == [{"sample_id": "a", "shard": "a.tar", "reason": "empty"}]
