"""Every kind goes through the command: one set of images, packed in each, gives the same numbers in one run."""

import gzip
import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shards
import tiny
from PIL import Image

from pipeline.store import Store, saliency_of


def test_every_kind_gives_the_numbers_of_the_tar(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = [i % 5 for i in range(12)]
    pngs = [shards.encoded(Image.fromarray(image), "PNG") for image in images]
    tar = shards.write_tar(tmp_path / "tar/a.tar", [m for i in range(12) for m in ((f"{i:02d}.png", pngs[i]), (f"{i:02d}.cls", b"%d" % labels[i]))])
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/a.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    image = pa.array([{"bytes": p, "path": f"{i:02d}.png"} for i, p in enumerate(pngs)], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / "parquet/a.parquet", row_group_size=5)
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar/test_batch").write_bytes(pickle.dumps({b"data": images.transpose(0, 3, 1, 2).reshape(12, 3072), b"labels": labels}, 2))
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    by_number = {f"{label}/{i:02d}.png": png for i, (label, png) in enumerate(zip(labels, pngs))}
    shards.write_tree(tmp_path / "folders", by_number)
    shards.write_tar(tmp_path / "v2/v2.tar", sorted((f"top/{name}", png) for name, png in by_number.items()))

    found = {}
    for kind, spec in (("tar", "tar"), ("gz", "gz"), ("parquet", "parquet"), ("cifar", "cifar"), ("npz", "a.npz"), ("folders", "folders"), ("v2", "v2")):
        ended = tiny.call("extract", "--run", tmp_path / "run", "--dataset", kind, "--source", tmp_path / spec, "--model", tiny.MODEL)
        assert ended.code == 0, ended.err
        assert ("gunzip it first" in ended.err) == (kind == "gz")
        table = pa.concat_tables(pq.read_table(f) for f in Store(tmp_path / "run").files(kind))
        found[kind] = {s[-2:]: (label, values) for s, label, values in zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), saliency_of(table))}
    for kind, of_kind in found.items():
        assert of_kind.keys() == found["tar"].keys()
        for sample, (label, values) in of_kind.items():
            assert label == found["tar"][sample][0]
            np.testing.assert_allclose(values, found["tar"][sample][1], rtol=1e-5, atol=1e-6 if kind in ("folders", "v2") else 0)  # those two have an order of their own
    assert len(found["tar"]) == 12
    assert (np.asarray(Image.open(io.BytesIO(pngs[3]))) == images[3]).all()


def test_devkit_has_an_option_and_no_meaning_elsewhere(tmp_path):
    shards.write_shard(tmp_path / "a.tar", [0])
    ended = tiny.call("extract", "--run", tmp_path / "run", "--dataset", "val", "--source", tmp_path / "a.tar", "--model", tiny.MODEL, "--devkit", "x")
    assert ended.code == 2 and "--devkit" in ended.err and not (tmp_path / "run").exists()
