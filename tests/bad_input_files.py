"""Bad weights files, and bad statistics to import."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny
import torch
from bad_input_sources import DAMAGES, LINKS, NO_FILE
from bad_input_tables import Trap
from safetensors.torch import save


@dataclass(frozen=True)
class File:
    """make(path) writes it; says: a pattern of what is wrong and the remedy; options: what the command is told beside it."""

    id: str
    make: Callable[[Path], object]
    says: str
    name: str = "w.pth"
    options: tuple[str, ...] = ()


STATE = tiny.net().state_dict()
WEIGHT = "conv2.weight"


def saved(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """`torch.save` of the state dict that `change` alters, or of what it returns instead."""

    def make(path: Path) -> None:
        state = {name: value.clone() for name, value in STATE.items()}
        other = change(state)
        torch.save(state if other is None else other, path)

    return make


def filled(value: float) -> Callable[[Path], None]:
    return saved(lambda state: state[WEIGHT].view(-1)[3:4].fill_(value) and None)


def tensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    """A safetensors file from its parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def zipped(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)

    return make


def damaged(damage: str, safe: bool) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(save(STATE)) if safe else torch.save(STATE, path)
        DAMAGES[damage](path)

    return make


READ = r"{name} cannot be read as weights alone \(.*\); save a state dict with torch.save or as .safetensors"
NONE, FIT = r"w\.\w+ holds no state dict .*; save model.state_dict\(\)", "--weights: these are not the weights of tiny:net: "
SAFE, ONE = "w.safetensors", {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
WEIGHTS = [
    *(File(f"weights: NaN or infinity {value}", filled(value), f"w.pth has values that are not finite .NaN or infinity. in {WEIGHT}; give") for value in (float("nan"), float("inf"), float("-inf"))),
    File("weights: of double that overflow", saved(lambda state: state.update({WEIGHT: state[WEIGHT].double() * 1e300})), f"values that are not finite .* in {WEIGHT}"),
    File("weights: all zero", saved(lambda state: {name: torch.zeros_like(value) for name, value in state.items()}), r"the very same answer to all \d+ images, .*: are these its weights"),
    File("weights: one missing", saved(lambda state: {name: value for name, value in state.items() if name != WEIGHT}), FIT + f"{WEIGHT} is missing"),
    File("weights: one too many", saved(lambda state: state.update(extra=torch.zeros(1))), FIT + "extra is not in the network"),
    File("weights: transposed", saved(lambda state: state.update({"linear.weight": state["linear.weight"].T.contiguous()})), FIT + r"linear.weight is \[10, 5\] where the network has \[5, 10\]"),
    File("weights: flattened", saved(lambda state: state.update({WEIGHT: state[WEIGHT].flatten()})), FIT + rf"{WEIGHT} is \[432\]"),
    File("weights: of more classes", saved(lambda state: state.update({"linear.weight": torch.zeros(1000, 10), "linear.bias": torch.zeros(1000)})), FIT + r"linear.weight is \[1000, 10\]"),
    File("weights: of another network", saved(lambda state: tiny.Twice().state_dict()), FIT),
    File("weights: of another prefix", saved(lambda state: {f"backbone.{name}": value for name, value in state.items()}), FIT + r"conv1.weight is missing; backbone.* and \d+ more"),
    File("weights: names that move the cursor", saved(lambda state: state.update({"\x1b[2J": torch.zeros(1)})), FIT + r"\\x1b\[2J is not in the network"),
    File("weights: whole numbers", saved(lambda state: state.update({WEIGHT: torch.zeros_like(state[WEIGHT], dtype=torch.int64)})), FIT + f"{WEIGHT} is of int64 .*float"),
    File("weights: complex", saved(lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.complex64)})), FIT + f"{WEIGHT} is of complex64 .*float"),
    File("weights: sparse", saved(lambda state: state.update({"linear.weight": state["linear.weight"].to_sparse()})), FIT + "linear.weight is sparse; give"),
    File("weights: on no device", saved(lambda state: state.update({WEIGHT: state[WEIGHT].to("meta")})), FIT + f"{WEIGHT} has no values; give"),
    File("weights: a tensor alone", saved(lambda state: state[WEIGHT]), NONE),
    File("weights: a list", saved(lambda state: list(state.values())), NONE),
    File("weights: nothing", saved(lambda state: {}), NONE),
    File("weights: numbers", saved(lambda state: {"lr": 0.1}), NONE),
    File("weights: an optimizer's state", saved(lambda state: torch.optim.SGD(tiny.net().parameters(), 0.1).state_dict()), NONE),
    File("weights: names that are numbers", saved(lambda state: {1: torch.zeros(1)}), NONE),
    File("weights: a state within itself", saved(lambda state: state.update(model=state)), NONE),
    File("weights: a whole network", saved(lambda state: tiny.net()), r"asks to call tiny\.Net, which was not called.*; save a state dict"),
    File("weights: code", lambda path: torch.save(Trap(path.with_name("ran")), path), r"asks to call \w+\.mkdir, which was not called.*; save a state dict"),
    File("weights: code beside weights", lambda path: torch.save(STATE | {"x": Trap(path.with_name("ran"))}, path), r"asks to call \w+\.mkdir, which was not called"),
    File("weights: code in an old file", lambda path: torch.save(Trap(path.with_name("ran")), path, _use_new_zipfile_serialization=False), READ),
    File("weights: code in a pickle", lambda path: path.write_bytes(__import__("pickle").dumps(Trap(path.with_name("ran")))), READ),
    File("weights: a zip of something else", zipped(("readme.txt", b"nothing")), READ),
    File("weights: a zip that unpacks without end", zipped(("archive/data.pkl", bytes(300_000_000)), ("archive/version", b"3\n")), READ),
    File("weights: not there", lambda path: None, "there is no file .*w.pth: give"),
    File("safetensors: a header without end", tensors(b"{}", length=2**63 - 1), READ, SAFE),
    File("safetensors: a header that is longer than the file", tensors(b"{}", length=1000), READ, SAFE),
    File("safetensors: no header", tensors(b"", length=0), READ, SAFE),
    File("safetensors: a header that is no JSON", tensors(b"{'a': 1}" * 9), READ, SAFE),
    File("safetensors: a header nested deep", tensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), READ, SAFE),
    File("safetensors: offsets that overlap", tensors({"a": ONE, "b": ONE}, bytes(16)), READ, SAFE),
    File("safetensors: offsets beyond the end", tensors({"a": ONE | {"data_offsets": [0, 10**12]}}, bytes(16)), READ, SAFE),
    File("safetensors: offsets backwards", tensors({"a": ONE | {"data_offsets": [16, 0]}}, bytes(16)), READ, SAFE),
    File("safetensors: a shape of another size", tensors({"a": ONE | {"shape": [2**40, 2**40]}}, bytes(16)), READ, SAFE),
    File("safetensors: a type that is none", tensors({"a": ONE | {"dtype": "F33"}}, bytes(16)), READ, SAFE),
    File("safetensors: bytes that belong to nothing", tensors({"a": ONE}, bytes(600)), READ, SAFE),
    File("safetensors: no tensor", tensors({}), NONE, SAFE),
    File("safetensors: that is a pickle", lambda path: torch.save(STATE, path), READ, SAFE),
    File("pth: that is safetensors", lambda path: path.write_bytes(save(STATE)), READ),
    *(File(f"weights: {damage}", damaged(damage, False), ("(there is no file|no regular file is) .*: give" if damage in NO_FILE | LINKS else READ)) for damage in DAMAGES if damage not in ("zeros inside", "garbage after it")),
    *(File(f"safetensors: {damage}", damaged(damage, True), ("(there is no file|no regular file is) .*: give" if damage in NO_FILE | LINKS else READ), SAFE) for damage in DAMAGES if damage not in ("zeros inside",)),
]


