"""Names are torchvision's, the CIFAR networks' or a factory's; filters have one order."""

import re
import sys

import pytest
import torch
import torchvision.models
from safetensors.torch import save_file
from torch import nn

from pipeline import models
from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout, coverage
from pipeline.samples import PRESETS, Preprocessing


def equal(network: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = network.state_dict()
    return all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in state.items())


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, near", [("resnet5O", "resnet50"), ("resnet21", "resnet20"), ("squeezenet", "squeezenet1_1"), ("", ""), ("fasterrcnn_resnet50_fpn", "")])
def test_unknown_name_suggests(name, near):
    """The closest ones, the CIFAR networks among them; a detector is no classifier."""
    with pytest.raises(BadRequest, match=f"^--model: there is no '{name}'; close to it: .*{near}.*module:factory"):
        models.load(name, None, None)


def test_cifar_network_needs_weights():
    with pytest.raises(BadRequest, match="^--weights: resnet56 comes without weights; name a .safetensors or .pth file"):
        models.load("resnet56", None, None)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(
        "import torch\n"
        "def net():\n    torch.manual_seed(1)\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))\n"
        "def small():\n    torch.manual_seed(1)\n    n = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))\n    n.class_names = ('a', 'b')\n    return n\n"
        "def text():\n    n = small()\n    n.preprocessing, n.class_names = 'resize=30,crop=28,interpolation=bicubic', ['a', 2]\n    return n\n"
        "def otherwise():\n    n = small()\n    n.preprocessing, n.class_names = torch.nn.Identity(), {'a': 1}\n    return n\n"
        "def dictionary():\n    return {}\n"
        "def needs(x):\n    return x\n"
        "def ends():\n    raise SystemExit(0)\n"
        "def breaks():\n    raise OSError('no\\x1b[2J disk')\n"
    )
    (tmp_path / "script.py").write_text("import sys\n\ndef net():\n    pass\n\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("made_here", None)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere_at_all:net", "nowhere_at_all:net cannot be made .ModuleNotFoundError"),
        ("made_here:absent", "made_here:absent cannot be made .AttributeError"),
        ("made_here:dictionary", "made_here:dictionary gave a dict, not a torch.nn.Module"),
        ("made_here:needs", "cannot be made .TypeError"),
        ("made_here:breaks", r"cannot be made .OSError: no\\x1b\[2J disk"),
        ("made_here:ends", "made_here:ends cannot be made .SystemExit: 0"),
        ("script:net", "script:net cannot be made .SystemExit: 0"),
        ("made_here:", "cannot be made"),
        (":net", "cannot be made"),
    ],
)
def test_factory_that_fails_is_named(factories, name, message):
    with pytest.raises(BadRequest, match=f"^--model: .*{message}"):
        models.load(name, None, "cifar")


def test_factory_must_say_its_preprocessing_or_be_told(factories):
    with pytest.raises(BadRequest, match="^--preprocess: made_here:small does not say how its images are prepared"):
        models.load("made_here:small", None, None)
    got = models.load("made_here:small", None, "cifar")
    assert got.preprocessing == PRESETS["cifar"] and got.class_names == ("a", "b") and not got.network.training


def test_factory_says_its_preprocessing_as_text_or_as_itself(factories):
    """Parts of --preprocess change it; an attribute that means something else to its author says nothing here."""
    got = models.load("made_here:text", None, "crop=none")
    assert got.preprocessing == Preprocessing(30, None, "bicubic") and got.class_names == ("a", "2")
    with pytest.raises(BadRequest, match="^--preprocess: made_here:otherwise does not say how"):
        models.load("made_here:otherwise", None, None)
    got = models.load("made_here:otherwise", None, "cifar")
    assert got.preprocessing == PRESETS["cifar"] and got.class_names is None


def test_network_survives_the_run_directory(factories):
    """The weights that a factory brought, buffers too, come back bit for bit under the same digest, whatever the factory draws then."""
    got = models.load("made_here:small", None, "cifar")
    got.network[1].running_mean.fill_(0.3)
    models.save_weights(got.network, factories / "weights.safetensors")
    again = models.restore("made_here:small", factories / "weights.safetensors")
    assert equal(again, got.network.state_dict()) and models.digest_of(again) == models.digest_of(got.network) != got.weights_sha256
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert not [p for p in factories.iterdir() if p.name.startswith(".")]


