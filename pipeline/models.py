"""A name -> a classifier in eval mode with its weights, preprocessing and class names.

Names: torchvision's classifiers, the CIFAR networks of `pipeline/cifar.py`, or `module:factory` for anything else.
Weights are only ever read as data (safetensors, or `torch.load(weights_only=True)`); code in a weights file never runs.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import math
import os
import pickle
import re
import sys
import urllib.error
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from pipeline import cifar
from pipeline.atomic import regular, replacing
from pipeline.errors import BadRequest, closest, printable
from pipeline.samples import PRESETS, Preprocessing


OLD_NAMES = (  # in torchvision's own files, and translated by its own loaders
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # DenseNet's `norm.1.weight` is `norm1.weight`
    (re.compile(r"(\.mlp)\.linear_1\."), r"\1.0."),  # a ViT's `mlp.linear_1.weight` is `mlp.0.weight`, `linear_2` is `mlp.3`
    (re.compile(r"(\.mlp)\.linear_2\."), r"\1.3."),
)


@dataclass(frozen=True)
class Classifier:
    """network: eval mode, float32, parameters frozen, on the CPU. `weights_sha256`: of the weights file, or of the
    weights themselves where a factory brought them. `promised`: top-1 (0..1) on ImageNet val that they are published with, or None;
    a file for a torchvision name counts as IMAGENET1K_V1."""

    network: torch.nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    weights_sha256: str
    promised: float | None = None


def load(model: str, weights: str | None, preprocess: str | None) -> Classifier:
    """The classifier that the command line names. Raises BadRequest for an unknown name, unusable weights, or missing preprocessing."""
    promised = None
    if model in cifar.NETWORKS:
        network, state, digest = cifar.NETWORKS[model](), *_need_file(model, weights)
        base, names = PRESETS["pytorch-cifar" if model == "cifar_resnet18" else "cifar"], cifar.CLASSES
    elif ":" in model:
        network = build(model)
        state, digest = read_weights(weights) if weights else (None, None)
        base, names = _said_by(network)
        if base is None and not preprocess:
            raise BadRequest(f"--preprocess: {printable(model)} does not say how its images are prepared; add for example --preprocess imagenet, or resize=256,crop=224,mean=0.5/0.5/0.5,std=0.5/0.5/0.5")
    else:
        entry, state, digest = _torchvision_weights(_known(model), weights)
        network = build(model, state)
        base, names, promised = _torchvision_preprocessing(entry), tuple(entry.meta["categories"]), _promised(entry)
    if state is not None:
        fit(network, state, model)
    else:
        digest = digest_of(network)
    network.float().eval().requires_grad_(False)
    _check_finite(network, weights or model)
    return Classifier(network, Preprocessing.parse(preprocess or "", base), names, digest, promised)


def build(model: str, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The bare network of a name; its weights are whatever its constructor gives. Raises BadRequest for an unknown name.

    `state`: the weights that it will be given, where they tell what a constructor must know; nothing is loaded here.
    """
    if model in cifar.NETWORKS:
        return cifar.NETWORKS[model]()
    if ":" in model:
        return _from_factory(model)
    import torchvision.models

    return torchvision.models.get_model(_known(model), weights=None, **_arguments(model, state))


def _known(model: str) -> str:
    """The name itself. Raises BadRequest if torchvision has no classifier of that name."""
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise BadRequest(f"--model: there is no '{printable(model)}'; close to it: {closest(model, [*known, *cifar.NETWORKS])} (or your own, as module:factory)")
    return model


def _arguments(model: str, state: dict[str, torch.Tensor] | None) -> dict:
    """What torchvision's constructor must be told for these weights: Inception and GoogLeNet may have lost their auxiliary heads,
    and a ViT is made for one size of image, which its position embedding gives away."""
    if model in ("inception_v3", "googlenet"):
        heads = {} if state is None else {"aux_logits": any(name.lower().startswith("aux") for name in state)}
        return {"init_weights": False, "transform_input": True, **heads}
    if model.startswith("vit_") and state is not None:
        positions, patches = (state.get(name) for name in ("encoder.pos_embedding", "conv_proj.weight"))
        if positions is not None and patches is not None and positions.dim() == 3 and patches.dim() == 4:
            side = math.isqrt(positions.shape[1])
            return {"image_size": side * patches.shape[-1]} if side else {}
    return {}


