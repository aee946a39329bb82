"""Filters turned off, many sets of them in one forward, against copies of the network with edited weights, one image at a time."""

import functools

import intervention_oracles as oracles
import menagerie
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline import models
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.interventions import pruning
from pipeline.interventions.choice import STRATEGIES, choose
from pipeline.interventions.pruning import MODES, Pruner, effects

REFUSED = {
    "transposed-convolution": "the filters of 0.1 cannot be turned off: its weight goes through conv_transpose2d",
    "no-kernel": "the filters of 0.scale cannot be turned off: its weight goes through mul",
    "weight-through-batchnorm": "the filters of 0.2 cannot be turned off: its weight goes through batch_norm together with another layer's",
    "patches": r"the filters of 0.stem cannot be turned off: its convolution sees \[8, 3, 5, 4\], not one map for each of 2 images",
    "batch-statistics": "an image's logits depend on which images share its batch",
}
BY_WEIGHTS = [a for a in zoo.ZOO + menagerie.MORE if a.id not in REFUSED and a.id != "standardised-weight"]  # a kernel of zeros cannot be standardised
ANIMALS = [pytest.param(animal, id=animal.id) for animal in BY_WEIGHTS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def norms(animal) -> dict[str, str]:
    return getattr(animal, "norms", None) or menagerie.NORMS.get(animal.id, {})


@functools.cache
def made(animal, mode: str = "map") -> tuple[nn.Module, Pruner, int]:
    """(network, pruner, F), in float64, so that nothing hides behind rounding."""
    network = animal.make().double()
    layout = FilterLayout.of(network)
    return network, Pruner(network, layout, zoo.images()[0].double(), mode), layout.total


def pairs(filters: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(origin [B], off [B, F]): every filter of a small network alone, no filter, all of them, and random sets."""
    generator = torch.Generator().manual_seed(seed)
    alone = torch.eye(filters, dtype=torch.bool)[torch.randperm(filters, generator=generator)[:12]]
    random = torch.rand(12, filters, generator=generator) < torch.rand(12, 1, generator=generator)
    off = torch.cat([alone, random, torch.zeros(1, filters, dtype=torch.bool), torch.ones(1, filters, dtype=torch.bool)])
    return torch.randint(5, (len(off),), generator=generator), off


# ---- right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("animal", ANIMALS)
def test_is_the_edited_copy(animal, mode):
    network, pruner, filters = made(animal, mode)
    images = zoo.images()[0].double()
    origin, off = pairs(filters)
    got = pruner.logits(images, origin, off)
    for row, (image, chosen) in enumerate(zip(origin.tolist(), off)):
        copy = oracles.pruned(network, chosen.nonzero().flatten().tolist(), norms(animal), mode)
        np.testing.assert_allclose(got[row], oracles.alone(copy, images[image]), rtol=1e-9, atol=1e-9)


def test_modes_differ_by_what_batchnorm_leaves():
    """So that agreement with either oracle means something; without a BatchNorm they are one."""
    images = zoo.images()[0].double()
    animals = {a.id: a for a in BY_WEIGHTS}
    for id, differs in (("batchnorm", True), ("downsampled", True), ("bias", False), ("dense-block", False)):
        got = [made(animals[id], mode)[1].logits(images, *pairs(made(animals[id])[2])) for mode in MODES]
        assert (not torch.allclose(*got)) == differs, id


def test_kernel_that_is_computed_from_its_weight():
    """Weight standardisation: the map is told by hand."""
    network = next(a for a in zoo.ZOO if a.id == "standardised-weight").make().double()
    images = zoo.images()[0].double()
    got = Pruner(network, FilterLayout.of(network), images).logits(images, torch.arange(5), torch.arange(8).expand(5, 8) == 5)

    def without(module, inputs, output):
        output = output.clone()
        output[:, 1] = 0
        return output

    handle = network[0][1].register_forward_hook(without)
    expected = np.stack([oracles.alone(network, image) for image in images])
    handle.remove()
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_float32_is_close():
    network = next(a for a in menagerie.MORE if a.id == "downsampled").make()
    layout, images = FilterLayout.of(network), zoo.images()[0]
    origin, off = pairs(layout.total)
    got = Pruner(network, layout, images).logits(images, origin, off)
    expected = [oracles.alone(oracles.pruned(network, o.nonzero().flatten().tolist(), menagerie.MORE[4].norms, "map"), images[i]) for i, o in zip(origin, off)]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "densenet121"])
def test_torchvision(model):
    """Networks as they are: maps are set by hooks on modules found by name."""
    torch.manual_seed(0)
    network = models.build(model).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    network.double()
    layout, images = FilterLayout.of(network), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pruner = Pruner(network, layout, images)
    modules, following = dict(network.named_modules()), {}
    for name in modules:
        if name.endswith(".0") and isinstance(modules.get(name[:-1] + "1"), nn.BatchNorm2d) and not name.startswith("features.denseblock"):
            following[name] = name[:-1] + "1"
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv0", "norm0"), ("conv1", "norm2")):
            if name.endswith(conv) and (other := name[: -len(conv)] + norm) in modules:
                following[name] = other
        if name.startswith("branch") or ".branch" in name:  # ShuffleNet's: numbered convolutions, each before its BatchNorm
            head, _, number = name.rpartition(".")
            if number.isdigit() and isinstance(modules.get(f"{head}.{int(number) + 1}"), nn.BatchNorm2d):
                following[name] = f"{head}.{int(number) + 1}"
    columns = [0, *(s.start + 1 for s in list(layout.slices.values())[:: len(layout.layers) // 8])]
    off = torch.zeros(len(columns), layout.total, dtype=torch.bool)
    off[torch.arange(len(columns)), columns] = True
    off[-1, columns] = True
    got = pruner.logits(images, torch.arange(len(columns)) % 2, off)
    for row in range(len(columns)):
        handles = []
        for column in off[row].nonzero().flatten().tolist():
            name, channel = layout.locate(column)
            target = modules[following.get(name, name)]
            handles.append(target.register_forward_hook(lambda m, i, out, channel=channel: out.index_fill(1, torch.tensor([channel]), 0)))
        np.testing.assert_allclose(got[row], oracles.alone(network, images[row % 2]), rtol=1e-6, atol=1e-9)
        for handle in handles:
            handle.remove()


# ---- properties ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_batch_is_its_singles_in_any_order(data):
    """Whichever pairs share a batch, in whatever order, images left out or asked for often; sizes from 1 on."""
    animal = data.draw(st.sampled_from(BY_WEIGHTS))
    _, pruner, filters = made(animal)
    images = zoo.images()[0].double()
    count = data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    origin = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    off = torch.rand(count, filters, generator=generator) < torch.tensor(data.draw(st.lists(st.sampled_from([0, 0.05, 0.3, 1]), min_size=count, max_size=count)))[:, None]
    together = pruner.logits(images, origin, off)
    for row in torch.randperm(count, generator=generator).tolist():
        torch.testing.assert_close(together[row : row + 1], pruner.logits(images, origin[row : row + 1], off[row : row + 1]), rtol=1e-9, atol=1e-9)
    order = torch.randperm(count, generator=generator)
    torch.testing.assert_close(together[order], pruner.logits(images, origin[order], off[order]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("animal", ANIMALS)
def test_nothing_off_changes_nothing(animal):
    network, pruner, filters = made(animal)
    images = zoo.images()[0].double()
    torch.testing.assert_close(pruner.logits(images, torch.tensor([3, 0, 3]), torch.zeros(3, filters, dtype=torch.bool)), network(images[[3, 0, 3]]).detach(), rtol=1e-9, atol=1e-9)


def test_everything_off_leaves_no_image():
    network, pruner, filters = made(menagerie.MORE[4])
    got = pruner.logits(zoo.images()[0].double(), torch.arange(5), torch.ones(5, filters, dtype=torch.bool))
    torch.testing.assert_close(got, network[-1].bias.detach().expand(5, -1))


def test_zero_even_where_the_map_is_not_finite():
    """A map of infinities is turned off too: it is set to zero, not multiplied by it."""
    network = zoo.ZOO[1].make()
    with torch.no_grad():
        network[0][2].weight[1] = 1e30
    layout, images = FilterLayout.of(network), zoo.images()[0]
    pruner = Pruner(network, layout, images)
    assert pruner.logits(images * 1e30, torch.arange(5), torch.arange(layout.total).expand(5, -1) >= 6).isfinite().all()


def test_no_pairs():
    _, pruner, filters = made(BY_WEIGHTS[0])
    assert pruner.logits(zoo.images()[0].double(), torch.empty(0, dtype=torch.int64), torch.empty(0, filters, dtype=torch.bool)).shape == (0, 5)


@pytest.mark.parametrize("animal", ANIMALS)
def test_network_is_left_as_it_was(animal):
    network = animal.make().double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    layout, images = FilterLayout.of(network), zoo.images()[0].double()
    logits = network(images.clone()).detach()
    Pruner(network, layout, images).logits(images, *pairs(layout.total))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items()) and torch.equal(network(images.clone()).detach(), logits)
    assert flags == [p.requires_grad for p in network.parameters()] and not any(p.grad is not None for p in network.parameters())


# ---- how it works --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("animal", ANIMALS)
def test_branches_join_late_where_that_is_exact(animal):
    """A branch is computed only from its first change on, unless the network does more with its batch axis than carry it along."""
    network, pruner, filters = made(animal)
    assert pruner.forward.joining == getattr(animal, "joining", True)
    sizes = []
    handles = [m.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))) for m in network.modules() if isinstance(m, nn.Conv2d)]
    off = torch.zeros(7, filters, dtype=torch.bool)
    off[:, -1] = True
    pruner.logits(zoo.images()[0].double(), torch.zeros(7, dtype=torch.int64), off)
    for handle in handles:
        handle.remove()
    if len(pruner.forward.plan.uses) > 2 and pruner.forward.joining:
        assert sizes[0] == 1
    if not pruner.forward.joining:
        assert set(sizes) == {7}


def test_memory_format_is_given_up_where_a_network_needs_its_own():
    viewed, plain = (made(next(a for a in menagerie.MORE if a.id == id))[1].forward for id in ("viewed", "downsampled"))
    assert (viewed.channels_last, plain.channels_last) == (False, True)


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", REFUSED)
def test_refused(id):
    network = next(a for a in zoo.ZOO if a.id == id).make()
    with pytest.raises(BadRequest, match=REFUSED[id]):
        Pruner(network, FilterLayout.of(network), zoo.images()[0])


def test_weight_whose_use_cannot_be_seen():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.secret, self.head = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(2, 3, 1, 1)), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3))) + float(self.secret.detach().numpy().sum())

    network = Hidden().eval()
    with pytest.raises(BadRequest, match="the filters of secret cannot be turned off: it changes the logits, but no use of it can be seen"):
        Pruner(network, FilterLayout.of(network), zoo.images()[0])


def test_filters_that_depend_on_each_other():
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.LazyLinear(5))
    network(zoo.images()[0])
    network.eval()
    with pytest.raises(BadRequest, match="its kernel is computed from its weight, and not filter by filter"):
        Pruner(network, FilterLayout.of(network), zoo.images()[0])


def test_training_mode_and_unknown_mode():
    network = zoo.ZOO[0].make()
    with pytest.raises(ValueError, match="mode is 'zero'; there are map, weights-and-bias"):
        Pruner(network, FilterLayout.of(network), zoo.images()[0], "zero")
    with pytest.raises(ValueError, match=r"network\.eval\(\)"):
        Pruner(network.train(), FilterLayout.of(network), zoo.images()[0])


# ---- effects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_effects_are_the_naive_loop(mode, monkeypatch):
    animal = menagerie.MORE[4]
    network, pruner, filters = made(animal, mode)
    images, labels = zoo.images(7)
    images = images.double()
    rng = np.random.default_rng(0)
    standardised, live = rng.normal(size=(7, filters)).astype(np.float32), rng.random(filters) > 0.3
    ids = [f"sample_{i}" for i in range(7)]
    before = [oracles.softmax(oracles.alone(network.double(), image)) for image in images]
    predictions = np.array([b.argmax() for b in before])
    monkeypatch.setattr(pruning, "PIXELS", {"cpu": 11 * 88})  # batches of eleven: they end in the middle of samples
    ks = (1, 3, filters + 5)
    table = effects(pruner, images, labels.numpy(), predictions, standardised, live, ids, ks, seed=3)
    assert table.schema.names == ["sample_id", "strategy", "k", "wrong_confidence_change", "true_confidence_change", "corrected"]
    rows = iter(table.to_pylist())
    for n in range(7):
        for strategy in STRATEGIES:
            for k in ks:
                off = choose(strategy, k, standardised[n], live, 3, ids[n]).tolist()
                after = oracles.softmax(oracles.alone(oracles.pruned(network, off, animal.norms, mode), images[n]))
                row = next(rows)
                assert (row["sample_id"], row["strategy"], row["k"], row["corrected"]) == (ids[n], strategy, k, after.argmax() == labels[n])
                assert row["wrong_confidence_change"] == pytest.approx(after[predictions[n]] - before[n][predictions[n]], abs=1e-9)
                assert row["true_confidence_change"] == pytest.approx(after[labels[n]] - before[n][labels[n]], abs=1e-9)
    assert next(rows, None) is None


def test_effects_of_no_samples():
    _, pruner, filters = made(menagerie.MORE[4])
    none = np.empty(0, dtype=np.int64)
    table = effects(pruner, torch.empty(0, 3, 11, 8, dtype=torch.float64), none, none, np.empty((0, filters), np.float32), np.ones(filters, bool), [], (1, 2))
    assert table.num_rows == 0 and table.schema == pruning.EFFECTS


def test_real_network(data):
    """resnet20 on photographs, float32, against the edited copy; and its batches against its singles."""
    from test_real_data import batch

    classifier = models.load("resnet20", str(data / "cifar10/resnet20.safetensors"), None)
    images, _ = batch(data, "cifar10/val-00000.tar", 4, classifier)
    network = classifier.network
    layout = FilterLayout.of(network)
    following = {name: name.replace("conv", "bn") for name, _ in layout.layers}
    generator = torch.Generator().manual_seed(0)
    off = torch.stack([torch.zeros(layout.total, dtype=torch.bool).index_fill(0, torch.randperm(layout.total, generator=generator)[:k], True) for k in (0, 1, 5, 20, 100, 400)])
    origin = torch.tensor([0, 1, 2, 3, 0, 1])
    for mode in MODES:
        pruner = Pruner(network, layout, images, mode)
        got = pruner.logits(images, origin, off)
        expected = [oracles.alone(oracles.pruned(network, o.nonzero().flatten().tolist(), following, mode), images[i]) for i, o in zip(origin, off)]
        np.testing.assert_allclose(got, np.stack(expected), rtol=1e-3, atol=1e-3)
        assert {(use.layer, use.norm) for use in pruner.forward.plan.uses} == {(layer, True) for layer in range(len(layout.layers))}