def test_tied_weights_survive_the_run_directory(tmp_path):
    """safetensors refuses tensors that share memory."""
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    network[1].weight = network[0].weight
    models.save_weights(network, tmp_path / "w.safetensors")
    assert equal(network, models.read_weights(str(tmp_path / "w.safetensors"))[0])


def test_digest_is_of_names_shapes_and_values():
    one = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    digests = {models.digest_of(one)}
    with torch.no_grad():
        one[0].weight[0, 0] = torch.nextafter(one[0].weight[0, 0], torch.ones(()))
    digests.add(models.digest_of(one))
    one[0].weight = nn.Parameter(one[0].weight.detach().reshape(3, 4, 1, 1))
    digests.add(models.digest_of(one))
    digests.add(models.digest_of(nn.ModuleDict({"a": one[0]})))
    assert len(digests) == 4


# ---- torchvision ---------------------------------------------------------------------------------------------------


def layout(name: str) -> FilterLayout:
    with torch.device("meta"):
        return FilterLayout.of(models.build(name))


@pytest.mark.parametrize("name, filters", [("resnet50", 26_560), ("vgg19", 5_504), ("densenet121", 10_240), ("inception_v3", 18_112), ("resnet56", 2_032)])
def test_filters_of_the_paper(name, filters):
    """As many as the authors published statistics for, in the order of the 4-D weights in named_parameters."""
    own = layout(name)
    assert own.total == filters
    with torch.device("meta"):
        assert [n for n, _ in own.layers] == [n.removesuffix(".weight") for n, p in models.build(name).named_parameters() if p.dim() == 4]


def test_auxiliary_heads_and_projections_have_their_place():
    assert "AuxLogits.conv0.conv" in layout("inception_v3").slices and layout("resnet50").locate(448)[0] == "layer1.0.downsample.0"


@pytest.mark.parametrize(
    "name, share, warning",
    [
        ("resnet56", 0.9945, None),
        ("squeezenet1_1", 0.9968, None),
        ("vgg19", 0.1393, None),
        ("vit_b_32", 0.0267, "VisionTransformer has one 4-D weight, conv_proj, which holds 2.7% of its parameters: its profile is that layer alone"),
        ("convnext_tiny", 0.0657, "the 4-D weights of ConvNeXt hold 6.6% of its parameters: its profile says nothing of the other layers"),
        ("alexnet", 0.0404, "the 4-D weights of AlexNet hold 4.0% of its parameters: its profile says nothing of the other layers"),
    ],
)
def test_network_whose_profile_is_a_small_part_of_it_is_told(name, share, warning):
    """VGG's dense layers are large, and yet a tenth of its weights is in filters."""
    with torch.device("meta"):
        got = coverage(models.build(name))
    assert round(got[0], 4) == share and got[1] == warning


def test_one_layer_is_one_layer_however_large():
    """And a weight that two layers share counts once, as in the vector."""
    share, warning = coverage(nn.Sequential(nn.Conv2d(3, 4, 2, bias=False)))
    assert share == 1 and warning == "Sequential has one 4-D weight, 0, which holds 100.0% of its parameters: its profile is that layer alone"
    network = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    assert coverage(network) == (32 / 48, None)


def test_files_of_densenet_say_their_names_in_the_old_way():
    """torchvision's own checkpoints have `norm.1.weight` where its module has `norm1.weight`, and its loader translates."""
    torch.manual_seed(0)
    source, target = models.build("densenet121"), models.build("densenet121")
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value for name, value in source.state_dict().items() if "num_batches" not in name}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    models.fit(target, old, "densenet121")
    assert equal(target, {name: value for name, value in source.state_dict().items() if "num_batches" not in name})