def _said_by(network: torch.nn.Module) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """What a factory's network says of itself, in attributes that its author may have used for something else:
    `preprocessing`, as text or a Preprocessing, and `class_names`, a list of texts."""
    base, names = getattr(network, "preprocessing", None), getattr(network, "class_names", None)
    if isinstance(base, str):
        base = Preprocessing.parse(base, None)
    return base if isinstance(base, Preprocessing) else None, tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


def _from_factory(model: str) -> torch.nn.Module:
    module, _, factory = model.partition(":")
    reach(os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except KeyboardInterrupt:
        raise
    except BaseException as fault:  # a script that ends with sys.exit, too
        raise BadRequest(f"--model: {printable(model)} cannot be made ({type(fault).__name__}: {printable(fault)}); module:factory names an importable module and a function in it that needs no arguments") from None
    if not isinstance(made, torch.nn.Module):
        raise BadRequest(f"--model: {printable(model)} gave a {type(made).__name__}, not a torch.nn.Module")
    return made


def reach(folder: str | None) -> None:
    """Make modules of `folder` importable, as Python does for the folder that it is started in."""
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)


def read_weights(path: str) -> tuple[dict[str, torch.Tensor], str]:
    """(state dict, sha256 of the file). Finds the state inside a checkpoint; drops DataParallel's `module.` prefix."""
    if not Path(path).is_file():  # a pipe, too: reading it might never end
        raise BadRequest(f"--weights: {'no regular file is' if os.path.exists(path) else 'there is no file'} {printable(path)}: give a .safetensors or .pth file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # about a pickle's protocol, before it is refused
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:
        raise BadRequest(f"--weights: {printable(path)} cannot be read as weights alone ({_why(fault)}); save a state dict with torch.save or as .safetensors") from None
    keys = ("state_dict", "model", "model_state_dict", "net")
    for _ in keys:  # no deeper: a dict may hold itself
        key = next((k for k in keys if isinstance(state, dict) and isinstance(state.get(k), dict)), None)
        state = state if key is None else state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in state.items()):
        raise BadRequest(f"--weights: {printable(path)} holds no state dict (names with tensors); save model.state_dict()")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): v for name, v in state.items()}
    return state, file_sha256(path)


def _why(fault: Exception) -> str:
    """Why a file is not read, in few words: what torch says runs over several lines, and recommends running what the file asks for."""
    text = str(fault).strip()
    if asked := re.search(r"GLOBAL (\S+)", text):
        return f"it asks to call {printable(asked[1])[:80]}, which was not called: it holds more than tensors"
    if isinstance(fault, (pickle.UnpicklingError, KeyError, IndexError, EOFError)):
        return "it is no file that torch.save wrote, or is cut short"
    if "PytorchStreamReader" in text:
        return "it is damaged or cut short"
    return printable((text or type(fault).__name__).splitlines()[0])[:160]


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fit(network: torch.nn.Module, state: dict[str, torch.Tensor], model: str) -> None:
    """Load `state`, every key and shape of it. Raises BadRequest naming what does not fit."""
    own = network.state_dict()
    state = OrderedDict((name if name in own else _new_name(name), value) for name, value in state.items())
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [f"{name} is missing" for name in own if name not in state and name not in counters]
    foreign = [f"{name} is not in the network" for name in state if name not in own]
    misshapen = [f"{name} is {list(state[name].shape)} where the network has {list(own[name].shape)}" for name in own if name in state and state[name].shape != own[name].shape]
    unfit = [f"{name} {what}" for name in own if name in state and (what := _unfit(state[name], own[name]))]
    faults = [fault for some in zip_longest(missing, foreign, misshapen, unfit) for fault in some if fault]  # some of each kind first
    if faults:
        shown = "; ".join(map(printable, faults[:4])) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise BadRequest(f"--weights: these are not the weights of {printable(model)}: {shown}; give this network's own, or name the --model that they belong to")
    state._metadata = getattr(own, "_metadata", None)  # versions of modules, which some loaders insist on and few files carry: what fits is of the present ones
    network.load_state_dict(state, strict=False)


