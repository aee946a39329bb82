"""A batch in parts, each on threads of its own: the same rows, whatever a network keeps between its layers, and whole where parts cannot be had."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import oracles
import pytest
import tiny
import torch
import zoo

from pipeline.saliency import make_engine
from pipeline.saliency.teams import Teams

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def where(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The thread and its threads, for each sample, and the sample."""
    about = torch.tensor([[threading.get_ident(), torch.get_num_threads()]])
    time.sleep(0.1)  # or one thread might do both parts
    return about.expand(len(images), 2), images[:, 0, 0, 0]


@pytest.mark.parametrize("count, teams", [(1, 1), (2, 2), (5, 2), (8, 2)])
def test_each_team_has_its_samples_in_order_and_its_share_of_threads(count, teams):
    images, labels = zoo.images(count)
    about, seen = Teams(zoo.ZOO[0].make())(where, images, labels)
    assert len(about[:, 0].unique()) == teams and (about[:, 1] == 2 // teams).all() and torch.equal(seen, images[:, 0, 0, 0])
    if teams == 2:
        assert len(about[: -(-count // 2), 0].unique()) == len(about[-(-count // 2) :, 0].unique()) == 1 and threading.get_ident() not in about[:, 0]
    assert torch.get_num_threads() == 2


def test_a_thread_that_comes_later_has_all_the_threads_to_begin_with():
    """Of torch the last thread that sets its number sets it for those to come."""
    Teams(zoo.ZOO[0].make())(where, *zoo.images(8))
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("animal", [a for a in zoo.ZOO if a.engine == "fused"], ids=lambda animal: animal.id)
def test_rows_are_those_of_the_whole_batch(animal):
    network, (images, labels) = animal.make(), zoo.images(8)
    whole = make_engine("fused", network, "abs").once(images, labels)
    engine = make_engine("fused", network, "abs")
    parts = engine(images, labels)
    assert not engine.teams.alone and len(engine.teams.networks) == 2
    assert oracles.relative_errors(parts.saliency, whole.saliency.double().numpy()).max() < 1e-4
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("animal", [a for a in zoo.ZOO if a.engine == "fused"], ids=lambda animal: animal.id)
def test_company_changes_no_bit(animal):
    """At one batch size, with two threads, whoever fills the other places, of one's own team or of the other."""
    engine, (images, labels), (others, theirs) = make_engine("fused", animal.make(), "abs"), zoo.images(8), zoo.images(8, seed=9)
    whole, mixed = engine(images, labels), engine(torch.cat([others[:3], images[3:6], others[6:]]), torch.cat([theirs[:3], labels[3:6], theirs[6:]]))
    assert torch.equal(mixed.saliency[3:6], whole.saliency[3:6]) and torch.equal(mixed.logits[3:6], whole.logits[3:6])


class Keeping(torch.nn.Module):
    """Keeps its maps in itself from one layer to another, as networks that share them between distant layers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, zoo.CLASSES)

    def forward(self, x):
        self.kept = self.first(x)
        between = self.second(torch.relu(self.kept)).mean((2, 3))
        return self.linear(between + self.kept.mean((2, 3)))


def test_what_a_network_keeps_of_a_forward_pass_is_its_own():
    network, (images, labels) = Keeping().eval(), zoo.images(16)
    truth = oracles.saliency(network, images, labels, "abs")
    engine = make_engine("fused", network, "abs")
    for _ in range(20):
        assert oracles.relative_errors(engine(images, labels).saliency, truth).max() < 1e-4
    assert not engine.teams.alone


class Rooted(Keeping):
    """Runs in the thread that made it alone."""

    def __init__(self):
        super().__init__()
        self.root = threading.get_ident()

    def forward(self, x):
        assert threading.get_ident() == self.root, "elsewhere"
        return super().forward(x)


class Unique(Keeping):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


@pytest.mark.parametrize("make", [Rooted, Unique])
def test_a_network_that_cannot_be_shared_out_has_whole_batches(make):
    engine, (images, labels) = make_engine("fused", make().eval(), "abs"), zoo.images(8)
    truth = oracles.saliency(Keeping().eval(), images, labels, "abs")
    for _ in range(2):
        assert oracles.relative_errors(engine(images, labels).saliency, truth).max() < 1e-4
        assert engine.teams.alone


class Picky(Keeping):
    def forward(self, x):
        if (x[:, 0, 0, 0] > 9).any():
            raise ValueError("too bright")
        return super().forward(x)


def test_what_an_image_is_to_blame_for_is_raised_and_the_next_batch_has_teams():
    network, (images, labels) = Picky().eval(), zoo.images(8)
    engine, bright = make_engine("fused", network, "abs"), images.clone()
    bright[7, 0, 0, 0] = 10
    with pytest.raises(ValueError, match="too bright"):
        engine(bright, labels)
    assert torch.equal(engine(images, labels).saliency, make_engine("fused", network, "abs")(images, labels).saliency)
    assert not engine.teams.alone and not any(p.grad is not None for p in network.parameters()) and all(p.requires_grad for p in network.parameters())


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
