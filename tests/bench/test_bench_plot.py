"""What the picture of the figures shows."""

from xml.etree import ElementTree as ET

from bench.figure import Figure
from bench.plot import draw

WHERE = "2026-11-28, <a machine>"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(*figures):
    """Return the bars (left, right, colour), without the background, and all texts."""
    root = ET.fromstring(draw(list(figures), WHERE))
    bars = [
        (float(bar.get("x")), float(bar.get("x")) + float(bar.get("width")), bar.get("fill"))
        for bar in root.iter(f"{NAMESPACE}rect")
        if bar.get("x")
    ]
    return bars, [text.text for text in root.iter(f"{NAMESPACE}text")]


def test_a_bar_goes_right_where_the_aim_is_reached_and_left_where_it_is_missed():
    better = Figure("twice the aim", 4.0, "/s", 2.0, "plain", at_least=1.0)
    worse = Figure("half of it", 1.0, "/s", 2.0, "plain", at_least=1.0)
    slow = Figure("twice as long as it may", 1.0, "s", at_most=0.5)
    (aim, right, kept), (left, middle, missed), slow_bar = drawn(better, worse, slow)[0]
    assert left < middle == aim < right
    assert right - aim == aim - left
    assert slow_bar == (left, middle, missed)
    assert kept != missed


def test_figures_without_an_aim_are_not_drawn():
    bars, texts = drawn(Figure("only told", 3.0, "us"))
    assert bars == []
    assert f"make bench: {WHERE}" in texts
    assert not any("only told" in text for text in texts)


def test_a_bar_stays_in_the_picture():
    huge = Figure("far beyond", 1e9, "/s", 1.0, "plain", at_least=1.0)
    none = Figure("nothing at all", 0.0, "/s", 1.0, "plain", at_least=1.0)
    root = ET.fromstring(draw([huge, none], WHERE))
    width = float(root.get("width"))
    assert all(0 <= left <= right <= width for left, right, _ in drawn(huge, none)[0])
