"""The charts of the experiments: plain texts, and curves that are told apart without colour."""

import numpy as np
import pytest

from jobs import charts

WORDS = charts.Words("A title", "across", "up")
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
    charts.within_layers(tmp_path / "s", {"all": [[0.3, 0.02], [0.05, 0.004, 1e-15]]}, ["conv1", "conv2"], WORDS, log=True)
    labels = ticks(drawn[0], "y")
    assert "0.1" in labels and all(float(label) > 0 for label in labels)


def test_filters_that_are_almost_dead_do_not_flatten_the_others(tmp_path, drawn):
    charts.within_layers(tmp_path / "s", {"all": [[0.3, 0.02], [0.05, 0.004, 1e-15]]}, ["conv1", "conv2"], WORDS, log=True)
    low, high = drawn[0].axes[0].get_ylim()
    assert 1e-5 < low < 0.004 and high > 0.3


def test_curves_are_told_apart_without_colour(tmp_path, drawn):
    charts.curves(tmp_path / "c", [1, 5, 20], {f"curve {i}": BAND for i in range(len(charts.STYLES))}, WORDS, log=True)
    lines = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("curve")]
    assert len(lines) == 6 and len({line.get_marker() for line in lines}) == 6 and len({line.get_linestyle() + str(line._dash_pattern) for line in lines}) == 6
    assert ticks(drawn[0], "x") == ["1", "5", "20"]


def test_every_point_of_a_plane_stands_where_it_is_said(tmp_path, drawn):
    interval = lambda x: {"estimate": x, "low": x - 0.05, "high": x + 0.05}  # noqa: E731
    charts.plane(tmp_path / "p", {"a": [(interval(0.1), interval(0.4), "5"), (interval(0.2), interval(0.6), "20")]}, WORDS)
    (line,) = (line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert np.allclose(line.get_xydata(), [[0.1, 0.4], [0.2, 0.6]])
    assert {"5", "20"} <= {text.get_text() for text in drawn[0].axes[0].texts}
