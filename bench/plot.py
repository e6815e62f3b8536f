"""The figures that have an aim, as a picture: how far each is from it.

SVG is text, so nothing is needed to draw it. One bar per figure, on a logarithmic scale: to the
right of the line the aim is reached. Where less is better, the bar is the aim divided by the
figure.
"""

from math import log2
from xml.sax.saxutils import escape

from bench.figure import Figure, amount

_ROW, _TOP, _BOTTOM = 20, 34, 40
_TEXT_WIDTH, _BAR_WIDTH, _NOTE_WIDTH = 470, 300, 210
_LEAST, _MOST = -2, 3  # a quarter of the aim, eight times the aim
_KEPT, _MISSED = "#3a7d44", "#b3402a"
_FONT = "font-family='sans-serif' font-size='12'"


def draw(figures: list[Figure], where: str) -> str:
    """Return an SVG of the figures with an aim; `where` tells when and on what they were taken."""
    aimed = [figure for figure in figures if figure.promise]
    height = _TOP + _ROW * len(aimed) + _BOTTOM
    width = _TEXT_WIDTH + _BAR_WIDTH + _NOTE_WIDTH
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' {_FONT}>",
        "<rect width='100%' height='100%' fill='white'/>",
        _text(8, 18, f"make bench: {where}"),
    ]
    for power in range(_LEAST, _MOST + 1):
        x = _place(2.0**power)
        ink = "#222" if power == 0 else "#ccc"
        lines.append(f"<path d='M{x:.0f} {_TOP - 6}V{height - _BOTTOM + 4}' stroke='{ink}'/>")
        what = "the aim" if power == 0 else f"{2.0**power:g} x"
        lines.append(_text(x, height - _BOTTOM + 18, what, "middle"))
    for row, figure in enumerate(aimed):
        lines += _bar(figure, _TOP + _ROW * row)
    lines += [
        _text(8, height - 6, "Left of the line: short of the aim. Logarithmic."),
        "</svg>",
        "",
    ]
    return "\n".join(lines)


def _bar(figure: Figure, y: int) -> list[str]:
    """Return one row."""
    reached = _reached(figure)
    middle, end = _place(1.0), _place(reached)
    ink = _KEPT if figure.verdict == "yes" else _MISSED
    compared = (
        f"{amount(figure.value)} {figure.unit}" if figure.ratio is None else f"{figure.ratio:.2f}"
    )
    note = f"{compared} ({figure.promise.replace('>=', '≥').replace('<=', '≤')})"
    x, width, height = min(middle, end), abs(end - middle), _ROW - 7
    return [
        _text(_TEXT_WIDTH - 8, y + 14, figure.what, "end"),
        f"<rect x='{x:.0f}' y='{y + 4}' width='{width:.0f}' height='{height}' fill='{ink}'/>",
        _text(_TEXT_WIDTH + _BAR_WIDTH + 8, y + 14, note),
    ]


def _reached(figure: Figure) -> float:
    """How often the aim fits into the figure; the other way round where less is better."""
    compared = figure.value if figure.ratio is None else figure.ratio
    if figure.at_least is not None:
        return compared / figure.at_least if figure.at_least else 2.0**_MOST
    assert figure.at_most is not None
    return figure.at_most / compared if compared else 2.0**_MOST


def _place(reached: float) -> float:
    """Where a value stands, in pixels from the left."""
    power = min(max(log2(max(reached, 1e-9)), _LEAST), _MOST)
    return _TEXT_WIDTH + (power - _LEAST) / (_MOST - _LEAST) * _BAR_WIDTH


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f"<text x='{x:.0f}' y='{y}' text-anchor='{anchor}'>{escape(words)}</text>"
