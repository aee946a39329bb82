"""A unit that is committed stretch by stretch, the one written while the next is made: one file in their order, or nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_store import UNIT, begun, failing, profiles, rejects

from pipeline import store as store_module


def parts(sizes: list[int], bad: int = 0):
    """A unit of `sum(sizes)` samples, stretch by stretch; the first `bad` of each are set aside."""
    start = 0
    for size in sizes:
        ids = [f"a.tar/{i:04d}" for i in range(start, start + size)]
        yield profiles(ids[bad:]), rejects(ids[:bad])
        start += size


@pytest.mark.parametrize("least", [1, 300, 1 << 30])
def test_a_unit_that_comes_in_parts_is_one_file_in_their_order(tmp_path, monkeypatch, least):
    store = begun(tmp_path)
    monkeypatch.setattr(store_module, "ROW_GROUP", least)
    assert store.commit(UNIT, parts([5, 1, 7, 3], bad=1)) == 4
    found = store.profiles("val").to_table()
    assert found["sample_id"].to_pylist() == [f"a.tar/{i:04d}" for i in range(16) if i not in (0, 5, 6, 13)]
    assert found["saliency"].to_pylist() == [s for part, _ in parts([5, 1, 7, 3], bad=1) for s in part["saliency"].to_pylist()]
    assert store.rejects("val")["sample_id"].to_pylist() == ["a.tar/0000", "a.tar/0005", "a.tar/0006", "a.tar/0013"] and store.progress("val").done == 12


def test_a_unit_whose_last_part_fails_is_not_there(tmp_path, monkeypatch):
    """Whether that is computed, while those before it are being written, or written."""
    store = begun(tmp_path)
    monkeypatch.setattr(store_module, "ROW_GROUP", 1)

    def breaking():
        yield from parts([4, 4, 4])
        raise ValueError("the last cannot be computed")

    write_table = store_module.pq.ParquetWriter.write_table
    for source, which, fault in ((breaking(), 99, ValueError), (parts([4, 4, 4, 4]), 3, OSError), (parts([4, 4, 4, 4]), 0, OSError)):
        monkeypatch.setattr(store_module.pq.ParquetWriter, "write_table", failing(which, write_table, OSError(28, "No space left on device")))
        with pytest.raises(fault, match="cannot be computed" if fault is ValueError else UNIT.stem):
            store.commit(UNIT, source)
        assert not list(store.run.glob("profiles/**/*.*")) and not list(store.run.glob("**/.*")) and store.progress("val").done == 0


def test_a_signal_while_a_stretch_is_being_written_does_not_close_the_file_under_it(tmp_path, monkeypatch):
    """A stretch that fails waits for the one before it; a Ctrl-C that ends this waiting is what is heard. Closed meanwhile, the file would end the process."""
    store, begins, goes_on, ended, closed = begun(tmp_path), threading.Event(), threading.Event(), threading.Event(), []

    def slow(self, *args):
        begins.set()
        goes_on.wait(20)
        ended.set()

    def breaking():
        yield from parts([4])
        begins.wait(20)
        raise ValueError("cannot be computed")

    class Interrupted(ThreadPoolExecutor):
        def __exit__(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "ROW_GROUP", 1)
    monkeypatch.setattr(store_module, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(store_module.pq.ParquetWriter, "write_table", slow)
    monkeypatch.setattr(store_module.pq.ParquetWriter, "close", lambda self: closed.append(ended.is_set()))
    with pytest.raises(KeyboardInterrupt):
        store.commit(UNIT, breaking())
    goes_on.set()
    assert ended.wait(20) and all(closed) and not list(store.run.glob("profiles/**/*.*"))
