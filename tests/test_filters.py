"""Ranges of layers are columns of the vector, and a layer that is not there is told from one that is."""

import pytest
from torch import nn

from pipeline.errors import BadRequest
from pipeline.filters import FilterLayout

LAYOUT = FilterLayout((("conv1", 4), ("layer1.0.conv1", 2), ("layer1.0.conv2", 3), ("layer2.0.conv1", 1)))


@pytest.mark.parametrize(
    "text, start, stop",
    [("conv1", 0, 4), ("layer1.0.conv1", 4, 6), ("conv1..layer1.0.conv1", 0, 6), ("layer1.0.conv1..layer1.0.conv2", 4, 9), ("layer1.0.conv2..", 6, 10), ("..layer1.0.conv1", 0, 6), ("..", 0, 10)],
)
def test_range_includes_both_ends(text, start, stop):
    """Also with dots in the names; either end may be left out."""
    assert LAYOUT.columns(text) == slice(start, stop)


@pytest.mark.parametrize(
    "text, message",
    [
        ("conv2", "has no layer 'conv2'; close to it: conv1"),
        ("conv1..layer9", "has no layer 'layer9'"),
        ("layer1", "has no layer 'layer1'"),
        ("conv1..layer1.0.conv1..layer2.0.conv1", "has no layer 'layer1.0.conv1..layer2.0.conv1'"),
        ("x\x1b[2J", r"has no layer 'x\\x1b\[2J'"),
        ("layer2.0.conv1..conv1", r"'layer2.0.conv1' comes after 'conv1' in the network; write conv1..layer2.0.conv1"),
    ],
)
def test_bad_range_is_named(text, message):
    with pytest.raises(BadRequest, match=f"^--layers: .*{message}"):
        LAYOUT.columns(text)


def test_every_column_has_a_layer_and_a_channel():
    assert [LAYOUT.locate(i) for i in range(LAYOUT.total)] == [(name, i) for name, filters in LAYOUT.layers for i in range(filters)]
    for column in (-1, 10):
        with pytest.raises(IndexError):
            LAYOUT.locate(column)


def test_filters_are_output_channels_of_4d_weights_in_parameter_order():
    """Shared weights count once; linear layers, biases and BatchNorm are no filters; a range over one is refused."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, (1, 3), bias=False), nn.Conv2d(5, 5, (1, 3), bias=False), nn.Flatten(), nn.Linear(5, 2))
    network[3].weight = network[2].weight
    assert FilterLayout.of(network).layers == (("0", 5), ("2", 5))
    assert FilterLayout.from_json(FilterLayout.of(network).to_json()) == FilterLayout.of(network)
    with pytest.raises(BadRequest, match="Linear has no convolution .no 4-D weight., .*choose a convolutional network"):
        FilterLayout.of(nn.Linear(3, 2))
