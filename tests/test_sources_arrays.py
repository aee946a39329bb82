"""Arrays of numpy as CIFAR-10.1 has them, and .npz: exact pixels, labels beside, and nothing inside a file is ever run."""

import io
import os
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import BadRequest
from pipeline.sources import open_source


def pictures(count, seed=0, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def write(folder, form, images, labels, stem="cifar10.1_v6"):
    """form: npy, stored npz, or packed npz. Returns the file with the images."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "npy":
        np.save(folder / f"{stem}_data.npy", images)
        np.save(folder / f"{stem}_labels.npy", labels)
        return folder / f"{stem}_data.npy"
    (np.savez if form == "npz" else np.savez_compressed)(folder / f"{stem}.npz", images=images, labels=labels)
    return folder / f"{stem}.npz"


FORMS = ["npy", "npz", "npz packed"]


def all_of(spec):
    source, names = open_source(str(spec))
    return [s for name in names for s in shards.samples(source, name)]


def pixels(raw):
    return np.asarray(Image.open(io.BytesIO(raw.image)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i4"])
def test_pixels_labels_and_ids_are_exact(tmp_path, form, dtype):
    images, labels = pictures(150), np.arange(150) % 10
    path = write(tmp_path, form, images, labels.astype(dtype))
    got = all_of(path)
    assert [s.sample_id for s in got] == [f"{path.stem}/{i:06d}" for i in range(150)] and [s.label for s in got] == labels.tolist()
    assert all((pixels(s) == image).all() for s, image in zip(got, images))


@pytest.mark.parametrize("form", FORMS)
def test_folder_and_pattern_name_the_files_of_images(tmp_path, form):
    """Files of labels are no shards of their own."""
    for i in range(2):
        write(tmp_path / f"v{i}", form, pictures(3, i), np.array([i] * 3))
    source, names = open_source(str(tmp_path))
    assert source.kind == "arrays" and len(names) == 2 and [s.label for s in all_of(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert all_of(tmp_path / "v*/*.np?") == all_of(tmp_path)


@pytest.mark.parametrize("images, labels", [("a_data.npy", "a_labels.npy"), ("images.npy", "labels.npy"), ("test_images.npy", "test_labels.npy"), ("set.npy", "set_labels.npy"), ("pix.npy", "labels.npy"), ("data_data.npy", "data_labels.npy")])
def test_labels_are_found_beside(tmp_path, images, labels):
    np.save(tmp_path / images, pictures(2))
    np.save(tmp_path / labels, np.array([[4], [2]]))
    assert [s.label for s in all_of(tmp_path / images)] == [4, 2]


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.array([1.0, 2.0]), r"its labels are float64 \(2,\), not 2 whole numbers: save them as int64"),
        (np.array(["1", "2"]), r"its labels are <U1 \(2,\), not 2 whole numbers: save them as int64"),
        (np.eye(2, 10, dtype=int), r"its labels are int64 \(2, 10\), not 2 whole numbers: save the argmax\(1\) of them"),
        (np.array([1, None], object), r"its labels \(.*labels.npy\) cannot be used: it holds Python objects"),
        (np.array([1, 2, 3]), r"its labels are int64 \(3,\), not 2 whole numbers"),
    ],
)
@pytest.mark.parametrize("form", ["npy", "npz"])
def test_labels_that_cannot_be_used_are_said_to_be_so(tmp_path, labels, message, form):
    """Not that there were none, and not that they are bad images."""
    write(tmp_path, form, pictures(2), labels)
    source, (name,) = open_source(str(tmp_path))
    with pytest.raises(BadRequest, match=rf"cifar10.1_v6(_data)?.np. cannot be read: {message}"):
        source.census(name)


def test_two_versions_of_one_data_set_are_refused(tmp_path):
    """CIFAR-10.1 is published as v4 and v6, which share most of their images."""
    for version in ("v4", "v6"):
        write(tmp_path, "npy", pictures(2), np.array([1, 2]), f"cifar10.1_{version}")
    with pytest.raises(BadRequest, match=r"holds several versions of one data set \(cifar10.1_v4_data.npy, cifar10.1_v6_data.npy\): name one, for example '.*/cifar10.1_v6_data.npy'"):
        open_source(str(tmp_path))
    assert len(all_of(tmp_path / "cifar10.1_v6*")) == 2


@pytest.mark.parametrize("keys", [("images", "labels"), ("data", "labels"), ("x", "y"), ("x_test", "y_test")])
def test_names_inside_an_npz(tmp_path, keys):
    np.savez(tmp_path / "a.npz", **{keys[0]: pictures(2), keys[1]: [1, 2], "more": [0]})
    assert [s.label for s in all_of(tmp_path / "a.npz")] == [1, 2]


@pytest.fixture(scope="module", params=FORMS)
def long(request, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("long"), request.param, pictures(400, size=(8, 6)), np.arange(400) % 7)
    source, (name,) = open_source(str(path))
    return source, name, shards.samples(source, name)


@given(bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)))
def test_any_interval_is_a_slice_of_the_whole(long, bounds):
    shards.check_interval(*long, *sorted(bounds))


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_that_of_a_stretch_not_of_the_file(tmp_path, form):
    """Also where one image is large: a stretch has fewer of them."""
    source, (name,) = open_source(str(write(tmp_path, form, pictures(64, size=(500, 500)), np.zeros(64, int))))
    tracemalloc.start()
    shard = source.census(name)
    assert sum(1 for _ in source.read(shard.marks_for(50, 60), name, 50, 60)) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20 < 64 * 750_000


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (pictures(2).astype(np.float32) / 255, [1, 2], r"its images are float32 \(2, 32, 32, 3\), not uint8 \(N, H, W, 3\): save 0..255 as uint8"),
        (pictures(2).transpose(0, 3, 1, 2).copy(), [1, 2], r"its images are uint8 \(2, 3, 32, 32\), .*transpose\(0, 2, 3, 1\)"),
        (pictures(2)[..., 0].copy(), [1, 2], "grey images"),
        (np.asfortranarray(pictures(2)), [1, 2], "Fortran's order; save np.ascontiguousarray"),
        (pictures(2), [1, 2, 3], r"its labels are int64 \(3,\), not 2 whole numbers"),
        (pictures(2), [1.0, 2.0], r"float64 \(2,\), not 2 whole numbers"),
        (pictures(2), [[1, 2], [3, 4]], r"int64 \(2, 2\), not 2 whole numbers"),
        (np.array([{"a": 1}, None], object), [1, 2], r"Python objects \(a pickle\)"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_array_that_does_not_fit_is_refused_in_one_sentence(tmp_path, form, images, labels, message):
    if form == "npy" and "whole numbers" in message:
        message = "there are no labels beside it|" + message
    source, (name,) = open_source(str(write(tmp_path, form, images, np.array(labels))))
    with pytest.raises(BadRequest, match=f"cannot be read: .*({message})") as refusal:
        source.census(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("evil", ["images", "labels"])
def test_pickle_inside_is_not_run(tmp_path, form, evil):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    hostile = np.array([Evil(), Evil()], object)
    path = write(tmp_path / "set", form, hostile if evil == "images" else pictures(2), hostile if evil == "labels" else np.array([1, 2]))
    source, (name,) = open_source(str(path))
    with pytest.raises(BadRequest, match="Python objects|no labels beside"):
        source.census(name)
    assert not (tmp_path / "it ran").exists()


def header(shape, descr="|u1"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\x93NUMPY\x01\x00\xff\xff{", header((10**15, 32, 32, 3)), header((-1, 32, 32, 3)), header((2, 0, 32, 3)), header("__import__('os').mkdir('it ran')"), header((2, 2**40, 2**40, 3)), b"\x93NUMPY\x09\x00" + bytes(20)],
    ids=lambda c: repr(c[:12]),
)
@pytest.mark.parametrize("form", ["npy", "npz"])
def test_damaged_and_hostile_headers_are_refused(tmp_path, form, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a_labels.npy", np.array([1, 2]))
    (tmp_path / "a_data.npy").write_bytes(content)
    path = tmp_path / "a_data.npy"
    if form == "npz":
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "a_data.npy", "images.npy")
            archive.write(tmp_path / "a_labels.npy", "labels.npy")
    source, (name,) = open_source(str(path))
    with pytest.raises(BadRequest, match="cannot be read: "):
        source.census(name)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_cut_or_changed_file_is_refused(tmp_path, form):
    path = write(tmp_path, form, pictures(300), np.zeros(300, int))
    source, (name,) = open_source(str(path))
    shard, whole = source.census(name), path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRequest, match="cannot be read: "):
        source.census(name)
    images = pictures(300)
    images[299, 5, 5, 1] ^= 1
    write(tmp_path, form, images, np.zeros(300, int))
    with pytest.raises(BadRequest, match="is not what it was when it was counted"):
        list(source.read(shard.marks_for(290, 300), name, 290, 300))
    write(tmp_path, form, pictures(300), np.ones(300, int))
    with pytest.raises(BadRequest, match="is not what it was when it was counted"):
        list(source.read(shard.marks_for(0, 3), name, 0, 3))
    assert source.census(name).version != shard.version


def test_what_is_not_there_is_said(tmp_path):
    np.save(tmp_path / "cifar10.1_v6_data.npy", pictures(2))
    source, (name,) = open_source(str(tmp_path))
    with pytest.raises(BadRequest, match="there are no labels beside it: put them into cifar10.1_v6_labels.npy"):
        source.census(name)
    np.savez(tmp_path / "b.npz", pixels=pictures(2))
    source, (name,) = open_source(str(tmp_path / "b.npz"))
    with pytest.raises(BadRequest, match="it holds pixels; name its arrays images and labels"):
        source.census(name)
    np.save(tmp_path / "only_labels.npy", np.array([1, 2]))
    with pytest.raises(BadRequest, match="only_labels.npy holds labels, and nothing in --source holds images"):
        open_source(str(tmp_path / "only_labels.npy"))


def test_real_images_have_the_pixels_of_their_jpegs(tmp_path, data):
    with tarfile.open(data / "cifar10/holdout-00000.tar") as tar:
        real = {m.name: tar.extractfile(m).read() for _, m in zip(range(200), tar)}
    jpegs = [n for n in real if n.endswith(".jpg")]
    images = np.stack([np.asarray(Image.open(io.BytesIO(real[n])).convert("RGB")) for n in jpegs])
    got = all_of(write(tmp_path, "npy", images, np.array([int(real[n.replace(".jpg", ".cls")]) for n in jpegs])))
    assert len(got) == len(jpegs) >= 99 and all((pixels(s) == image).all() for s, image in zip(got, images))
