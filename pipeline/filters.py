"""The filters of a network: what counts as one, their order in every vector, and ranges of layers.

This order is the meaning of the F axis everywhere: in profiles, statistics, indexes and figures. It is the order of the
4-D weights in `model.named_parameters()`, one filter an output channel (paper, section 2.1: filter-wise aggregation).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import BadRequest, closest, printable


@dataclass(frozen=True)
class FilterLayout:
    """Layers in vector order. `layers`: ((module name, filters), ...), the name without its `.weight`."""

    layers: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, model) -> FilterLayout:
        """The layout of a torch module. Raises BadRequest if it has no 4-D weight."""
        layers = tuple((name.removesuffix(".weight"), p.shape[0]) for name, p in model.named_parameters() if p.dim() == 4)
        if not layers:
            raise BadRequest(f"{type(model).__name__} has no convolution (no 4-D weight), so there is no filter to profile: choose a convolutional network")
        return cls(layers)

    @classmethod
    def from_json(cls, layers: list[dict]) -> FilterLayout:
        return cls(tuple((layer["name"], layer["filters"]) for layer in layers))

    def to_json(self) -> list[dict]:
        return [{"name": name, "filters": filters} for name, filters in self.layers]

    @cached_property
    def total(self) -> int:
        """F."""
        return sum(filters for _, filters in self.layers)

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """(layer name, output channel) of every column of a vector of F."""
        return [(name, channel) for name, filters in self.layers for channel in range(filters)]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Layer name -> its columns in a vector of F."""
        slices, start = {}, 0
        for name, filters in self.layers:
            slices[name] = slice(start, start + filters)
            start += filters
        return slices

    def columns(self, layers: str) -> slice:
        """The columns of `FIRST..LAST`, both ends included; either end may be left out, and one name is itself.

        Raises BadRequest for a layer that the network does not have, a range that runs backwards, or no name at all.
        """
        if not layers:
            raise BadRequest("--layers: it is empty; name FIRST..LAST, or leave --layers out for all of them")
        first, dots, last = layers.partition("..")
        if not dots:
            last = first
        first, last = first or self.layers[0][0], last or self.layers[-1][0]
        for name in (first, last):
            if name not in self.slices:
                raise BadRequest(f"--layers: this network has no layer '{printable(name)}'; close to it: {closest(name, self.slices)} (all of them: run.json, \"layers\")")
        columns = slice(self.slices[first].start, self.slices[last].stop)
        if columns.start >= columns.stop:
            raise BadRequest(f"--layers: '{printable(first)}' comes after '{printable(last)}' in the network; write {printable(last)}..{printable(first)}")
        return columns

    def locate(self, column: int) -> tuple[str, int]:
        """(layer name, output channel) of a column of the vector."""
        for name, columns in self.slices.items():
            if columns.start <= column < columns.stop:
                return name, column - columns.start
        raise IndexError(f"column {column} of {self.total} filters")


LEAST_SHARE = 0.1  # of the parameters, below which a profile is said to leave most of the network out


def coverage(model) -> tuple[float, str | None]:
    """(share of a torch module's parameters that its 4-D weights hold, what to warn of in one sentence or None).

    Warned of: a network with one 4-D weight alone, as a vision transformer whose one convolution cuts the image into patches, and
    one whose filters hold under a tenth of its parameters. Raises BadRequest if it has no 4-D weight.
    """
    layers, name = FilterLayout.of(model).layers, type(model).__name__
    share = sum(p.numel() for p in model.parameters() if p.dim() == 4) / sum(p.numel() for p in model.parameters())
    if len(layers) == 1:
        return share, f"{name} has one 4-D weight, {layers[0][0]}, which holds {share:.1%} of its parameters: its profile is that layer alone"
    if share < LEAST_SHARE:
        return share, f"the 4-D weights of {name} hold {share:.1%} of its parameters: its profile says nothing of the other layers"
    return share, None
