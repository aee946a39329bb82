"""A batch in parts, each on threads of its own: the same rows, whatever a network keeps between its layers, and whole where parts cannot be had."""

import copy
import functools
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import oracles
import pytest
import tiny
import torch
import zoo
import torchvision.transforms as v1
from torchvision.transforms import v2

from pipeline.saliency import make_engine
from pipeline.saliency.teams import Teams

ROOT = Path(__file__).parents[1]
BOTH = threading.Barrier(2)
KNOWN = [a for a in zoo.ZOO if a.engine == "fused" and all(type(m).__module__.startswith("torch.nn.") for m in a.make().modules())]


@pytest.fixture(autouse=True)
def two_threads(set_threads):
    set_threads(2)


def where(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The thread and its threads, for each sample, and the sample."""
    about = torch.tensor([[threading.get_ident(), torch.get_num_threads()]])
    if torch.get_num_threads() == 1:
        BOTH.wait(60)  # or one thread might do both parts
    return about.expand(len(images), 2), images[:, 0, 0, 0]


@pytest.mark.parametrize("count, teams", [(1, 1), (2, 1), (4, 2), (5, 1), (8, 2)])
def test_each_team_has_its_samples_in_order_and_its_share_of_threads(count, teams):
    """Parts are of one size, or there are none: a matrix product may round a row by the size of its batch. None is of a single sample, for which torch may have another kernel."""
    images, labels = zoo.images(count)
    about, seen = Teams(zoo.ZOO[0].make())(where, images, labels)
    assert len(about[:, 0].unique()) == teams and (about[:, 1] == 2 // teams).all() and torch.equal(seen, images[:, 0, 0, 0])
    if teams == 2:
        assert len(about[: count // 2, 0].unique()) == len(about[count // 2 :, 0].unique()) == 1 and threading.get_ident() not in about[:, 0]
    assert torch.get_num_threads() == 2


def teams_of(teams: Teams) -> int:
    about, _ = teams(where, *zoo.images(8))
    return len(about[:, 0].unique())


def alike() -> torch.nn.Sequential:
    """Two activations and two widths, each twice."""
    a, b, linear = torch.nn.ReLU(), torch.nn.Tanh(), torch.nn.Linear(6, 6)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), a, torch.nn.Conv2d(6, 6, 3), b, torch.nn.Conv2d(6, 6, 3), a, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear, torch.nn.Linear(6, 6), torch.nn.Linear(6, 5)).eval()
    network[9].weight = linear.weight
    network[2].bias, network[2].scale = None, torch.nn.Parameter(torch.ones(6))
    return network


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.__setitem__(5, n[3]),
        lambda n: n.__setitem__(3, n[1]),
        lambda n: setattr(n[9], "weight", torch.nn.Parameter(n[8].weight.detach() * -1)),
        lambda n: setattr(n[4], "bias", n[2].bias),
        lambda n: n.__setitem__(8, n[9]),
        lambda n: (setattr(n[2], "bias", n[2].scale), setattr(n[2], "scale", None)),
    ],
    ids=["another activation", "the first one again", "a weight of its own", "a bias of another's", "a layer twice", "a bias in the place of nothing"],
)
def test_what_takes_a_place_may_be_known_from_another(change):
    """Nothing that the network holds is new to it, or nothing is gone; and every team has the change."""
    network, (images, labels) = alike(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    engine(images, labels)
    change(network)
    found, anew = engine(images, labels).saliency, make_engine("fused", copy.deepcopy(network), "abs")(images, labels).saliency
    torch.testing.assert_close(found, anew, rtol=1e-4, atol=1e-6 * float(anew.max()))
    assert len(engine.teams.networks) == 2


def test_teams_are_copied_but_once():
    teams = Teams(alike())
    teams(where, *zoo.images(8))
    first = teams.networks[1]
    teams(where, *zoo.images(8))
    assert teams.networks[1] is first


class Step(NamedTuple):
    """A tuple that can be called, of somebody's own."""

    name: str

    def __call__(self, x):
        return x


def test_a_function_in_disguise_means_whole_batches(monkeypatch):
    """Under the name of one of torch's, as a tuple, or in the place of what a layer's forward calls."""
    disguised = functools.wraps(torch.nn.functional.relu)(lambda x: x)
    for hidden in (disguised, Step("k")):
        assert teams_of(Teams(torch.nn.Sequential(v2.Compose([hidden])))) == 1
    teams = Teams(zoo.ZOO[0].make())
    assert teams_of(teams) == 2
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", functools.wraps(torch.nn.Conv2d._conv_forward)(lambda *args: None))
    assert teams_of(teams) == 1


@pytest.mark.parametrize("change", [lambda n: setattr(n[1], "running_mean", n[1].running_mean + 3), lambda n: n[1].train(), lambda n: n[2].mean.fill_(2.0), lambda n: setattr(n[5], "bias", torch.nn.Parameter(n[5].bias + 1))])
def test_whatever_changes_in_a_network_changes_for_every_team(change):
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, zoo.CLASSES))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.InstanceNorm2d(8, track_running_stats=True), v1.Normalize(torch.zeros(8), torch.ones(8)), *head).eval()
    (images, labels), engine = zoo.images(8), make_engine("fused", network, "abs")
    before = engine(images, labels).logits
    change(network)
    after = engine(images, labels).logits
    assert torch.allclose(after, network(images), rtol=1e-4, atol=1e-5) and not torch.isclose(before, after).all(1).any() and len(engine.teams.networks) == 2


