"""The radar chart: drawable whatever the agents are called, its range from the data."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from eval.results.figures import Line, radar_png, radial_range


def picture(lines: list[Line]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning, and a box in the chart
        return Image.open(io.BytesIO(radar_png(lines))).convert("RGB")


def made(name: str, value: float = 1.0, *, complete: bool = True) -> Line:
    return Line(name, np.linspace(value, value + 0.1, 8), complete)


def test_is_a_columns_width() -> None:
    image = picture([made("one"), made("two", 0.9)])
    assert image.width == round(3.35 * 300)
    assert len(image.getcolors(maxcolors=1_000_000) or []) > 10


@pytest.mark.parametrize(
    "name", ["孙悟空", "_hidden", "$x_1$ $", "\\frac", "🙂", "", "x" * 300, "العربية", "a\u0301", "%s {} \\n"]
)
def test_odd_names_do_not_break_it(name: str) -> None:
    picture([made(name), made("other", 0.8, complete=False)])


def test_names_show_up_in_the_legend_even_behind_an_underscore() -> None:
    with_name, without = picture([made("_______")]), picture([made(" ")])
    assert with_name.tobytes() != without.tobytes()


def test_many_agents_fit() -> None:
    few, many = (picture([made(f"agent {i}", 1 - i / 100) for i in range(n)]) for n in (10, 40))
    assert many.width == few.width
    assert many.height <= few.height + 40  # ten by name, one line for all the others


def test_nothing_to_draw() -> None:
    assert radar_png([]) == b""
    assert radar_png([Line("x", np.full(8, np.nan))]) == b""


def test_gaps_and_extremes() -> None:
    gap = np.array([1, 1, np.nan, 1, 1, 1, 1, 1.0])
    picture(
        [Line("gap", gap), Line("none", np.full(8, np.nan)), Line("zero", np.zeros(8)), Line("ten", np.full(8, 10.0))]
    )


@pytest.mark.parametrize(
    "values", [[1.0], [0.84, 1.22], [0.0], [0.0, 10.0], [0.999, 1.001, np.nan], [0.001, 9e9], [0.0, 1e300]]
)
def test_range_holds_the_data_and_round_circles(values: list[float]) -> None:
    low, high, ticks = radial_range(np.array(values))
    assert low < np.nanmin(values) <= np.nanmax(values) < high
    assert 1 <= len(ticks) <= 7 and all(low < tick < high for tick in ticks)
    assert min(ticks) >= 0


def test_range_follows_the_data() -> None:
    low, high, ticks = radial_range(np.array([0.778, 1.219]))
    assert low > 0.65 and high < 1.3
    assert ticks == [0.8, 0.9, 1.0, 1.1, 1.2]
