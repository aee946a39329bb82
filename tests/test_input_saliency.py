"""Input saliency against central differences of a naive float64 distance, on every small network; and how it is drawn."""

from __future__ import annotations

import copy

import numpy as np
import oracles
import pytest
import torch
import zoo
from scipy import ndimage

from pipeline.errors import BadRequest
from pipeline.explanation.heat import display, heat
from pipeline.explanation.input_saliency import InputSaliency, boosted
from pipeline.saliency import products
from pipeline.statistics import Reference

ANIMALS = [animal for animal in zoo.ZOO if animal.id != "no-grad-stem"]
STEP = 1e-6  # of the central differences, in float64
DEAD = 2  # the column of a filter that never differed


def reference_of(network: torch.nn.Module, aggregation: str = "abs") -> Reference:
    """mu and sigma over seven images; one filter is made dead."""
    rows = oracles.saliency(network, *zoo.images(7, 9), aggregation)
    mean, std = oracles.mean_and_std(rows)
    std[DEAD] = 0
    return Reference(mean, std, 7, aggregation, "test")


def distance(network, image: np.ndarray, label: int, reference: Reference, target: np.ndarray) -> float:
    """1 - cosine of ŝ(x) and a fixed target, from the naive saliency of one image."""
    row = oracles.saliency(network, torch.from_numpy(image)[None], torch.tensor([label]), reference.aggregation)
    profile = oracles.standardise(row, reference.mean, reference.std)[0]
    return 1 - profile @ target / np.sqrt((profile @ profile) * (target @ target))


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.id)
@pytest.mark.parametrize("aggregation", ["abs", "signed"])
def test_is_the_derivative_of_the_distance(animal, aggregation):
    network = animal.make().double()
    reference = reference_of(network, aggregation)
    images, labels = zoo.images(2, 4)
    images, columns = images.double(), [np.array([0, 1]), np.array([3])]
    found = InputSaliency(network, reference, aggregation)(images, labels, columns)
    for row, chosen in enumerate(columns):
        profile = oracles.standardise(oracles.saliency(network, images[row : row + 1], labels[row : row + 1], aggregation), reference.mean, reference.std)[0]
        assert np.allclose(found.standardised[row].numpy(), profile, rtol=1e-9, atol=1e-9) and profile[DEAD] == 0
        target = profile.copy()
        target[chosen] *= 100
        assert found.distance[row].item() == pytest.approx(distance(network, images[row].numpy(), labels[row], reference, target), abs=1e-10)
        largest = found.maps[row].max().item()
        for at in np.random.default_rng(row).integers((3, 11, 8), size=(4, 3)):
            up, down = images[row].numpy().copy(), images[row].numpy().copy()
            up[tuple(at)] += STEP
            down[tuple(at)] -= STEP
            slope = (distance(network, up, labels[row], reference, target) - distance(network, down, labels[row], reference, target)) / (2 * STEP)
            assert found.maps[row][tuple(at)].item() == pytest.approx(abs(slope), rel=1e-4, abs=1e-6 * largest + 1e-8)


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.id)
def test_float32_is_close_to_float64_and_the_network_is_left_alone(animal):
    network = animal.make().requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    reference, (images, labels) = reference_of(network), zoo.images(2, 4)
    columns = [np.array([0, 1])] * 2
    truth = InputSaliency(copy.deepcopy(network).double(), reference)(images.double(), labels, columns).maps
    kept = images.clone()
    maps = InputSaliency(network, reference)(images, labels, columns).maps
    assert (maps - truth).norm() <= 2e-3 * truth.norm() + 1e-6
    assert torch.equal(images, kept) and not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("matrices", [True, False], ids=["im2col", "grouped convolution"])
@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.id)
@pytest.mark.parametrize("aggregation", ["abs", "signed"])
def test_a_batch_is_its_images(animal, aggregation, matrices, monkeypatch):
    """Whichever product leads back through a layer, and however many samples it takes at once."""
    network = animal.make().double()
    reference, (images, labels) = reference_of(network, aggregation), zoo.images(5, 4)
    images, columns = images.double(), [np.array([row % 2]) for row in range(5)]
    monkeypatch.setattr(products, "_way", lambda input, gradient, geometry: (matrices and geometry[-1] == 1, [slice(at, at + 2) for at in range(0, len(input), 2)]))
    engine = InputSaliency(network, reference, aggregation)
    together = engine(images, labels, columns)
    assert bool(engine._fused) == (animal.engine == "fused"), "images go through together where the fused engine is exact"
    for row in range(5):
        alone = engine(images[row : row + 1], labels[row : row + 1], columns[row : row + 1])
        for got, wanted in zip(together[:4], alone[:4]):
            torch.testing.assert_close(got[row], wanted[0], rtol=1e-7, atol=1e-9 * float(wanted.abs().max()) + 1e-15)


class Moody(torch.nn.Module):
    """Uses its weight once more for bright images."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(3, zoo.CLASSES)

    def forward(self, x):
        y = self.conv(x).relu()
        return self.fc((self.conv(y) if x.mean() > 5 else y).mean((2, 3)))


def test_a_network_that_changes_its_mind_is_asked_image_by_image():
    torch.manual_seed(0)
    network = Moody().eval().double()
    reference, (images, labels) = Reference(np.zeros(3), np.ones(3), 7, "abs", "test"), zoo.images(2, 4)
    engine, columns = InputSaliency(network, reference), [np.array([0]), np.array([1])]
    engine(images.double(), labels, columns)
    assert engine._fused
    bright = images.double() + 10
    found = engine(bright, labels, columns)
    alone = [InputSaliency(network, reference)(bright[row : row + 1], labels[row : row + 1], columns[row : row + 1]) for row in range(2)]
    assert torch.allclose(found.maps, torch.cat([one.maps for one in alone])) and found.maps.any()


class Single(torch.nn.Module):
    """A network that computes in float32 alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("float32 alone")
        return self.network(x)