def test_a_convolution_that_is_replaced_wants_an_engine_of_its_own():
    network, (images, labels) = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    engine(images, labels)
    network[0] = torch.nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="weights are others than when this engine was made"):
        engine(images, labels)


def test_a_module_that_is_replaced_is_replaced_in_every_team():
    network, (images, labels) = zoo.ZOO[0].make(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    before = engine(images, labels).logits
    network[-1] = torch.nn.Linear(network[-1].in_features, zoo.CLASSES)
    after = engine(images, labels).logits
    assert not torch.isclose(before, after).any() and torch.allclose(after, network(images), rtol=1e-4, atol=1e-5) and len(engine.teams.networks) == 2


def test_what_a_module_holds_may_change_between_batches():
    network, (images, labels) = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Hardtanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    engine(images, labels % 8)
    network[1].max_val = 0.05
    assert torch.allclose(engine(images, labels % 8).logits, network(images), atol=1e-6) and len(engine.teams.networks) == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_an_engine_in_use_can_be_copied(copied):
    engine, (images, labels) = make_engine("fused", zoo.ZOO[0].make(), "abs"), zoo.images(8)
    rows = engine(images, labels).saliency
    again = copied(engine)
    assert torch.equal(again(images, labels).saliency, rows) and torch.equal(engine(images, labels).saliency, rows) and len(again.teams.networks) == 2


def test_a_thread_that_comes_later_has_all_the_threads_to_begin_with():
    """Of torch the last thread that sets its number sets it for those to come."""
    Teams(zoo.ZOO[0].make())(where, *zoo.images(8))
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("animal", KNOWN, ids=lambda animal: animal.id)
def test_rows_are_those_of_the_whole_batch(animal):
    network, (images, labels) = animal.make(), zoo.images(8)
    whole = make_engine("fused", network, "abs").once(images, labels)
    engine = make_engine("fused", network, "abs")
    parts = engine(images, labels)
    assert not engine.teams.alone and len(engine.teams.networks) == 2
    assert oracles.relative_errors(parts.saliency, whole.saliency.double().numpy()).max() < 1e-4
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("animal", KNOWN, ids=lambda animal: animal.id)
def test_company_changes_no_bit(animal):
    """At one batch size, with two threads, whoever fills the other places, of one's own team or of the other."""
    engine, (images, labels), (others, theirs) = make_engine("fused", animal.make(), "abs"), zoo.images(8), zoo.images(8, seed=9)
    whole, mixed = engine(images, labels), engine(torch.cat([others[:3], images[3:6], others[6:]]), torch.cat([theirs[:3], labels[3:6], theirs[6:]]))
    assert torch.equal(mixed.saliency[3:6], whole.saliency[3:6]) and torch.equal(mixed.logits[3:6], whole.logits[3:6])


def test_who_is_done_goes_on_with_the_next_batch():
    """While the other team is still at the first: neither waits for the other. Each has a network of its own meanwhile, and none is the one that is looked at."""
    network, reached, used = zoo.ZOO[0].make(), threading.Event(), {}

    def compute(own: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        used[float(images[0])] = own
        if images[0] == 0:  # until what is begun after it is done
            assert reached.wait(60)
        if images[0] == 12:
            reached.set()
        return (images * 2,)

    teams, rows = Teams(network), torch.arange(4.0)
    first, second = (teams.begin(compute, rows + start, labels=rows) for start in (0, 10))
    assert torch.equal(second()[0], 2 * (rows + 10)) and torch.equal(first()[0], 2 * rows) and torch.get_num_threads() == 2
    assert sorted(used) == [0, 2, 10, 12] and used[2] is used[10] is used[12] is not used[0] and network not in used.values()


def test_batches_that_are_begun_before_an_earlier_one_is_waited_for_are_right():
    """In whatever order they are asked for, and whether one of them fails; a network whose parameters ask for a gradient has them ask again at once, and is done."""
    network, (images, labels), (others, theirs) = zoo.ZOO[0].make(), zoo.images(8), zoo.images(8, seed=9)
    engine, wrong = make_engine("fused", network, "abs"), labels.clone()
    wrong[7] = zoo.CLASSES
    rows = [engine(images, labels), engine(others, theirs)]
    done = engine.begin(images, labels)
    assert all(p.requires_grad for p in network.parameters()) and engine.teams.pool._work_queue.empty() and torch.equal(done().saliency, rows[0].saliency)
    network.requires_grad_(False)
    begun = [engine.begin(*batch) for batch in ((images, labels), (images, wrong), (others, theirs))]
    with pytest.raises((RuntimeError, IndexError)):
        begun[1]()
    begun[0](), begun[2]()
    assert engine.teams.free.qsize() == 2, "a team that fails gives its network back"
    for i, wait in ((1, begun[2]), (0, begun[0])):
        assert torch.equal(wait().saliency, rows[i].saliency) and torch.equal(wait().logits, rows[i].logits)


KEPT: dict[str, torch.Tensor] = {}


class Keeping(torch.nn.Module):
    """Keeps its maps from one layer to another: in a global, in a buffer, or where a hook put them."""

    def __init__(self, where: str):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, zoo.CLASSES)
        self.where = where
        self.register_buffer("scratch", torch.zeros(32, 8))
        if where == "hook":
            self.first.register_forward_hook(lambda module, args, out: KEPT.__setitem__("map", out))

    def forward(self, x):
        out = self.first(x)
        if self.where == "global":
            KEPT["map"] = out
        if self.where == "buffer":
            self.scratch[: len(x)] = out.detach().mean((2, 3))
        between = self.second(torch.relu(out)).mean((2, 3))
        return self.linear(between + (self.scratch[: len(x)] if self.where == "buffer" else KEPT["map"].mean((2, 3))))


@pytest.mark.parametrize("where", ["global", "buffer", "hook"])
def test_a_network_that_keeps_its_maps_outside_of_its_modules_has_whole_batches(where):
    """In two threads a sample would get another's, now and then."""
    network, (images, labels) = Keeping(where).eval(), zoo.images(16)
    engine = make_engine("fused", network, "abs")
    truth = make_engine("fused", network, "abs").once(images, labels).saliency
    for _ in range(20):
        assert torch.equal(engine(images, labels).saliency, truth)
    assert engine.teams.alone


def hooked() -> torch.nn.Module:
    network = zoo.ZOO[0].make()
    network[0][0].register_forward_hook(lambda module, args, out: None)
    return network


def overwritten() -> torch.nn.Module:
    network = zoo.ZOO[0].make()
    network[1].forward = lambda x: x.flatten(1)
    return network


def unique() -> torch.nn.Module:
    network = zoo.ZOO[0].make()
    network.lock = threading.Lock()
    return network


@pytest.mark.parametrize("make", [hooked, overwritten, unique])
def test_one_that_is_not_all_torchs_own_or_cannot_be_copied_has_whole_batches(make):
    network, (images, labels) = make(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    assert torch.equal(engine(images, labels).saliency, make_engine("fused", zoo.ZOO[0].make(), "abs").once(images, labels).saliency) and engine.teams.alone


def test_what_fails_in_a_team_is_raised_and_the_next_batch_is_right():
    network, (images, labels) = zoo.ZOO[0].make(), zoo.images(8)
    engine, wrong = make_engine("fused", network, "abs"), labels.clone()
    wrong[7] = zoo.CLASSES
    with pytest.raises((RuntimeError, IndexError)):
        engine(images, wrong)
    assert torch.equal(engine(images, labels).saliency, make_engine("fused", network, "abs")(images, labels).saliency)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_bf16_reaches_every_team():
    network, (images, labels) = zoo.ZOO[0].make(), zoo.images(8)
    engine = make_engine("fused", network, "abs")
    with torch.autocast("cpu", torch.bfloat16):
        coarse = engine(images, labels).saliency
    apart = oracles.relative_errors(coarse, oracles.saliency(network, images, labels, "abs"))
    assert (apart > 1e-4).all() and apart.max() < 0.1
    assert oracles.relative_errors(engine(images, labels).saliency, oracles.saliency(network, images, labels, "abs")).max() < 1e-4


def test_a_process_ends_with_its_teams():
    """Threads that wait for work do not keep it."""
    script = "import torch; torch.set_num_threads(2); import zoo; from pipeline.saliency import make_engine; print(make_engine('fused', zoo.ZOO[0].make(), 'abs')(*zoo.images(8)).saliency.shape[0])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT / "tests", env=tiny.surroundings(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and done.stdout == "8\n", done.stderr
