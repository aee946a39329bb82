"""The demo's data set: what is on the disk is what was promised, disjoint, reproducible, and as accurate as it says."""

import os
import tarfile

import numpy as np
import pytest
import torch

from jobs import digits
from pipeline import models
from pipeline.errors import BadRequest
from pipeline.models import file_sha256
from pipeline.samples import decode
from pipeline.sources import open_source
from pipeline.atomic import replace_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return digits.write(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture(scope="module")
def read(made):
    """Data set -> its raw samples, as an extraction would read them."""
    samples = {}
    for dataset in made.samples:
        reader, names = open_source(made.source(dataset))
        shards = [reader.census(name) for name in names]
        samples[dataset] = [s for shard in shards for s in reader.read(shard.marks, shard.name, 0, shard.samples)]
    return samples


def test_what_is_written_is_what_was_said(made, read):
    assert [p.name for p in made.shards("val")] == ["val-00000.tar", "val-00001.tar", "val-00002.tar"]
    assert [p.name for p in made.shards("v2")] == ["v2-00000.tar", "v2-00001.tar"]
    assert {name: len(samples) for name, samples in read.items()} == made.samples == {"val": 1098, "v2": 549}
    assert made.trained_on == 150
    assert sorted(p.name for p in made.folder.iterdir()) == sorted([digits.MARKER, *(p.name for p in digits._files(made))])
    assert not [s for samples in read.values() for s in samples if s.fault]


def test_no_image_is_in_two_places_and_none_was_trained_on(read):
    from sklearn.datasets import load_digits

    ids = {name: {s.sample_id for s in samples} for name, samples in read.items()}
    assert len(ids["val"]) == 1098 and len(ids["v2"]) == 549 and not ids["val"] & ids["v2"]
    target = load_digits().target
    trained = set(range(1797)) - {int(i.removeprefix("digit_")) for i in ids["val"] | ids["v2"]}
    assert np.bincount(target[sorted(trained)]).tolist() == [15] * 10
    pixels = {s.image for samples in read.values() for s in samples}
    images = digits._images()
    assert len(pixels) == 1647 and not pixels & {images[i].image for i in trained}


def test_ids_labels_and_pixels_belong_together(read):
    from sklearn.datasets import load_digits

    source = load_digits()
    for sample in [*read["val"][::97], *read["v2"][::53]]:
        i = int(sample.sample_id.removeprefix("digit_"))
        assert sample.label == source.target[i]
        pixels = decode(sample, digits.DigitsNet.preprocessing, 10).pixels.astype(float)
        assert pixels.shape == (32, 32, 3)
        small = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), source.images[i].ravel())[0, 1] > 0.97


def test_the_restored_network_is_as_accurate_as_stated(made, read):
    network = models.restore(digits.MODEL, made.weights)
    for dataset, samples in read.items():
        decoded = [decode(s, network.preprocessing, 10) for s in samples]
        with torch.no_grad():
            logits = network(network.preprocessing.normalise(torch.from_numpy(np.stack([d.pixels for d in decoded]))))
        wrong = (logits.argmax(1).numpy() != [d.label for d in decoded]).sum()
        assert abs(int(wrong) - made.errors[dataset]) <= 1  # another batch size may turn a tie
    assert made.accuracy == 1 - sum(made.errors.values()) / 1647


def test_it_errs_often_enough_to_have_error_modes(made):
    assert 80 <= sum(made.errors.values()) <= 330
    assert min(made.errors.values()) >= 15


def test_the_command_line_finds_preprocessing_and_names_in_the_network(made):
    classifier = models.load(digits.MODEL, str(made.weights), None)
    assert classifier.preprocessing == digits.DigitsNet.preprocessing
    assert classifier.class_names == tuple("0123456789")
    assert classifier.weights_sha256 == file_sha256(made.weights)


def test_a_finished_folder_is_taken_as_it_is(made):
    before = {p.name: (p.stat().st_mtime_ns, file_sha256(p)) for p in made.folder.iterdir()}
    assert digits.write(made.folder) == made
    assert {p.name: (p.stat().st_mtime_ns, file_sha256(p)) for p in made.folder.iterdir()} == before


def test_the_same_seed_gives_the_same_bytes_and_a_damaged_folder_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "EPOCHS", 2)  # the bits, not the accuracy, are at stake
    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = digits.write(tmp_path / "a", seed=3)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = digits.write(tmp_path / "b", seed=3)
    bytes_of = [{p.name: file_sha256(p) for p in made.folder.iterdir()} for made in (first, second)]
    assert bytes_of[0] == bytes_of[1] and first.errors == second.errors

    shard = first.shards("v2")[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    (tmp_path / "b" / digits.MARKER).unlink()
    for made in (first, second):
        assert digits.write(made.folder, seed=3) == made
        assert {p.name: file_sha256(p) for p in made.folder.iterdir()} == bytes_of[0]
    other = digits.write(tmp_path / "a", seed=4)
    assert file_sha256(other.weights) != bytes_of[0]["weights.safetensors"]
    assert digits._finished(tmp_path / "a", 3) is None


def test_tar_bytes_hold_nothing_of_the_machine(made, tmp_path, monkeypatch):
    images = digits._images()[:5]
    old = os.umask(0o077)
    try:
        replace_file(tmp_path / "a.tar", lambda partial: digits._write_shard(partial, images))
    finally:
        os.umask(old)
    monkeypatch.setattr("time.time", lambda: 1e9)
    replace_file(tmp_path / "b.tar", lambda partial: digits._write_shard(partial, images))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(made.shards("val")[0]) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_seed_decides_who_is_in_v2():
    labels = np.array([image.label for image in digits._images()])
    (_, first), (_, again), (_, other) = (digits._split(labels, seed) for seed in (0, 0, 1))
    assert np.array_equal(first["v2"], again["v2"])
    assert not np.array_equal(first["v2"], other["v2"])


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadRequest, match="the digits cannot be written to .*file/digits"):
        digits.write(tmp_path / "file" / "digits")
