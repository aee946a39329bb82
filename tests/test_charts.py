"""The charts of the experiments: plain texts, and curves that are told apart without colour."""

import numpy as np
import pytest

from jobs import charts

WORDS = charts.Words("A title", "across", "up")
TWO_LAYERS = [(layer, [value - 0.01 for value in layer], [value + 0.01 for value in layer]) for layer in ([0.3, 0.02], [0.05, 0.004, 1e-15])]  # two of them reach below 0
BAND = ([0.1, 0.2, 0.4], [0.05, 0.1, 0.3], [0.2, 0.3, 0.5])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as matplotlib has them."""
    figures, save = [], charts.save
    monkeypatch.setattr(charts, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def ticks(figure, axis: str) -> list[str]:
    """The labels within the axis."""
    axes = figure.axes[0]
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")() if low <= label.get_position()["xy".index(axis)] <= high]


def test_a_logarithmic_axis_has_plain_numbers(tmp_path, drawn):
    """Texts of strangers are no formulas, so the axis must not rely on formulas either."""
    charts.within_layers(tmp_path / "s", {"all": TWO_LAYERS}, ["conv1", "conv2"], WORDS, log=True)
    labels = ticks(drawn[0], "y")
    assert "0.1" in labels and all(float(label) > 0 for label in labels)


def test_filters_that_are_almost_dead_do_not_flatten_the_others(tmp_path, drawn):
    charts.within_layers(tmp_path / "s", {"all": TWO_LAYERS}, ["conv1", "conv2"], WORDS, log=True)
    low, high = drawn[0].axes[0].get_ylim()
    assert 1e-5 < low < 0.004 and high > 0.3


def test_curves_are_told_apart_without_colour(tmp_path, drawn):
    charts.curves(tmp_path / "c", [1, 5, 20], {f"curve {i}": BAND for i in range(len(charts.STYLES))}, WORDS, log=True)
    lines = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("curve")]
    assert len(lines) == 6 and len({line.get_marker() for line in lines}) == 6 and len({line.get_linestyle() + str(line._dash_pattern) for line in lines}) == 6
    assert ticks(drawn[0], "x") == ["1", "5", "20"]


def test_every_point_of_a_plane_stands_where_it_is_said(tmp_path, drawn):
    interval = lambda x: {"estimate": x, "low": x - 0.05, "high": x + 0.05}  # noqa: E731
    charts.plane(tmp_path / "p", {"a": [[(interval(0.1), interval(0.4), "5"), (interval(0.2), interval(0.6), "20")], [(interval(0.7), interval(0.3), "")]]}, WORDS)
    first, second = (line for line in drawn[0].axes[0].lines if line.get_marker() == "o")
    assert np.allclose(first.get_xydata(), [[0.1, 0.4], [0.2, 0.6]]) and np.allclose(second.get_xydata(), [[0.7, 0.3]])
    assert {"5", "20"} <= {text.get_text() for text in drawn[0].axes[0].texts}
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().texts] == ["a"]
    assert {"0", "0.1", "0.4"} <= set(ticks(drawn[0], "x"))


def test_a_single_place_has_its_interval_too(tmp_path, drawn):
    charts.curves(tmp_path / "c", [20], {"a": ([0.2], [0.1], [0.3])}, WORDS, log=True)
    segments = [segment.tolist() for collection in drawn[0].axes[0].collections if hasattr(collection, "get_segments") for segment in collection.get_segments()]
    assert segments == [[[20, 0.1], [20, 0.3]]]


def test_a_sweep_is_joined_by_its_rates_and_one_rate_by_its_sizes():
    """Steps of the whole network have no number of filters beside them; single numbers are of the default rate where there is one."""
    from jobs.finetune import _lines, _of

    effect = lambda strategy, k, rate: {"strategy": strategy, "k": k, "rate": rate, "broken": {"estimate": rate}, "neighbors_corrected": {"estimate": k}}  # noqa: E731
    sweep = {"rates": [0.1, 0.5, 2.0], "effects": [effect(s, k, r) for s, ks in (("salient", (1, 20)), ("all", (2032,))) for r in (0.1, 0.5, 2.0) for k in ks]}
    shape = lambda lines: [[(across["estimate"], up["estimate"], text) for across, up, text in line] for line in lines]  # noqa: E731
    assert shape(_lines(sweep, "salient")) == [[(0.1, 1, ""), (0.5, 1, ""), (2.0, 1, "1")], [(0.1, 20, ""), (0.5, 20, ""), (2.0, 20, "20")]]
    assert shape(_lines(sweep, "all")) == [[(0.1, 2032, ""), (0.5, 2032, ""), (2.0, 2032, "")]]
    one = {"rates": [0.5], "effects": [effect("salient", k, 0.5) for k in (1, 20)]}
    assert shape(_lines(one, "salient")) == [[(0.5, 1, "1"), (0.5, 20, "20")]]
    assert _of(sweep, "salient")["rate"] == 0.5 and _lines(sweep, "least") == []


CHARTS = {
    "curves": lambda path, names: charts.curves(path, [1, 5, 20], {name: BAND for name in names}, WORDS, {"by chance": 0.1}),
    "by layer": lambda path, names: charts.by_layer(path, {name: BAND for name in names}, ["a", "b", "c"], WORDS),
    "within layers": lambda path, names: charts.within_layers(path, {name: TWO_LAYERS for name in names}, ["a", "b"], WORDS),
    "plane": lambda path, names: charts.plane(path, {name: [[({"estimate": x, "low": x, "high": x},) * 2 + ("",) for x in (0.0, 0.3, 0.9)]] for name in names}, WORDS),
}


@pytest.mark.parametrize("names", [("a", "b"), ("most salient", "random", "random, live alone", "least salient, live alone", "whole network", "all conv weights"), ("a name that is as long as a data set may be called " * 2, "b")], ids=["two", "six", "long"])
@pytest.mark.parametrize("chart", CHARTS)
def test_what_is_said_of_the_curves_hides_none_of_them(tmp_path, drawn, chart, names):
    """Legend and title lie above the axes, one below the other; names of levels beside them."""
    CHARTS[chart](tmp_path / "c", names)
    figure = drawn[0]
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    inside, legend, title = axes.get_window_extent(), axes.get_legend().get_window_extent(renderer), axes._left_title.get_window_extent(renderer)
    assert inside.y1 <= legend.y0 < legend.y1 <= title.y0 and title.y1 <= figure.bbox.y1 and [text.get_text() for text in axes.get_legend().texts] == list(names)
    for text in axes.texts:
        if text.get_text().startswith("by chance"):
            assert text.get_window_extent(renderer).x0 >= inside.x1 and text.get_window_extent(renderer).x1 <= figure.bbox.x1


def test_filters_have_the_intervals_that_they_are_given(tmp_path, drawn):
    """A band in each layer, none between layers."""
    charts.within_layers(tmp_path / "s", {"all": TWO_LAYERS}, ["conv1", "conv2"], WORDS)
    (band,) = drawn[0].axes[0].collections
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    for x, low, high in ((0.25, 0.29, 0.31), (0.75, 0.01, 0.03), (1 + 1 / 6, 0.04, 0.06), (1.5, -0.006, 0.014)):
        at = corners[np.isclose(corners[:, 0], x)][:, 1]
        assert at.min() == pytest.approx(low) and at.max() == pytest.approx(high)
    assert len(band.get_paths()) == 2


def test_names_of_layers_are_told_apart(tmp_path, drawn):
    """SqueezeNet's differ in the middle, and where a name is too long its end is what another's is."""
    fires = [f"features.{i}.{part}" for i in (3, 4, 6, 7, 9, 10, 11, 12) for part in ("squeeze", "expand1x1", "expand3x3")]
    blocks = [f"features.denseblock{b}.denselayer{i}.a_module_of_modules.conv{j}" for b in (1, 2, 3) for i in (1, 2, 3) for j in (1, 2)]
    for layers in (["features.0", *fires, "classifier.1"], blocks, ["x" * 300 + str(i) + "y" * 300 for i in range(4)]):
        charts.by_layer(tmp_path / "l", {"a": ([0.0] * len(layers),) * 3}, layers, WORDS)
        shown = ticks(drawn[-1], "x")
        assert len(set(shown)) == len(shown) == min(charts.NAMED, len(layers))
        if layers[1:-1] == fires:
            assert set(shown) <= set(layers), "these are short enough to be written out"
