"""The doctor on real photographs and a trained network: healthy ones pass, and each planted mistake is named."""

from dataclasses import replace

import numpy as np
import pytest
from test_doctor import CLASSES, MISTAKES

from pipeline import doctor, models, wnids
from pipeline.samples import PRESETS
from pipeline.sources import open_source


@pytest.fixture(scope="module")
def photographs(data):
    """(network and preprocessing, a look at 128 of the thousand photographs). The same pixels by the same recipe are classified once."""
    known, classify = {}, doctor._classify

    def remembered(network, recipe, pixels, reverse, *where):
        key = recipe, reverse, pixels[0].tobytes()
        known[key] = known[key] if key in known else classify(network, recipe, pixels, reverse, *where)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_classify", remembered)
        yield looked_at(data)


def looked_at(data):
    classifier = models.load("squeezenet1_1", str(data / "imagenet-sample/squeezenet1_1.safetensors"), None)
    source, names = open_source(str(data / "imagenet-sample"))
    return classifier, doctor.look(source, [source.census(name) for name in names], 128, classifier.preprocessing)


def examine(photographs, given_label=lambda label: label, preprocessing=None, devkit=None, reverse=False):
    classifier, seen = photographs
    samples = [replace(s, label=given_label(s.label), pixels=s.pixels[..., ::-1].copy() if reverse else s.pixels, sample_id=f"photo_{i}") for i, s in enumerate(seen.samples)]
    return doctor.examine(classifier.network, preprocessing or classifier.preprocessing, replace(seen, samples=samples), CLASSES, classifier.promised, devkit)


def test_real_photographs_pass(photographs):
    found = examine(photographs)
    assert not found.faults + found.doubts + found.warnings and 0.5 < found.low < 0.646 < found.high and found.promised == pytest.approx(0.58178)
    assert photographs[1].order.tolist() == photographs[1].labels.tolist()  # their IDs are WordNet IDs


@pytest.mark.parametrize("given_label, mistake, remedy", MISTAKES.values(), ids=list(MISTAKES))
def test_wrong_labels_of_real_photographs(photographs, given_label, mistake, remedy):
    found = examine(photographs, given_label)
    assert found.mistake.name == mistake and found.top1 < 0.05 and found.undone > 0.55 and remedy in found.faults[0]


def test_devkit_order_of_real_photographs(photographs):
    order = np.random.default_rng(1).permutation(CLASSES)
    found = examine(photographs, lambda label: int(order[label]) + 1, devkit={int(i) + 1: wnids.IDS[label] for label, i in enumerate(order)})
    assert found.mistake.name == "devkit order" and found.undone > 0.55


@pytest.mark.parametrize(
    "mistake, change",
    [
        ("RGB/BGR", {"reverse": True}),
        ("missing normalisation", {"preprocessing": replace(PRESETS["imagenet"], mean=(0.0,) * 3, std=(1.0,) * 3)}),
    ],
)
def test_pixels_of_real_photographs(photographs, mistake, change):
    found = examine(photographs, **change)
    assert found.mistake.name == mistake and found.undone > 0.55 > found.top1 + 0.05
