"""Layout and looks: labels that never collide, colours that stay, limits that show everything."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import matplotlib as mpl
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from analysis.sheet import Sheet, paper_style, spread
from analysis.style import draw_references, looks, method_label, scenario_title, set_limits, two_digits

POSITIONS = st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=8)


@given(POSITIONS, st.floats(0.01, 1.0))
def test_spread_keeps_order_distance_and_bounds(positions, gap):
    placed = spread(positions, gap, 0.0, 10.0)
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    for lower, upper in pairwise(order):
        assert placed[upper] - placed[lower] >= gap - 1e-9
    assert min(placed) >= -1e-9
    assert max(placed) <= 10.0 + 1e-9


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True))
def test_spread_leaves_alone_what_does_not_collide(positions):
    assert spread(positions, 1.0, 0.0, 20.0) == pytest.approx(positions)


def test_spread_centres_a_collision():
    # 5.0 and 5.2 with gap 1: their middle 5.1 stays, half a gap to each side
    assert spread([5.2, 5.0, 9.0], 1.0, 0.0, 10.0) == pytest.approx([5.6, 4.6, 9.0])


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.1], [0.0, 1.0]), ([10.0, 9.9], [10.0, 9.0])], ids=["floor", "ceiling"]
)
def test_spread_stays_inside_at_the_ends(values, expected):
    assert spread(values, 1.0, 0.0, 10.0) == pytest.approx(expected)


def boxes(figure):
    """Extents in pixels of all texts that are drawn; ticks outside the limits are not."""
    renderer = figure.canvas.get_renderer()
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label]]
    texts += [title for axes in figure.axes for title in axes.findobj(Text) if title.get_text().startswith("Panel")]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_text_of_a_sheet_overlaps_or_leaves_it(count):
    players = pd.DataFrame({"player": ["random", "ignores_prompt", "hole_avoiding", "optimal"]})
    players["value"] = [0.0, 0.01, 0.02, 1.0]
    with paper_style():
        sheet = Sheet([f"Panel {place}" for place in range(count)], rows=2)
        for column in range(count):
            for row in range(2):
                axes = sheet.axes(column, row)
                axes.plot([0, 40], [0, 1])
                axes.set(xlabel="updates", ylabel="held-out success rate", ylim=(-0.03, 1.03))
                draw_references(sheet, axes, players)
        sheet.legend([Line2D([], [], label=f"method number {place}") for place in range(9)])
        figure = sheet.finish()
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        found = [*boxes(figure), ("legend", figure.legends[0].get_window_extent())]
    assert len(found) > 8 * count
    for text, box in found:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    for (one, a), (other, b) in combinations(found, 2):
        overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
        overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert overlap_x <= 0.5 or overlap_y <= 0.5, (one, other)


@pytest.mark.parametrize(("count", "width"), [(1, 3.4), (2, 6.8), (5, 6.8)])
def test_a_sheet_fits_the_columns_of_a_page(count, width):
    with paper_style():
        assert Sheet(["panel"] * count).finish().get_size_inches()[0] == pytest.approx(width)


def test_a_sheet_needs_a_panel():
    with pytest.raises(ValueError, match="at least one panel"):
        Sheet([])


def test_style_is_the_papers_whatever_the_user_has_set():
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "red", "pdf.fonttype": 3}):
        with paper_style():
            assert mpl.rcParams["font.size"] == 7
            assert mpl.rcParams["axes.facecolor"] == "white"
            assert mpl.rcParams["pdf.fonttype"] == 42
        assert mpl.rcParams["font.size"] == 31


def test_known_samplers_look_the_same_in_any_company():
    with paper_style():
        alone = looks(["abs_adv"])["abs_adv"]
        together = looks(["aaa", "uniform", "abs_adv"])
    assert together["abs_adv"] == alone
    assert together["uniform"].colour == "#0072B2"
    assert alone.colour == "#D55E00"


def test_no_two_methods_look_alike():
    with paper_style():
        style = looks([f"m{place}" for place in range(20)])
    assert len({(look.colour, look.marker, look.dashes) for look in style.values()}) == 20
    first = list(style.values())[:5]
    assert len({look.colour for look in first}) == len({look.marker for look in first}) == 5


@pytest.mark.parametrize(
    ("method", "label"),
    [("uniform", "uniform"), ("abs_adv", "abs_adv (AAW)"), ("abs_adv, optim.lr=1", "abs_adv (AAW), optim.lr=1")],
)
def test_method_labels(method, label):
    assert method_label(method) == label


def test_scenario_titles_name_a_transfer():
    assert scenario_title("snake", "snake") == "Snake"
    assert scenario_title("snake", "snake_20") == "Snake → Snake, 20 turns"
    assert scenario_title("maze", "maze") == "maze"


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([0.2, 0.6], True, (-0.03, 1.03)),
        ([0.2, 0.5], True, (-0.015, 0.515)),
        ([0.0, 5.0], True, (-0.3, 5.3)),
        ([-1.0, 1.0], False, (-1.12, 1.12)),
        ([2.0, 2.0], False, (1.9, 2.1)),
        ([1.0, math.nan], False, (0.95, 1.05)),
        ([0.0, math.inf, 1.0], False, (-0.06, 1.06)),
    ],
)
def test_limits(values, share, expected):
    axes = Figure().add_subplot()
    set_limits(axes, pd.DataFrame({"mean": values}), share=share)
    assert axes.get_ylim() == pytest.approx(expected)


def test_limits_without_numbers_are_left_alone():
    axes = Figure().add_subplot()
    before = axes.get_ylim()
    set_limits(axes, pd.DataFrame({"mean": [math.nan]}))
    assert axes.get_ylim() == before


@pytest.mark.parametrize(("value", "text"), [(-0.001, "0.00"), (-0.126, "−0.13"), (2.0, "2.00")])
def test_two_digits_know_no_negative_zero(value, text):
    assert two_digits(value) == text