@pytest.mark.parametrize("animal", [a for a in ANIMALS if a.engine == "fused"][:4], ids=lambda animal: animal.id)
def test_a_map_where_one_filter_outweighs_all_is_not_rounding(animal):
    """The distance is then 1e-5 and less, of which float32 has a digit or two; a network that cannot be asked in float64 has a coarse map, and that is said."""
    network = animal.make()
    reference, (images, labels) = reference_of(network), zoo.images(2, 4)
    std = reference.std.copy()
    std[1] *= 1e-5
    reference, columns = Reference(reference.mean, std, 7, "abs", "test"), [np.array([1])] * 2
    truth = InputSaliency(copy.deepcopy(network).double(), reference)(images.double(), labels, columns)
    assert truth.distance.max() < 1e-5 and not truth.coarse.any()
    found = InputSaliency(network, reference)(images, labels, columns)
    assert found.maps.dtype == torch.float32 and not found.coarse.any()
    assert (found.maps - truth.maps).norm() <= 1e-5 * truth.maps.norm() and torch.allclose(found.distance.double(), truth.distance, rtol=1e-5, atol=0)
    alone = InputSaliency(Single(network).eval(), reference)(images, labels, columns)
    assert alone.coarse.all() and (alone.maps - truth.maps).norm() > 1e-3 * truth.maps.norm()
    assert InputSaliency(Single(network).eval(), reference).smooth(images, labels, columns, 100.0, 2, 0.1, 0).coarse.all()
    assert not InputSaliency(Single(network).eval(), reference_of(network))(images, labels, [np.array([0])] * 2).coarse.any()


def test_what_is_asked_for_matters_and_what_cannot_be_is_refused():
    network = next(a for a in zoo.ZOO if a.engine == "fused").make()
    reference, (images, labels) = reference_of(network), zoo.images(1, 4)
    engine = InputSaliency(network, reference)
    one, other = (engine(images, labels, [np.array([column])]).maps for column in (0, 1))
    assert not torch.allclose(one, other)
    alone = engine(images, labels, [np.array([0])], boost=1.0 + 1e-9)
    assert alone.distance.abs().item() < 1e-6, "nothing is boosted, so that the target is the profile itself"
    with pytest.raises(ValueError, match="aggregated as 'abs', not 'signed'"):
        InputSaliency(network, reference, "signed")
    with pytest.raises(ValueError, match="eval mode"):
        InputSaliency(copy.deepcopy(network).train(), reference)
    with pytest.raises(ValueError, match="filters"):
        InputSaliency(network, Reference(reference.mean[1:], reference.std[1:], 7, "abs", "test"))


def test_a_network_that_keeps_gradients_from_its_input_is_refused():
    """Its map would be nothing at all, and look as if no pixel mattered."""
    network = next(a for a in zoo.ZOO if a.id == "no-grad-stem").make()
    images, labels = zoo.images(1, 4)
    with pytest.raises(BadRequest, match="keeps gradients from its input"):
        InputSaliency(network, reference_of(network))(images, labels, [np.array([0])])


class Hard(torch.nn.Module):
    """torch knows no derivative of the backward pass of the hard sigmoid, and called like this it is not seen."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, zoo.CLASSES)

    def forward(self, x):
        return self.fc(torch.ops.aten.hardsigmoid(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_that_cannot_be_differentiated_twice_is_refused(count):
    network, (images, labels) = Hard().eval(), zoo.images(3)
    with pytest.raises(BadRequest, match="cannot differentiate the network twice .aten::hardsigmoid_backward has no derivative"):
        InputSaliency(network, Reference(np.zeros(4), np.ones(4), 7, "abs", "test"))(images[:count], labels[:count], [np.array([0])] * count)


def test_noisy_copies_are_averaged_and_the_same_again():
    network = next(a for a in zoo.ZOO if a.engine == "fused").make()
    reference, (images, labels) = reference_of(network), zoo.images(2, 4)
    engine, columns = InputSaliency(network, reference), [np.array([0, 1])] * 2
    maps = engine.smooth(images, labels, columns, 100.0, 2, 0.3, 5).maps
    noisy = [engine(0.7 * images + 0.3 * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(5 * 100_003 + draw)), labels, columns).maps for draw in range(2)]
    assert torch.allclose(maps, (noisy[0] + noisy[1]) / 2)
    assert torch.equal(maps, engine.smooth(images, labels, columns, 100.0, 2, 0.3, 5).maps)
    assert not torch.allclose(maps, engine.smooth(images, labels, columns, 100.0, 2, 0.3, 6).maps)


def test_boosted_multiplies_the_chosen_alone():
    assert boosted(torch.tensor([1.0, -2.0, 3.0]), np.array([1]), 100).tolist() == [1, -200, 3]


def test_drawn_by_the_authors_recipe():
    """Channel maximum, 90th and 99th percentile, 3 x 3 blur: beside numpy and scipy."""
    maps = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    for got, one in zip(display(heat(maps)), maps.numpy().max(1)):
        low, high = np.percentile(one, [90, 99])
        clipped = (np.clip(one, low, high) - low) / (high - low)
        assert np.allclose(got, ndimage.convolve(clipped, np.outer([1, 2, 1], [1, 2, 1]) / 16, mode="nearest"), atol=1e-5)
    assert not display(torch.zeros(1, 4, 5)).any(), "a map without any spread shows nothing"
