"""Both engines give the s̄ of a naive float64 loop, for every way in which a convolution is used; and what they leave behind."""

import copy
import functools

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from pipeline import saliency
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout
from pipeline.saliency import check_network, choose_engine, make_engine, objections, vmap
from pipeline.saliency.loss import cross_entropy

CASES = [pytest.param(animal, name, id=f"{animal.id}-{name}") for animal in zoo.ZOO for name in ("fused", "vmap") if name == "vmap" or animal.engine == "fused"]
ANIMALS = [pytest.param(animal, id=animal.id) for animal in zoo.ZOO]


@pytest.fixture(autouse=True, scope="module")
def fp32():
    saliency.prepare_process(1, "fp32")


@functools.cache
def truth(animal: zoo.Animal, aggregation: str) -> np.ndarray:
    return oracles.saliency(animal.make(), *zoo.images(), aggregation)


# ---- right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["abs", "signed"])
@pytest.mark.parametrize("animal, name", CASES)
def test_is_the_naive_loop(animal, name, aggregation):
    network, (images, labels) = animal.make(), zoo.images()
    got = make_engine(name, network, aggregation)(images, labels)
    assert got.saliency.dtype == got.logits.dtype == torch.float32 and got.saliency.shape == (5, FilterLayout.of(network).total)
    errors = oracles.relative_errors(got.saliency, truth(animal, aggregation))
    assert np.median(errors) < 1e-5 and errors.max() < 1e-4
    np.testing.assert_allclose(got.logits, oracles.logits(network, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("animal, name", CASES)
def test_under_autocast_it_is_near_the_naive_loop(animal, name):
    """In bfloat16, of which a number has three digits: no layer of a network is left out or refused."""
    with torch.autocast("cpu", torch.bfloat16):
        got = make_engine(name, animal.make(), "abs")(*zoo.images())
    errors = oracles.relative_errors(got.saliency, truth(animal, "abs"))
    assert got.saliency.dtype == got.logits.dtype == torch.float32 and np.median(errors) < 0.05 and errors.max() < 0.15


def test_aggregations_differ():
    """So that agreement with either oracle means something."""
    animal = zoo.ZOO[0]
    assert (truth(animal, "signed") < 0.9 * truth(animal, "abs")).any() and (truth(animal, "signed") <= truth(animal, "abs") + 1e-12).all()


@pytest.mark.parametrize("name", ["fused", "vmap"])
def test_filters_that_the_loss_ignores_are_exactly_zero(name):
    animal = next(a for a in zoo.ZOO if a.id == "auxiliary")
    got = make_engine(name, animal.make(), "abs")(*zoo.images()).saliency
    assert (got[:, :2] == 0).all() and (got[:, -2:] == 0).all() and (got[:, 2:6] > 0).all()


@pytest.mark.parametrize("animal", ANIMALS)
def test_choice_of_engine(animal):
    """Only those networks go to `fused` for which it is exact, as `test_is_the_naive_loop` shows; the others are told why not."""
    engine, reason = choose_engine(animal.make(), zoo.images(2)[0])
    assert (engine, animal.reason in reason) == (animal.engine, True), reason


def test_choice_depends_on_the_use_not_on_the_class():
    """A Conv2d subclass with another name is fused where it does what a Conv2d does."""

    class Mine(nn.Conv2d):
        pass

    network = nn.Sequential(Mine(3, 4, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    network(zoo.images()[0])
    assert choose_engine(network, zoo.images(2)[0])[0] == "fused"


def test_input_changed_in_place_is_never_answered_in_silence():
    """Here a convolution's input no longer is what it saw: no reverse pass can be right, and none pretends."""

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x)
            x.mul_(2)
            return self.head(y.mean((2, 3)) + x.mean((2, 3)))

    network, (images, labels) = Changed().eval(), zoo.images()
    engine, reason = choose_engine(network, images)
    assert engine == "vmap" and "modified by an inplace operation" in reason
    with pytest.raises(RuntimeError, match="inplace"):
        make_engine("fused", network, "abs")(images, labels)


@pytest.mark.parametrize("id", ["used-twice", "tied-weights", "standardised-weight", "transposed-weight", "no-kernel", "transposed-convolution", "patches"])
def test_fused_refuses_rather_than_answers_in_part(id):
    animal = next(a for a in zoo.ZOO if a.id == id)
    with pytest.raises(RuntimeError, match=r"the fused engine is not exact here: .*; use --engine vmap"):
        make_engine("fused", animal.make(), "abs")(*zoo.images())


# ---- confident samples ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def confident():
    """(network, images, labels): every sample right, with a margin of 20 to 30."""
    animal = next(a for a in zoo.ZOO if a.id == "batchnorm")
    network, (images, labels) = animal.make(), zoo.images(8)
    with torch.no_grad():
        network[-1].bias[2] += 25
    margins = [row[2] - np.delete(row, 2).max() for row in oracles.logits(network, images)]
    assert 20 < min(margins) and max(margins) < 30
    return network, images, torch.full_like(labels, 2)


def naive_float32(network, images, labels) -> np.ndarray:
    """What a float32 loop over torch's own cross-entropy gives: p_y - 1 at the true class."""
    rows, weights = [], [p for p in network.parameters() if p.dim() == 4]
    for image, label in zip(images, labels):
        gradients = torch.autograd.grad(F.cross_entropy(network(image[None]), label[None]), weights)
        rows.append(np.concatenate([g.abs().mean((1, 2, 3)).numpy() for g in gradients]))
    return np.array(rows)


@pytest.mark.parametrize("name", ["fused", "vmap"])
def test_confident_samples_keep_their_precision(name, confident):
    network, images, labels = confident
    truth = oracles.saliency(network, images, labels, "abs")
    assert oracles.relative_errors(make_engine(name, network, "abs")(images, labels).saliency, truth).max() < 1e-4
    assert np.median(oracles.relative_errors(naive_float32(network, images, labels), truth)) > 0.1


def test_loss_is_the_float64_cross_entropy():
    """To float32's last digits from a margin of -60 to one of 60, where log-softmax rounds to 0."""
    margins = torch.linspace(-60, 60, 241)
    logits = torch.stack([margins, torch.zeros(241), torch.full((241,), -3.0)], 1)
    labels = torch.zeros(241, dtype=torch.int64)
    truth = torch.log1p(torch.exp(-logits.double()[:, 0]) + torch.exp(logits.double()[:, 2] - logits.double()[:, 0]))
    torch.testing.assert_close(cross_entropy(logits, labels).double(), truth, rtol=1e-5, atol=0)
    assert (F.cross_entropy(logits, labels, reduction="none")[-40:] == 0).all() and (cross_entropy(logits, labels) > 0).all()


def test_loss_has_the_derivatives_of_cross_entropy():
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_(True)
    labels = torch.randint(5, (6,), generator=generator)
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
    ours, theirs = (torch.autograd.grad(f.sum(), logits)[0] for f in (cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, labels), logits)


# ---- geometry of the batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("animal, name", CASES)
def test_batch_equals_its_singles(animal, name):
    engine, (images, labels) = make_engine(name, animal.make(), "abs"), zoo.images()
    whole = engine(images, labels).saliency
    singles = torch.cat([engine(images[i : i + 1], labels[i : i + 1]).saliency for i in range(5)])
    torch.testing.assert_close(whole, singles, rtol=1e-4, atol=1e-6 * float(whole.max()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d], ids=lambda n: n.__name__)
@pytest.mark.parametrize("name", ["fused", "vmap"])
def test_one_image_alone_where_maps_become_tokens(name, norm):
    """torch's own gradient of such a norm is wrong for a batch of one, and by much; a trial with one image notices nothing amiss."""
    network, (images, labels) = zoo.Animal("", lambda: zoo.Tokens(lambda: norm(4, affine=True), (3, 3))).make(), zoo.images()
    truth = oracles.saliency(network, images, labels, "abs")
    singles = torch.cat([make_engine(name, network, "abs")(images[i : i + 1], labels[i : i + 1]).saliency for i in range(5)])
    assert oracles.relative_errors(singles, truth).max() < 1e-4
    assert oracles.relative_errors(make_engine(name, network, "abs")(images, labels).saliency, truth).max() < 1e-4
    assert choose_engine(network, images[:1])[0] == choose_engine(network, images)[0] == "fused"


@pytest.mark.parametrize("animal, name", CASES)
def test_company_changes_no_bit(animal, name):
    """At one batch size, a sample's row is the same bit for bit whoever fills the other places: padding, or other samples."""
    engine, (images, labels), (others, theirs) = make_engine(name, animal.make(), "abs"), zoo.images(8), zoo.images(8, seed=9)
    whole = engine(images, labels)
    padded = engine(images[[0, 1, 2, 2, 2, 2, 2, 2]], labels[[0, 1, 2, 2, 2, 2, 2, 2]])
    assert torch.equal(padded.saliency[:3], whole.saliency[:3]) and torch.equal(padded.logits[:3], whole.logits[:3])
    mixed = engine(torch.cat([others[:3], images[3:6], others[6:]]), torch.cat([theirs[:3], labels[3:6], theirs[6:]]))
    assert torch.equal(mixed.saliency[3:6], whole.saliency[3:6]) and torch.equal(mixed.logits[3:6], whole.logits[3:6])


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("animal, name", CASES)
def test_permuted_batch_permutes_the_rows(animal, name, threads, set_threads):
    """Bit for bit, be it a batch that vectors and threads share out evenly or not."""
    set_threads(threads)
    engine = make_engine(name, animal.make(), "abs")
    for size, order in ((8, [5, 2, 7, 0, 1, 6, 4, 3]), (5, [4, 2, 0, 1, 3]), (3, [2, 0, 1])):
        whole, permuted = engine(*zoo.images(size)), engine(*(t[order] for t in zoo.images(size)))
        assert torch.equal(permuted.saliency, whole.saliency[order]) and torch.equal(permuted.logits, whole.logits[order])


@pytest.mark.parametrize("animal, name", CASES)
def test_empty_batch_is_empty(animal, name):
    network = animal.make()
    got = make_engine(name, network, "abs")(*zoo.images(0))
    assert got.saliency.shape == (0, FilterLayout.of(network).total) and got.logits.shape == (0, zoo.CLASSES)


# ---- what an engine leaves behind, and what it refuses -------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "vmap"])
@pytest.mark.parametrize("fails", [False, True])
def test_network_is_left_as_found(name, fails):
    """Weights, buffers, gradients, flags and the images, also when the batch could not be taken."""
    network, (images, labels) = zoo.ZOO[0].make(), zoo.images()
    for i, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 7.0) if i % 3 == 0 else None
    before, seen = copy.deepcopy(network), images.clone()
    gradients = [p.grad for p in network.parameters()]
    if fails:
        with pytest.raises((RuntimeError, IndexError)):
            make_engine(name, network, "abs")(images, labels + zoo.CLASSES)
    else:
        make_engine(name, network, "abs")(images, labels)
    for was, now, gradient in zip(before.parameters(), network.parameters(), gradients, strict=True):
        assert was.requires_grad == now.requires_grad and torch.equal(was, now)
        assert now.grad is gradient and (gradient is None or (gradient == 7).all())
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), network.buffers()))
    assert not any(module.training for module in network.modules()) and torch.equal(seen, images)


