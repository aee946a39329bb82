"""The engines against the float64 loop on real photographs and trained networks, and what others published about them."""

import json

import numpy as np
import oracles
import pytest
import torch

from pipeline import models
from pipeline.filters import FilterLayout
from pipeline.saliency import choose_engine, make_engine, prepare_process
from pipeline.samples import decode
from pipeline.sources import open_source
from pipeline.statistics import import_published


def batch(data, shard, count, classifier):
    """(images float32 [count, 3, H, W], labels) of the first samples of a shard, read as a run reads them."""
    source, (name,) = open_source(str(data / shard))
    samples = [decode(raw, classifier.preprocessing, len(classifier.class_names)) for raw in source.read(source.census(name).marks, name, 0, count)]
    assert not [s.reason for s in samples if s.reason]
    return classifier.preprocessing.normalise(torch.from_numpy(np.stack([s.pixels for s in samples]))), torch.tensor([s.label for s in samples])


@pytest.mark.parametrize("engine", ["fused", "vmap"])
@pytest.mark.parametrize(
    "model, weights, shard, count, bound",
    [
        ("resnet20", "cifar10/resnet20.safetensors", "cifar10/val-00000.tar", 16, 1e-4),
        ("squeezenet1_1", "imagenet-sample/squeezenet1_1.safetensors", "imagenet-sample/sample-00000.tar", 4, 5e-3),
    ],
    ids=["resnet20", "squeezenet1_1"],
)
def test_real_images(data, engine, model, weights, shard, count, bound):
    """90% of the samples within the interface's bound, all of them within ten times that."""
    prepare_process(2, "fp32")
    classifier = models.load(model, str(data / weights), None)
    images, labels = batch(data, shard, count, classifier)
    assert choose_engine(classifier.network, images[:2])[0] == "fused"
    got = make_engine(engine, classifier.network, "abs")(images, labels)
    errors = oracles.relative_errors(got.saliency, truth(data, model, classifier, images, labels))
    assert np.quantile(errors, 0.9) < bound and errors.max() < 10 * bound
    assert (got.logits.argmax(1) == labels).float().mean() >= 0.5


@pytest.mark.parametrize("engine, size", [*(("fused", size) for size in (1, 2, 3, 4, 10, 32)), ("vmap", 1)])
def test_batches_of_another_size_give_the_same(data, engine, size):
    """To 1e-5, every sample of 320: an image that is alone is computed as torch computes several, whichever team has it."""
    prepare_process(2, "fp32")
    classifier = models.load("resnet20", str(data / "cifar10/resnet20.safetensors"), None)
    images, labels = batch(data, "cifar10/val-00003.tar", 320, classifier)
    made = make_engine(engine, classifier.network, "abs")
    whole = made(images, labels).saliency.double()
    parts = torch.cat([made(*of).saliency for of in zip(images.split(size), labels.split(size))]).double()
    assert ((parts - whole).norm(dim=1) / whole.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("key", ["truck_0452", "automobile_0416", "truck_0651"])
def test_the_engine_does_not_depend_on_which_image_comes_first(data, key):
    """On these a float32 ReLU of resnet56 decides otherwise in one right engine than in the other."""
    classifier = models.load("resnet56", str(data / "cifar10/resnet56.safetensors"), None)
    source, (name,) = open_source(str(data / "cifar10/val-00000.tar"))
    shard = source.census(name)
    sample = next(s for s in source.read(shard.marks, name, 0, shard.samples) if s.sample_id == key)
    images = classifier.preprocessing.normalise(torch.from_numpy(np.stack([decode(sample, classifier.preprocessing, 10).pixels] * 2)))
    assert choose_engine(classifier.network, images)[0] == "fused"


TRUTHS = {}


def truth(data, model, classifier, images, labels):
    """The slow loop, once for both engines."""
    if model not in TRUTHS:
        TRUTHS[model] = oracles.saliency(classifier.network, images, labels, "abs")
    return TRUTHS[model]


@pytest.mark.parametrize("model", ["resnet50", "vgg19", "densenet121", "inception_v3"])
def test_published_statistics_fit_their_network_alone(data, model):
    from pipeline.errors import BadRequest

    with torch.device("meta"):
        layout = FilterLayout.of(models.build(model))
    path = data / f"published/ImageNet_val_saliency_stat_{model}_filter_wise.pth"
    got = import_published(path, "signed", layout)
    assert got.mean.shape == got.std.shape == (layout.total,) and got.live.mean() > 0.9
    with pytest.raises(BadRequest, match=f"is about {layout.total} filters, this run's network has 3: it belongs to another model"):
        import_published(path, "signed", FilterLayout((("conv", 3),)))


def test_shards_are_counted_without_decoding(data):
    """All twelve, without one image opened; no image of val is in the holdout."""
    ids = {}
    for name, count in (("val", 8000), ("holdout", 2000)):
        source, names = open_source(str(data / f"cifar10/{name}-*.tar"))
        censuses = [source.census(n) for n in names]
        assert sum(shard.samples for shard in censuses) == count and json.dumps([shard.marks for shard in censuses])
        ids[name] = {raw.sample_id for shard in censuses[:1] for raw in source.read(shard.marks, shard.name, 0, 200)}
    assert not ids["val"] & ids["holdout"]
