"""What a benchmark says: a figure, its baseline, and what was promised.

Machines are noisy and differ; a ratio within one run is what can be compared. Nothing here asserts:
a figure that falls short is printed as such, and the reader decides.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """One line of the report.

    `value` and `baseline` are in `unit`; `ratio` is value/baseline. `at_least`/`at_most` bound the
    ratio if there is a baseline, else the value.
    """

    what: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_is: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over baseline."""
        return None if not self.baseline else self.value / self.baseline

    @property
    def verdict(self) -> str:
        """Whether the promise holds: "yes", "NO", or "" where none was made."""
        compared = self.value if self.ratio is None else self.ratio
        if self.at_least is not None:
            return "yes" if compared >= self.at_least else "NO"
        if self.at_most is not None:
            return "yes" if compared <= self.at_most else "NO"
        return ""

    @property
    def promise(self) -> str:
        """The bound, as text."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


HEAD = "| what | measured | baseline | ratio | promised | kept |\n|---|---|---|---|---|---|"
"""What stands above the rows of a report."""


def row(figure: Figure) -> str:
    """Render one line of the table."""
    against = (
        f"{amount(figure.baseline)} {figure.unit} ({figure.baseline_is})"
        if figure.baseline is not None
        else "-"
    )
    ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
    return (
        f"| {figure.what} | {amount(figure.value)} {figure.unit} | {against} | {ratio} "
        f"| {figure.promise or '-'} | {figure.verdict or '-'} |"
    )


def amount(value: float) -> str:
    """Render a number with three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percentile(ordered: list[int], share: float) -> float:
    """Return the value below which `share` (0-1) of the sorted values lie."""
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
