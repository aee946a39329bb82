"""Which networks have no teams: those in which somebody's code might keep a map outside of the modules, wherever it was put, and whenever."""

import functools
import weakref

import pytest
import torch
import torchvision.transforms as v1
import zoo
from test_teams import BOTH, teams_of
from torchvision.transforms import v2

from pipeline.saliency.teams import Teams


@pytest.fixture(autouse=True)
def two_threads(set_threads):
    set_threads(2)


def test_functions_from_elsewhere_and_hooks_of_all_modules_mean_whole_batches():
    """They may keep maps outside of the modules, whenever they come."""
    same = lambda x: x  # noqa: E731
    hidden = [v2.Compose([same]), v2.Compose([v1.Compose([same])]), v1.RandomApply([same], p=1.0), v2.RandomChoice([functools.partial(same)])]
    for module in (v2.Lambda(same), torch.nn.TransformerEncoderLayer(4, 2, activation=lambda x: x.relu()), *hidden):
        assert teams_of(Teams(torch.nn.Sequential(module))) == 1
    assert teams_of(Teams(torch.nn.Sequential(v2.Compose([torch.nn.ReLU(), v2.RandomApply([v1.Compose([torch.relu_])], p=1.0)])))) == 2
    teams = Teams(zoo.ZOO[0].make())
    assert teams_of(teams) == 2
    handles = [torch.nn.modules.module.register_module_forward_hook(lambda *_: None), next(teams.network.children()).register_forward_hook(lambda *_: None)]
    for handle in handles:
        assert teams_of(teams) == 1
        handle.remove()
    assert teams_of(teams) == 2


def test_a_forward_that_somebody_gave_to_one_of_torchs_classes_means_whole_batches(monkeypatch):
    teams = Teams(zoo.ZOO[0].make())
    monkeypatch.setattr(type(next(m for m in teams.network.modules() if not list(m.children()))), "forward", lambda self, x: x)
    assert teams_of(teams) == 1


class Own(torch.autograd.Function):
    """Somebody's."""


FORWARDS = {
    "partial method": functools.partialmethod(lambda self, x: x), "property": property(lambda self: torch.relu), "cache": functools.lru_cache(lambda self, x: x), "class": zoo.Animal, "module": torch.nn.Sequential(),
    "of an object": torch.nn.Sequential(zoo.ZOO[0].make()).forward, "wrapped by torch": torch.enable_grad()(BOTH.wait), "partial, wrapped": torch.no_grad()(functools.partial(lambda self, x: x)), "a Function": Own.apply, "of a dict": {}.setdefault,
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_so_does_any_other_thing_in_the_place_of_one(forward, monkeypatch):
    teams = Teams(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(3, 3)))
    assert teams_of(teams) == 2
    monkeypatch.setattr(torch.nn.Tanh, "forward", forward)
    assert teams_of(teams) == 1


def test_so_does_a_call_of_a_transform_that_somebody_replaced(monkeypatch):
    teams = Teams(torch.nn.Sequential(v2.Compose([v1.Compose([torch.tanh])])))
    assert teams_of(teams) == 2
    monkeypatch.setattr(v1.Compose, "__call__", lambda self, x: x)
    assert teams_of(teams) == 1


def test_a_weak_proxy_means_whole_batches_even_of_nothing():
    network = zoo.ZOO[0].make()
    network.parent = weakref.proxy(other := torch.nn.ReLU())
    del other
    assert teams_of(Teams(network)) == 1
