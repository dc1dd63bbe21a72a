"""The drawings are SVG that shows what it was given."""

from __future__ import annotations

from xml.etree import ElementTree

from blip2 import drawing

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_as_their_numbers_within_a_group():
    root = ElementTree.fromstring(drawing.bars({"a & b": {"fast": 1.0, "slow": 4.0}, "c": {"fast": 9.0}}))
    widths = [float(each.get("width", 0)) for each in root.iter(f"{SVG}rect")][1:]  # the first is the page
    assert abs(widths[1] - 4 * widths[0]) <= 0.5  # one digit after the point is written
    assert widths[2] == widths[1]
    assert {"a & b", "fast", "slow", "4 s"} <= {each.text for each in root.iter(f"{SVG}text")}


def test_curves_start_at_zero_and_name_their_axis():
    root = ElementTree.fromstring(drawing.curves({"loss": [(0, 2.0), (10, 1.0)]}, "batch", (200, 100)))
    (line,) = root.iter(f"{SVG}polyline")
    first, last = ([float(part) for part in point.split(",")] for point in (line.get("points") or "").split())
    assert (first[1], last[1]) == (12.0, 44.0)  # the top, and half of the way down to the axis
    assert "batch 10" in {each.text for each in root.iter(f"{SVG}text")}


def test_shares_stand_over_their_probabilities():
    root = ElementTree.fromstring(drawing.reliability({"a & b": [(0.0, 0.0, 0.0, 0.1), (1.0, 0.5, 0.4, 1.0)]}, 100))
    places = [(float(each.get("cx", 0)), float(each.get("cy", 0))) for each in root.iter(f"{SVG}circle")]
    assert places == [(44.0, 112.0), (144.0, 62.0)]  # the corner of the square, and half of the way up its right side
    assert "a & b" in {each.text for each in root.iter(f"{SVG}text")}


def test_nothing_to_draw_is_an_empty_page():
    for page in (drawing.bars({}), drawing.curves({}), drawing.reliability({})):
        assert ElementTree.fromstring(page).tag == f"{SVG}svg"


def test_curves_below_zero_stay_on_the_picture():
    root = ElementTree.fromstring(drawing.curves({"reward": [(0, -0.5), (10, -2.0)], "lm": [(0, 2.0), (10, 1.0)]}))
    heights = [
        float(point.split(",")[1])
        for line in root.iter()
        if "points" in line.attrib
        for point in line.attrib["points"].split()
    ]
    assert 12 <= min(heights) < max(heights) == 276


def test_curves_on_which_nothing_changes_are_drawn():
    for value in (0.0, -1.0):
        assert "nan" not in drawing.curves({"reward": [(0, value), (10, value)]})
    heights = drawing.curves({"reward": [(0, 0.0), (10, -5.0)]}).split('points="')[1].split('"')[0]
    assert heights == "40.0,12.0 712.0,276.0"