def test_files_of_vision_transformers_say_their_names_in_the_old_way():
    """`mlp.linear_1` and `mlp.linear_2` are `mlp.0` and `mlp.3` in torchvision's module."""
    with torch.device("meta"):
        network = models.build("vit_b_32")
        old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): torch.empty_like(value) for name, value in network.state_dict().items()}
        assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in old
        models.fit(network, old, "vit_b_32")


def constants(network: nn.Module, value: float = 0.5) -> dict[str, torch.Tensor]:
    """A state dict with one number in all of it: small on disk, however large the network."""
    return {name: torch.full((), value, dtype=v.dtype).expand(v.shape) for name, v in network.state_dict().items()}


@pytest.mark.parametrize("size, crop", [(224, 224), (384, 384), (512, 224)])
def test_vision_transformer_is_built_for_the_images_of_its_weights(tmp_path, size, crop):
    """Its position embedding tells their size; the preprocessing is that of the released weights for this size, or of IMAGENET1K_V1."""
    with torch.device("meta"):
        made = torchvision.models.vit_b_16(image_size=size)
    torch.save(constants(made), tmp_path / "w.pth")
    got = models.load("vit_b_16", str(tmp_path / "w.pth"), None)
    assert got.network.image_size == size and got.preprocessing.crop == crop and (got.network.encoder.pos_embedding == 0.5).all()
    torch.save(constants(made) | {"encoder.pos_embedding": torch.zeros(7)}, tmp_path / "w.pth")
    with pytest.raises(BadRequest, match=r"encoder.pos_embedding is \[7\] where the network has \[1, 197, 768\]"):
        models.load("vit_b_16", str(tmp_path / "w.pth"), None)


@pytest.mark.parametrize("name, lost", [("googlenet", 256), ("inception_v3", 896)])
def test_auxiliary_heads_may_be_missing(tmp_path, name, lost):
    """torchvision drops GoogLeNet's when it loads weights, so a state dict saved from there has none. They are part of the vector where the file has them."""
    with torch.device("meta"):
        whole, bare = models.build(name), torchvision.models.get_model(name, weights=None, aux_logits=False, init_weights=False)
    for network in (whole, bare):
        torch.save(constants(network), tmp_path / "w.pth")
        got = models.load(name, str(tmp_path / "w.pth"), None)
        models.save_weights(got.network, tmp_path / "weights.safetensors")
        again = models.restore(name, tmp_path / "weights.safetensors")
        assert FilterLayout.of(again) == FilterLayout.of(got.network) == FilterLayout.of(network)
    assert FilterLayout.of(whole).total - FilterLayout.of(bare).total == lost


def test_weights_need_no_record_of_versions(tmp_path):
    """MNASNet's own loader demands one, which no safetensors file and no stripped state dict has."""
    torch.manual_seed(0)
    network = models.build("mnasnet0_5")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    got = models.load("mnasnet0_5", str(tmp_path / "w.safetensors"), None)
    models.save_weights(got.network, tmp_path / "weights.safetensors")
    assert equal(models.restore("mnasnet0_5", tmp_path / "weights.safetensors"), network.state_dict())


def test_weights_file_means_imagenet1k_v1(tmp_path):
    """Its preprocessing and class names, not those of newer weights; a file for Inception means its input transform."""
    torch.manual_seed(0)
    save_file({name: value.clone() for name, value in models.build("squeezenet1_1").state_dict().items()}, tmp_path / "w.safetensors")
    got = models.load("squeezenet1_1", str(tmp_path / "w.safetensors"), None)
    assert got.preprocessing == PRESETS["imagenet"] and len(got.class_names) == 1000 and got.class_names[2] == "great white shark"
    with torch.device("meta"):
        assert models.build("inception_v3").transform_input and models.build("googlenet").transform_input


def test_weights_that_cannot_be_fetched_are_named(monkeypatch, tmp_path):
    """On a machine without a network: which file goes where."""
    import urllib.error

    import torchvision

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(BadRequest, match=r"^--weights: squeezenet1_1's IMAGENET1K_V1 is not in torch's cache .*put squeezenet1_1-b8a52dc0.pth into .*checkpoints"):
        models.load("squeezenet1_1", "SqueezeNet1_1_Weights.IMAGENET1K_V1", None)
