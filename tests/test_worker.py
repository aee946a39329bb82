"""One unit from shard to file, in its two steps: what comes of it, and what is said where nothing can."""

import sys
from dataclasses import replace

import pytest
import shards
import torch
from test_profiler import RECIPE, Played
from test_store import MANIFEST

from pipeline import models
from pipeline.census import Census
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.profiler import Profiler
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.units import Unit
from pipeline.worker import DECODED, Decoder, UnitWriter


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory as an extraction leaves it, and a shard whose name is no UTF-8, with a broken image and a label too large."""
    (tmp_path / "my_net.py").write_text("import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    network = models.build("my_net:make")
    shards.write_tar(
        tmp_path / "data" / "sh\udcffard.tar",
        [("a.jpg", shards.photo(1)), ("a.cls", b"3"), ("b.jpg", b"broken"), ("b.cls", b"0"), ("c.jpg", shards.photo(2)), ("c.cls", b"4"), ("d.jpg", shards.photo(3)), ("d.cls", b"0")],
    )
    run = tmp_path / "run"
    replace(MANIFEST, model="my_net:make", layers=FilterLayout.of(network), preprocessing=RECIPE, classes=4, batch_size=2, import_root=str(tmp_path)).write(run)
    models.save_weights(network, run / "weights.safetensors")
    source, names = open_source(str(tmp_path / "data"))
    Store(run).write_census("val", Census("", source.kind, source.root, tuple(source.census(name) for name in names), None))
    yield run
    sys.modules.pop("my_net", None)


def test_unit_goes_from_shard_to_file(run):
    """Decoded in one place, written in another; the receipt counts; the unit is done and needs not be done again."""
    store = Store(run)
    census = store.census("val")
    unit, = store.todo("val", 16)
    decoded = Decoder(census.kind, census.root, RECIPE, 4)(Unit.from_json(unit.to_json()))
    assert decoded.schema == DECODED and decoded.num_rows == 4
    receipt = UnitWriter(run, "cpu")(decoded)
    assert (receipt.stem, receipt.samples, receipt.rejects, receipt.fault) == (unit.stem, 4, 2, "") and store.todo("val", 16) == []
    assert store.profiles("val").to_table()["sample_id"].to_pylist() == ["a", "d"]
    file = store.files("val")[0].stat()
    assert UnitWriter(run, "cpu")(decoded).fault == "" and store.files("val")[0].stat() == file, "what is committed is not computed again"
    assert store.rejects("val").to_pylist() == [
        {"sample_id": "b", "shard": "sh\\xffard.tar", "reason": "not an image in a format that is known here"},
        {"sample_id": "c", "shard": "sh\\xffard.tar", "reason": "label 4 is outside the network's classes 0..3"},
    ]


def test_unit_that_cannot_be_read_or_written_says_why(run, monkeypatch):
    """As the receipt's fault, with nothing committed: an actor that raises would be restarted for ever."""
    store, writer = Store(run), UnitWriter(run, "cpu")
    census = store.census("val")
    unit, = store.todo("val", 16)
    decoder = Decoder(census.kind, census.root, RECIPE, 4)
    decoded = decoder(unit)
    shard = next((run.parent / "data").iterdir())
    content = shard.read_bytes()
    for damage, reason in ((content[:600], "sh.udcffard.tar"), (b"", "sh.udcffard.tar"), (None, "No such file")):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        receipt = writer(decoder(unit))
        assert receipt.fault and "\n" not in receipt.fault and receipt.samples == 4 and receipt.rejects == 0
        assert reason.replace(".udcff", "\\udcff") in receipt.fault
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert writer(decoded).fault.endswith("cannot be written: No space left on device")
    writer.profiler.engine = Played(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried to")))
    assert writer(decoded).fault.endswith("OutOfMemoryError: CUDA out of memory.")
    assert store.committed("val") == [] and not list(run.glob("profiles/val/*"))


def test_run_that_is_no_run_cannot_be_restored(tmp_path):
    with pytest.raises(BadRequest, match="there is no run at"):
        Profiler.restore(tmp_path, "cpu")