@pytest.mark.parametrize("name", ["fused", "vmap"])
def test_training_mode_is_refused(name):
    """Even of one module alone: BatchNorm would mix the samples, dropout would draw."""
    network = zoo.ZOO[0].make()
    network[0][1].train()
    with pytest.raises(ValueError, match="eval"):
        make_engine(name, network, "abs")


def test_vmap_holds_the_gradients_of_a_chunk(monkeypatch):
    """The chunk bounds it; and the measure of the test above can tell."""
    network, (images, labels) = next(a for a in zoo.ZOO if a.id == "many-weights").make(), zoo.images(16)
    weights = sum(p.numel() for p in network.parameters() if p.dim() == 4)
    layer = max(p.numel() for p in network.parameters() if p.dim() == 4)
    monkeypatch.setattr(vmap, "CHUNK", 16)
    with oracles.Largest() as whole:
        make_engine("vmap", network, "abs")(images, labels)
    monkeypatch.setattr(vmap, "CHUNK_NUMBERS", 2 * weights)
    with oracles.Largest() as chunked:
        make_engine("vmap", network, "abs")(images, labels)
    assert chunked.numbers <= 2 * weights < 16 * layer <= whole.numbers


@pytest.mark.parametrize(
    "network, message",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(264, 5)), "no convolution"),
        (nn.Conv2d(3, 5, 3), r"gives shape \[2, 5, 9, 6\].*logits \[2, classes\]"),
        (nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten()), r"cannot take images of shape \[2, 3, 11, 8\].*--preprocess"),
        (nn.Sequential(nn.Conv2d(3, 1, (11, 8)), nn.Flatten()), r"gives shape \[2, 1\]"),
    ],
    ids=["no convolution", "no logits", "other channels", "one class"],
)
def test_network_that_is_no_classifier_is_refused(network, message):

    with pytest.raises(BadRequest, match=message):
        check_network(network.eval(), zoo.images(2)[0])
        make_engine("fused", network.eval(), "abs")


class Kinked(nn.Module):
    """Every ReLU's input is 0 but for float32's rounding of the mean before it: where a gradient passes is the order of the sum's."""

    def __init__(self, image):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Linear(64, 5)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.running_mean.copy_(self.conv(image)[0, :, 0, 0].detach())

    def forward(self, x):
        return self.linear(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_rounding_at_a_kink_is_no_objection():
    """In float32 two right ways differ; in float64 they agree, and decide."""
    images = torch.rand(2, 3, 1, 1).expand(2, 3, 3, 3).contiguous()
    network = Kinked(images[:1]).eval().requires_grad_(False)
    layout, label = FilterLayout.of(network), torch.zeros(1, dtype=torch.int64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert objections._errors(network, layout, images[:1], label)[0] > objections.TOLERANCE, "the case is one"
    assert choose_engine(network, images) == ("fused", "every 4-D weight is used in one convolution")
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in network.state_dict().items())