# ---- statistics ------------------------------------------------------------------------------------------------------


def both(mean: object = None, std: object = None, **more: object) -> Callable[[Path], None]:
    """A dict of mean and std; without them those that the run would take."""
    content = {"mean": torch.ones(tiny.FILTERS) if mean is None else mean, "std": torch.ones(tiny.FILTERS) if std is None else std} | more
    return lambda path: torch.save({key: value for key, value in content.items() if value is not ...}, path)


def with_one(value: float) -> torch.Tensor:
    return torch.ones(tiny.FILTERS).index_fill(0, torch.tensor([5]), value)


TORCH = r"w\.pth cannot be read as statistics \(.*\); a torch file with a dict of two vectors, mean and std, is needed"
VALUES = "w.pth holds values that are not finite, or a negative std: .*"
OTHER = "filters, this run's network has 24: it belongs to another model; "
STATISTICS = [
    File("statistics: of another model", both(torch.ones(100), torch.ones(100)), f"w.pth is about 100 {OTHER}"),
    File("statistics: mean and std of different lengths", both(std=torch.ones(5)), r"w.pth holds 24 means and 5 stds: .*"),
    File("statistics: nothing in them", both(torch.ones(0), torch.ones(0)), f"w.pth is about 0 {OTHER}"),
    File("statistics: one number", both(torch.tensor(1.0), torch.tensor(1.0)), f"w.pth is about 1 {OTHER}"),
    *(File(f"statistics: a mean of {value}", both(with_one(value)), VALUES) for value in (float("nan"), float("inf"))),
    *(File(f"statistics: a std of {value}", both(std=with_one(value)), VALUES) for value in (float("nan"), float("inf"), -1.0)),
    File("statistics: complex", both(torch.ones(tiny.FILTERS, dtype=torch.complex64)), TORCH),
    File("statistics: text", both("mean"), TORCH),
    File("statistics: no std", both(std=...), TORCH),
    File("statistics: other keys", both(..., ..., mu=torch.ones(24), sigma=torch.ones(24)), TORCH),
    File("statistics: a list", lambda path: torch.save([torch.ones(24), torch.ones(24)], path), TORCH),
    File("statistics: a tensor", lambda path: torch.save(torch.ones(2, 24), path), TORCH),
    File("statistics: numpy's", lambda path: np.savez(path.open("wb"), mean=np.ones(24), std=np.ones(24)), TORCH),
    File("statistics: code", lambda path: torch.save(Trap(path.with_name("ran")), path), TORCH),
    File("statistics: code beside them", lambda path: both(x=Trap(path.with_name("ran")))(path), TORCH),
    File("statistics: weights", lambda path: torch.save(STATE, path), TORCH),
    File("statistics: JSON", lambda path: path.write_text('{"mean": [1], "std": [1]}'), TORCH),
    File("statistics: not there", lambda path: None, "there is no file .*w.pth: give"),
    File("statistics: of another aggregation", both(), "--aggregation: these statistics are 'signed', the run .* is 'abs'; extract a run with", options=("--aggregation", "signed")),
    File("statistics: of no aggregation that is known", both(), "--aggregation: 'mean' is not one of abs, signed", options=("--aggregation", "mean")),
    File("statistics: under the name of a data set", both(), "--name: 'val' is a data set of this run; choose another", options=("--name", "val")),
    File("statistics: under a name that climbs", both(), "--name: '../x' cannot name a file; use letters", options=("--name", "../x")),
    *(File(f"statistics: {damage}", lambda path, damage=damage: (both()(path), DAMAGES[damage](path)), f"({TORCH}|(there is no file|no regular file is) .*: give)") for damage in DAMAGES if damage not in ("zeros inside", "garbage after it")),
]