def _unfit(value: torch.Tensor, own: torch.Tensor) -> str:
    """Why a tensor of the right name and shape is no weight, or nothing."""
    if value.is_meta and not own.is_meta:
        return "has no values"
    if value.layout != torch.strided:
        return "is sparse"
    return f"is of {str(value.dtype).removeprefix('torch.')} where the network has floats" if own.is_floating_point() and not value.is_floating_point() else ""


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES:
        name = old.sub(new, name)
    return name


def digest_of(network: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of everything in the state dict."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """The whole state dict as safetensors, so that a run directory can rebuild its network anywhere. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        try:
            save_file({name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}, partial)
        except SafetensorError as fault:
            number = re.search(r"os error (\d+)", str(fault))
            raise OSError(int(number[1]) if number else errno.EIO, str(fault)) from fault
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors makes it private; workers may run as another user


def restore(model: str, weights: Path, digest: str | None = None) -> torch.nn.Module:
    """The network of a run again, from its name and the weights kept in the run directory. Raises BadRequest if they are not those of `digest`, with the remedy."""
    refuse_damaged(weights, digest)
    try:
        state, _ = read_weights(str(weights))
        network = build(model, state)
        fit(network, state, model)
    except BadRequest as fault:
        if "--model" in str(fault):
            raise
        raise _unusable(weights, str(fault).partition(": ")[2]) from None
    return network.float().eval().requires_grad_(False)


def refuse_damaged(weights: Path, digest: str | None = None) -> None:
    """Raises BadRequest unless a run's own weights are a file, and that of `digest` if there is one."""
    try:
        found = file_sha256(regular(weights))
    except FileNotFoundError:
        raise _unusable(weights, "it is not there") from None
    except OSError as fault:
        raise _unusable(weights, os.strerror(fault.errno) if fault.errno != errno.EINVAL else "it is not a regular file") from None
    if digest not in (None, found):
        raise _unusable(weights, "its digest is not the one in run.json")


def _unusable(weights: Path, why: str) -> BadRequest:
    return BadRequest(f"{printable(weights)}, the run's own weights, cannot be used ({why}): remove it, and give the faultline extract command again, which writes it anew")


def _need_file(model: str, weights: str | None):
    if not weights:
        raise BadRequest(f"--weights: {model} comes without weights; name a .safetensors or .pth file")
    return read_weights(weights)


def _torchvision_weights(model: str, weights: str | None):
    """(weights entry that tells preprocessing and class names, state, digest); a file counts as IMAGENET1K_V1, where its images have a size that the weights take."""
    import torchvision.models

    entries = torchvision.models.get_model_weights(model)
    name = (weights or "DEFAULT").rpartition(".")[2]
    if weights and name not in entries.__members__ and name != "DEFAULT":
        state, digest = read_weights(weights)
        size = _arguments(model, state).get("image_size")
        likely = sorted(entries, key=lambda e: (e.name != "IMAGENET1K_V1", e is not entries.DEFAULT))
        return next((e for e in likely if size in (None, e.transforms().crop_size[0])), likely[0]), state, digest
    entry = entries.DEFAULT if name == "DEFAULT" else entries[name]
    try:
        entry.get_state_dict(progress=False, check_hash=True)  # fetched into torch's cache where it is not there yet
    except (urllib.error.URLError, OSError, RuntimeError) as fault:
        raise BadRequest(f"--weights: {model}'s {entry.name} is not in torch's cache and cannot be fetched ({printable(fault)}); name a file with --weights, or put {Path(entry.url).name} into {torch.hub.get_dir()}/checkpoints") from None
    return entry, *read_weights(str(Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)))


def _torchvision_preprocessing(entry) -> Preprocessing:
    recipe = entry.transforms()
    return Preprocessing(recipe.resize_size[0], recipe.crop_size[0], recipe.interpolation.value, tuple(recipe.mean), tuple(recipe.std))


def _promised(entry) -> float | None:
    """Top-1 of published weights on ImageNet val, 0..1."""
    percent = entry.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return percent / 100 if percent else None


def _check_finite(network: torch.nn.Module, origin: str) -> None:
    bad = [name for name, value in network.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise BadRequest(f"--weights: {printable(origin)} has values that are not finite (NaN or infinity) in {printable(', '.join(bad[:3]))}; give weights of a training that did not diverge")
