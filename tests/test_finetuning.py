"""Normalised steps and their effect on other images, many updates in one forward, against copies that are updated and asked one image at a time."""

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
from pipeline.interventions import choice, finetuning, pruning, transfer
from pipeline.interventions.finetuning import NOTHING, SCOPES, Gradient, Group, Tuner, take, written
from pipeline.interventions.transfer import Case, transfers

EVERY = [a for a in zoo.ZOO + menagerie.MORE if a.id != "batch-statistics"]
ANIMALS = [pytest.param(animal, id=animal.id) for animal in EVERY]
IN_PLACE = {"weight-through-batchnorm", "standardised-weight", "transposed-weight", "parametrised", "transposed-convolution", "no-kernel", "patches"}  # the weight is no kernel, or its filters have no map


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@functools.cache
def made(animal) -> tuple[nn.Module, FilterLayout, Tuner]:
    network = animal.make().double()
    layout = FilterLayout.of(network)
    return network, layout, Tuner(network, layout, zoo.images()[0].double())


def naive(network, images, labels, sample, columns, rate, scope, chosen) -> np.ndarray:
    copy = oracles.stepped(network, images[sample], int(labels[sample]), columns, rate, scope)
    return np.stack([oracles.alone(copy, images[i]) for i in chosen])


# ---- right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("animal", ANIMALS)
def test_is_the_updated_copy(animal, scope):
    """Steps of several samples, on one filter to all of them and on the whole network, at several rates, each on its own images."""
    network, layout, tuner = made(animal)
    images, labels = zoo.images()
    images, rng = images.double(), np.random.default_rng(0)
    asked, groups = [], []
    for sample in range(3):
        gradient = Gradient(network, layout, images[sample], int(labels[sample]))
        for count in (1, 2, layout.total):
            columns = rng.choice(layout.total, min(count, layout.total), replace=False)
            for rate in (0.1, 2.0):
                chosen = rng.integers(0, 5, int(rng.integers(1, 5)))
                asked.append((sample, columns.tolist(), rate, scope, chosen))
                groups.append(Group(gradient.step(columns, scope), rate, torch.from_numpy(chosen)))
        for which in ("all", "conv") if scope == "global" else ("conv",):
            asked.append((sample, which, 0.7, scope, np.arange(5)))
            groups.append(Group(gradient.whole(which, scope), 0.7, torch.arange(5)))
    for got, (sample, columns, rate, scope, chosen) in zip(tuner.logits(images, groups), asked):
        np.testing.assert_allclose(got, naive(network, images, labels, sample, columns, rate, scope, chosen), rtol=1e-8, atol=1e-8)


