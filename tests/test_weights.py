"""Weights files are data: found inside any usual checkpoint, fitting whole or not at all, and never code."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file
from test_models import equal

from pipeline import models
from pipeline.errors import BadRequest
from pipeline.samples import PRESETS, Preprocessing

NET = "resnet20"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return models.build(NET).state_dict()


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "state_dict in model": lambda state: {"epoch": 3, "model": {"state_dict": state}},
    "net": lambda state: {"net": state, "acc": 95.5},
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "DataParallel in a checkpoint": lambda state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
    "without counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "half precision": lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_is_found_in_a_pth(tmp_path, state, wrapping):
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "w.pth")
    got = models.load(NET, str(tmp_path / "w.pth"), None)
    expected = {name: value.half() for name, value in state.items()} if wrapping == "half precision" else state
    assert equal(got.network, expected) and got.weights_sha256 == models.file_sha256(tmp_path / "w.pth")
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in got.network.parameters()) and not any(m.training for m in got.network.modules())
    assert got.preprocessing == PRESETS["cifar"] and got.class_names[0] == "airplane"


def test_safetensors_and_another_digest_for_other_weights(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    save_file(state | {"linear.bias": state["linear.bias"] + 1}, tmp_path / "v.safetensors")
    first, second = (models.load(NET, str(tmp_path / f"{name}.safetensors"), "resize=40") for name in "wv")
    assert equal(first.network, state) and first.weights_sha256 != second.weights_sha256
    assert first.preprocessing == Preprocessing(40, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "layer1.0.conv1.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not in the network"),
        (lambda s: s.update({"linear.weight": torch.zeros(100, 64)}), r"linear.weight is \[100, 64\] where the network has \[10, 64\]"),
        (lambda s: s.update({"conv1.weight": torch.zeros(16, 3, 3)}), r"conv1.weight is \[16, 3, 3\]"),
        (lambda s: [s.pop(name) for name in list(s) if "layer3" in name], r"layer3.* is missing; .*; and \d+ more"),
        (lambda s: [s.update({f"model.{name}": s.pop(name)}) for name in list(s)], r"conv1.weight is missing; model.conv1.weight is not in the network; .*; and \d+ more"),
        (lambda s: s.update({"e\x1b[2J": torch.zeros(1)}), re.escape("e\\x1b[2J is not in the network")),
    ],
    ids=["missing", "unexpected", "shape", "dimensions", "many", "prefix", "control characters"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, state, change, message):
    other = dict(state)
    change(other)
    torch.save(other, tmp_path / "w.pth")
    with pytest.raises(BadRequest, match=f"^--weights: these are not the weights of resnet20: .*{message}"):
        models.load(NET, str(tmp_path / "w.pth"), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, state, value):
    for name in ("layer1.0.conv1.weight", "layer1.0.bn1.running_var"):
        bad = state[name].clone().view(-1).index_fill(0, torch.tensor([3]), value).view_as(state[name])
        torch.save(state | {name: bad}, tmp_path / "w.pth")
        with pytest.raises(BadRequest, match=f"^--weights: .*w.pth has values that are not finite .*{name}"):
            models.load(NET, str(tmp_path / "w.pth"), None)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_weights_never_runs(tmp_path, state):
    torch.save({"state_dict": state, "hyper_parameters": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(BadRequest, match=r"^--weights: .*w.pth cannot be read as weights alone \(it asks to call \w+\.mkdir, which was not called: it holds more than tensors\); save a state dict"):
        models.load(NET, str(tmp_path / "w.pth"), None)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it would have


def test_files_that_are_no_weights(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    for name in ("tensor", "numbers", "empty"):
        with pytest.raises(BadRequest, match=f"{name}.pth holds no state dict"):
            models.read_weights(str(tmp_path / f"{name}.pth"))
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "network.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "nothing.pth").touch()
    reasons = {"text.pth": "no file that torch.save wrote", "nothing.pth": "or is cut short", "cut.pth": "it is damaged or cut short", "network.pth": "asks to call torch.nn.modules.conv.Conv2d", "text.safetensors": ""}
    for name, reason in reasons.items():
        with pytest.raises(BadRequest, match=f"{name} cannot be read as weights alone .*{reason}") as refusal:
            models.read_weights(str(tmp_path / name))
        assert len(str(refusal.value)) < 300 + len(str(tmp_path)) and "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)
    for name in ("nowhere.pth", "."):
        with pytest.raises(BadRequest, match="^--weights: (there is no file|no regular file is) .*: give"):
            models.read_weights(str(tmp_path / name))


def test_the_papers_cifar_network_is_prepared_as_its_recipe_trains_it(tmp_path):
    network = models.build("cifar_resnet18")
    torch.save({"net": {f"module.{name}": value for name, value in network.state_dict().items()}}, tmp_path / "w.pth")
    got = models.load("cifar_resnet18", str(tmp_path / "w.pth"), None)
    assert got.preprocessing == PRESETS["pytorch-cifar"] != PRESETS["cifar"] and equal(got.network, network.state_dict())
    assert models.load("cifar_resnet18", str(tmp_path / "w.pth"), "cifar").preprocessing == PRESETS["cifar"]
