"""Error and bound over the steps, as SVG that is part of a page.

There is one plot for each topology, and all plots of a callback and dtype have the same axes. A dash is what the error
may be at a step, a mark what it is; which mark tells the world size.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from truestep_fixtures.topologies import TOPOLOGIES

# The page decides on colours: these are only names, until the picture is part of it.
_INK, _RULE, _BAD = "#010101", "#020202", "#030303"
_SERIES = {f"series{number}": f"#04040{number}" for number in range(6)}
_VARIABLES = {"ink": _INK, "rule": _RULE, "bad": _BAD} | _SERIES

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.color": _RULE,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.3,
}


class Mark(NamedTuple):
    """What runs on so many ranks are drawn with.

    Attributes:
        text: The mark as a character.
        shape: As Matplotlib calls it.
        series: Name of its colour on the page.
    """

    text: str
    shape: str
    series: str


_MARKS = [Mark(*of_mark) for of_mark in zip("●■▲◆▼★", "os^Dv*", _SERIES, strict=True)]


class Plot(NamedTuple):
    """The runs in one topology.

    Attributes:
        topology: The topology.
        runs: The runs, as the report has them.
        svg: The picture.
    """

    topology: str
    runs: Sequence[Mapping[str, Any]]
    svg: Markup


class _Axis(NamedTuple):
    """An axis for all plots of a callback: where a value is drawn, and labels by place."""

    place: Callable[[float], float]
    labels: Mapping[float, str]


def has_distances(runs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some runs tell how far values are apart; else they tell only what is the same and what is not."""
    numbers = (float(step[what]) for run in runs for step in run["steps"].values() for what in ("error", "bound"))
    return any(0 < number < math.inf for number in numbers)


def marks(runs: Iterable[Mapping[str, Any]]) -> dict[int, Mark]:
    """World size → mark, of all that there are."""
    sizes = sorted({run["setup"]["ranks"] for run in runs})
    return {size: _MARKS[number % len(_MARKS)] for number, size in enumerate(sizes)}


def plots(runs: Sequence[Mapping[str, Any]], marks: Mapping[int, Mark]) -> list[Plot]:
    """The plots of all runs of one callback in one dtype.

    Args:
        runs: The runs, as the report has them, with at least one step each.
        marks: Of each world size, from `marks`.
    """
    mark, dash = ("error", "bound") if has_distances(runs) else ("outside", "values")
    values = [float(step[what]) for run in runs for step in run["steps"].values() for what in (mark, dash)]
    axis = _logarithmic(values) if has_distances(runs) else _counting(values)
    last = max(int(step) for run in runs for step in run["steps"])
    found = []
    for topology, group in groupby(sorted(runs, key=_order), key=lambda run: run["setup"]["topology"]):
        of_plot = list(group)
        # What a picture refers to within itself has names, which must be others than those of other pictures.
        salt = f"{runs[0]['callback']} {topology} {runs[0]['setup']['dtype']}"
        with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "svg.hashsalt": salt}):
            figure, axes = _empty(axis, last)
            for run in of_plot:
                _draw(axes, run, mark, dash, axis, marks[run["setup"]["ranks"]])
            found.append(Plot(topology, of_plot, _embedded(figure)))
    return found


def _order(run: Mapping[str, Any]) -> tuple[int, int]:
    return list(TOPOLOGIES).index(run["setup"]["topology"]), run["setup"]["ranks"]


def _empty(axis: _Axis, last: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.2, 2.0))
    axes = figure.add_axes((0.15, 0.2, 0.83, 0.75))
    low, high = min(axis.labels), max(axis.labels)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_yticks(list(axis.labels), list(axis.labels.values()))
    axes.set_xlim(-0.6, last + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.set_xlabel("step", labelpad=1)
    axes.tick_params(length=2, pad=2)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, run: Mapping[str, Any], mark: str, dash: str, axis: _Axis, drawn: Mark) -> None:
    steps = {int(step): found for step, found in run["steps"].items()}
    marks = {step: float(found[mark]) for step, found in steps.items()}
    colour = _SERIES[drawn.series]
    dashes = [(step, axis.place(float(found[dash]))) for step, found in steps.items()]
    ends = [(x, y) for step, y in dashes for x, y in ((step - 0.4, y), (step + 0.4, y), (math.nan, math.nan))]
    axes.plot(*zip(*ends, strict=True), color=colour, linewidth=1.4, alpha=0.6, solid_capstyle="butt")
    # Between steps of which one has no error there is nothing to follow.
    line = [axis.place(value) if value else math.nan for value in marks.values()]
    axes.plot(list(marks), line, color=colour, linewidth=0.7)
    size = 3.5 if len(marks) <= 30 else 2
    axes.plot(list(marks), [axis.place(value) for value in marks.values()], drawn.shape, color=colour, markersize=size)
    if run["divergence"] is not None:
        step = run["divergence"]["step"]
        axes.axvline(step, color=_BAD, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.plot([step], [axis.place(marks[step])], "X", color=_BAD, markersize=7, markerfacecolor="none")


def _logarithmic(values: Iterable[float]) -> _Axis:
    """An axis of powers of ten, which has a place for zero below them and one for what is not finite above."""
    each = list(values)
    logarithms = [math.log10(value) for value in each if 0 < value < math.inf]
    low, high = math.floor(min(logarithms)), math.ceil(max(logarithms))
    stride = max(1, math.ceil((high - low) / 4))
    zero, infinity = low - 0.8 * stride, high + 0.8 * stride

    def place(value: float) -> float:
        if value == 0:
            return zero
        return math.log10(value) if value < math.inf else infinity

    labels = {float(power): f"1e{power}" for power in range(low, high + 1, stride)}
    labels |= {zero: "0"} if 0 in each else {}
    return _Axis(place, labels if all(map(math.isfinite, each)) else labels | {infinity: "∞"})


def _counting(values: Iterable[float]) -> _Axis:
    most = max(1, int(max(values)))
    stride = math.ceil(most / 4)
    return _Axis(lambda value: value, {float(count): str(count) for count in range(0, most + stride, stride)})


def _embedded(figure: Figure) -> Markup:
    """A figure as an element of a page, with the page's colours and fonts."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    picture = file.getvalue()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r'<g id="[^"]*"', "<g", picture)
    picture = re.sub(r"<style.*?</style>", "", picture, flags=re.DOTALL)
    picture = re.sub(r'width="\S+" height="\S+" (?=viewBox)', 'aria-hidden="true" ', picture, count=1)
    picture = re.sub(r"font-family: [^;]*; ", "", picture)
    for variable, colour in _VARIABLES.items():
        picture = picture.replace(colour, f"var(--{variable})")
    return Markup(picture)