def test_groups_larger_than_a_batch(monkeypatch):
    """They are cut, and put together again."""
    network, layout, tuner = made(menagerie.MORE[4])
    images, gradient = zoo.images()[0].double(), Gradient(network, layout, zoo.images()[0][0].double(), 1)
    groups = [Group(step, 0.5, torch.arange(40) % 5) for step in (gradient.step(np.array([3, 9])), gradient.whole("all"), gradient.step(np.array([14])))]
    whole = tuner.logits(images, groups)
    monkeypatch.setattr(pruning, "PIXELS", {"cpu": 0})
    for a, b in zip(tuner.logits(images, groups), whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_steps_move_the_logits():
    """So that agreement with the copy means something, and scopes and sets of filters are told apart."""
    network, layout, tuner = made(menagerie.MORE[4])
    images, labels = zoo.images()
    images, gradient = images.double(), Gradient(network, layout, zoo.images()[0][0].double(), 1)
    steps = [NOTHING, gradient.step(np.arange(5)), gradient.step(np.arange(5), "filter"), gradient.step(np.arange(6)), gradient.whole("conv"), gradient.whole("all")]
    logits = tuner.logits(images, [Group(step, 0.5, torch.arange(5)) for step in steps])
    for i, a in enumerate(logits):
        assert all(float((a - b).abs().max()) > 1e-4 for b in logits[i + 1 :])


def test_step_has_length_one():
    network, layout, _ = made(menagerie.MORE[4])
    gradient = Gradient(network, layout, zoo.images()[0][0].double(), 1)
    length = lambda step: sum(float(p.direction.square().sum()) for p in step.parts) ** 0.5  # noqa: E731
    assert length(gradient.step(np.array([7, 2, 15]))) == pytest.approx(1) == length(gradient.whole("all"))
    each = gradient.step(np.array([7, 2, 15]), "filter")
    assert length(each) == pytest.approx((3 - each.unmoved) ** 0.5) and each.unmoved < 2
    assert length(take(network, layout, zoo.images()[0][0].double(), 1, np.array([3]))) == pytest.approx(1)


@pytest.mark.parametrize("animal", ANIMALS)
def test_only_what_is_no_plain_kernel_is_written_in_place(animal):
    _, layout, tuner = made(animal)
    assert (len(tuner.kernels) < len(layout.layers)) == (animal.id in IN_PLACE)


def test_refused_where_images_depend_on_their_batch():
    network = next(a for a in zoo.ZOO if a.id == "batch-statistics").make()
    with pytest.raises(BadRequest, match="an image's logits depend on which images share its batch"):
        Tuner(network, FilterLayout.of(network), zoo.images()[0])


# ---- properties ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_groups_share_a_forward_and_nothing_else(data):
    """Each group's logits are what it gets alone, whoever shares its batch, in whatever order; groups without images or steps included."""
    animal = data.draw(st.sampled_from(EVERY))
    network, layout, tuner = made(animal)
    images, labels = zoo.images()
    images, groups = images.double(), []
    for _ in range(data.draw(st.integers(1, 5))):
        sample = data.draw(st.integers(0, 4))
        gradient = Gradient(network, layout, images[sample], int(labels[sample]))
        columns = data.draw(st.sets(st.integers(0, layout.total - 1), max_size=6))
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, 4), max_size=4)), dtype=torch.int64)
        step = gradient.whole() if data.draw(st.integers(0, 4)) == 0 else gradient.step(np.array(sorted(columns), dtype=np.int64), data.draw(st.sampled_from(SCOPES)))
        groups.append(Group(step, data.draw(st.sampled_from([0.0, 0.3, 1.0])), chosen))
    together = tuner.logits(images, groups)
    order = data.draw(st.permutations(range(len(groups))))
    for i, got in zip(order, tuner.logits(images, [groups[i] for i in order])):
        torch.testing.assert_close(got, together[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tuner.logits(images, [groups[i]])[0], together[i], rtol=1e-9, atol=1e-9)
        assert got.shape == (len(groups[i].images), 5)
        if len(got) and (groups[i].rate == 0 or not groups[i].step.parts):
            torch.testing.assert_close(got, network(images[groups[i].images]).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("animal", ANIMALS)
def test_network_is_left_as_it_was(animal):
    """To the bit, and its parameters ask for gradients as before; float32, where subtracting and adding again would not do."""
    network = animal.make()
    first = next(network.parameters()).requires_grad_(False)
    layout, (images, labels) = FilterLayout.of(network), zoo.images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tuner, gradient = Tuner(network, layout, images), Gradient(network, layout, images[0], int(labels[0]))
    tuner.logits(images, [Group(step, 0.7, torch.arange(5)) for step in (gradient.step(np.arange(layout.total)), gradient.whole("all"), gradient.whole("conv", "filter"))])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not first.requires_grad and all(p.requires_grad for p in network.parameters() if p is not first) and not any(p.grad is not None for p in network.parameters())


def test_what_was_written_is_taken_back_when_the_network_fails():
    network, layout, _ = made(menagerie.MORE[0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ZeroDivisionError), written(network, Gradient(network, layout, zoo.images()[0][0].double(), 1).whole(), 1.0):
        assert not torch.equal(before["2.weight"], network.state_dict()["2.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# ---- no gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_filters_without_gradient_stay_and_are_counted(scope):
    """Of the auxiliary head's four filters none has a gradient; among others they are left alone."""
    network, layout, tuner = made(next(a for a in zoo.ZOO if a.id == "auxiliary"))
    images = zoo.images()[0].double()
    gradient = Gradient(network, layout, images[0], 2)
    none, some = gradient.step(np.array([0, 1, 6, 7]), scope), gradient.step(np.array([0, 3, 7]), scope)
    assert (none.parts, none.unmoved, some.unmoved) == ((), 4, 2)
    torch.testing.assert_close(tuner.logits(images, [Group(none, 5.0, torch.arange(5))])[0], network(images).detach())
    np.testing.assert_allclose(tuner.logits(images, [Group(some, 1.0, torch.arange(5))])[0], naive(network, images, [2], 0, [0, 3, 7], 1.0, scope, range(5)), rtol=1e-9)


def test_smallest_gradient_still_gives_a_step_of_length_one():
    """A sample that is all but sure: float32 squares of its gradient are zero."""
    network = next(a for a in zoo.ZOO if a.id == "batchnorm").make()
    with torch.no_grad():
        network[-1].bias[2] += 75
    layout, (images, _) = FilterLayout.of(network), zoo.images()
    gradient = Gradient(network, layout, images[0], 2)
    assert 0 < float(gradient.parameters["0.0.weight"].abs().max()) < 1e-25
    for scope in SCOPES:
        step = gradient.step(np.array([1]), scope)
        assert float(step.parts[0].direction.norm()) == pytest.approx(1, rel=1e-5) and step.unmoved == 0


def test_no_filters_no_step():
    network, layout, _ = made(menagerie.MORE[4])
    assert Gradient(network, layout, zoo.images()[0][0].double(), 1).step(np.array([], dtype=np.int64)) == NOTHING


def test_wrong_words():
    network, layout, _ = made(menagerie.MORE[4])
    gradient = Gradient(network, layout, zoo.images()[0][0].double(), 1)
    for call, text in ((lambda: gradient.step(np.arange(2), "layer"), "'layer' is none of global, filter"), (lambda: gradient.whole("head"), "'head' is none of all, conv"),
                       (lambda: gradient.whole("all", "filter"), "its step has one norm")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError, match=r"network\.eval\(\)"):
        Gradient(zoo.ZOO[0].make().train(), layout, zoo.images()[0][0], 1)


# ---- transfer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_transfer_is_the_naive_loop(scope, monkeypatch):
    animal = menagerie.MORE[4]
    network, layout, tuner = made(animal)
    images, labels = zoo.images(12)
    images, labels, rng = images.double(), labels.numpy(), np.random.default_rng(0)
    live = rng.random(layout.total) > 0.2
    cases = [Case(f"s{i}", i, rng.normal(size=layout.total).astype(np.float32), rng.choice(np.arange(3, 12), 4, replace=False), rng.choice(np.arange(3, 12), 3, replace=False)) for i in range(3)]
    cases.append(Case("lonely", 2, cases[0].standardised, np.array([], dtype=np.int64), np.array([], dtype=np.int64)))
    monkeypatch.setattr(pruning, "PIXELS", {"cpu": 10 * 88})
    table = transfers(tuner, images, labels, cases, live, (1, 4), (0.2, 1.5), scope=scope, seed=5)
    rows = iter(table.to_pylist())
    for case in cases:
        for strategy, ks in (("salient", (1, 4)), ("random_live", (1, 4)), ("least", (1, 4)), ("all", (layout.total,)), ("conv", (layout.total,))):
            for k in ks:
                columns = strategy if strategy in ("all", "conv") else choice.choose(strategy, k, case.standardised, live, 5, case.sample_id).tolist()
                for rate in (0.2, 1.5):
                    row, own = next(rows), "global" if strategy == "all" else scope
                    assert (row["sample_id"], row["strategy"], row["k"], row["rate"]) == (case.sample_id, strategy, k, rate)
                    copy = oracles.stepped(network, images[case.place], int(labels[case.place]), columns, rate, own)
                    after = {i: oracles.softmax(oracles.alone(copy, images[i])) for i in [case.place, *case.neighbours, *case.controls]}
                    gain = {i: p[labels[i]] - oracles.softmax(oracles.alone(network, images[i]))[labels[i]] for i, p in after.items()}
                    right = {i: p.argmax() == labels[i] for i, p in after.items()}
                    assert row["corrected"] == right[case.place] and row["confidence_change"] == pytest.approx(gain[case.place], abs=1e-8)
                    if case.sample_id == "lonely":
                        assert row["neighbors_corrected"] is row["neighbors_confidence_change"] is row["broken"] is None
                        continue
                    assert row["neighbors_corrected"] == pytest.approx(np.mean([right[i] for i in case.neighbours]))
                    assert row["neighbors_confidence_change"] == pytest.approx(np.mean([gain[i] for i in case.neighbours]), abs=1e-8)
                    assert row["broken"] == pytest.approx(np.mean([not right[i] for i in case.controls]))
    assert next(rows, None) is None


def test_transfer_of_no_cases():
    network, layout, tuner = made(menagerie.MORE[4])
    table = transfers(tuner, zoo.images()[0].double(), zoo.images()[1].numpy(), [], np.ones(layout.total, bool), (1,), (0.5,))
    assert table.num_rows == 0 and table.schema == transfer.TRANSFERS


def test_real_network(data):
    """resnet20 on photographs, in float32, against updated copies in float64."""
    from test_real_data import batch

    classifier = models.load("resnet20", str(data / "cifar10/resnet20.safetensors"), None)
    images, labels = batch(data, "cifar10/val-00000.tar", 6, classifier)
    network, layout = classifier.network, FilterLayout.of(classifier.network)
    tuner, rng, asked, groups = Tuner(network, layout, images), np.random.default_rng(0), [], []
    for sample in range(2):
        gradient = finetuning.Gradient(network, layout, images[sample], int(labels[sample]))
        for columns in (*(rng.choice(layout.total, k, replace=False) for k in (1, 20)), "conv", "all"):
            asked.append((sample, columns if isinstance(columns, str) else columns.tolist()))
            groups.append(Group(gradient.whole(columns) if isinstance(columns, str) else gradient.step(columns), 0.5, torch.arange(6)))
    for got, (sample, columns) in zip(tuner.logits(images, groups), asked):
        np.testing.assert_allclose(got, naive(network, images, labels, sample, columns, 0.5, "global", range(6)), rtol=1e-2, atol=1e-2)
    assert len(tuner.kernels) == len(layout.layers)
