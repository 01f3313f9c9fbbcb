"""Curves by matplotlib: a picture of one run's training, and line charts of many runs for an HTML page.

A chart is an SVG whose text stays text and whose colours are variables of the page's CSS: `--c0` to `--c5` for the
series, `--soft` for text, `--rule` for the grid. The logged values are those that `semaim.results.logs` reads.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 360, 220  #: of a chart, in pixels as shown on a phone, so that its text of 11 stays readable there
POINTS = 200  #: curves with more are averaged down to these
LARGEST = 1e30  #: values above are not drawn
COLOURS = 6  #: different colours; further series repeat them with other dashes
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  #: as matplotlib's linestyle
#: Colour in matplotlib -> variable of the page. Nothing else in a chart has these colours.
VARIABLES = {f"#fe00{place:02x}": f"var(--c{place})" for place in range(COLOURS)}
TEXT, GRID = "#fe00f0", "#fe00f1"
VARIABLES |= {TEXT: "var(--soft)", GRID: "var(--rule)"}

#: What makes a chart an SVG that a page can contain: its text is text, in the page's colours.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 11}
STYLE |= {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT}


def draw_curve(scalars: Sequence[dict], title: str = "") -> Image.Image:
    """Loss and learning rate over the iterations: 700 x 400 pixels.

    Args:
        scalars: by rising `iter`, each with `loss` and `lr`, as `semaim.results.logs.read_scalars` returns them.
        title: text above the plot.
    """
    from matplotlib.figure import Figure  # takes a second to import

    from semaim.drawing.panels import render

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    iterations = [line["iter"] for line in scalars]
    axis.plot(iterations, [line["loss"] for line in scalars], color="tab:blue")
    axis.set(xlabel="iteration", title=title)
    axis.set_ylabel("loss", color="tab:blue")
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(iterations, [line["lr"] for line in scalars], color="tab:orange", linewidth=1)
    right.set_ylabel("learning rate", color="tab:orange")
    return render(figure)


# Charts


@dataclass(frozen=True)
class Curve:
    """One run's values, (x, y) by rising x; curves of the same series, which are seeds, have one colour."""

    series: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Key:
    """An entry of a legend: the series, its last value, and how its line looks.

    Of several curves it is their mean at the last x that all have: one may have stopped early.
    """

    series: str
    last: float
    curves: int
    colour: int  #: of the page's variables
    dash: int  #: of `DASHES`


@dataclass(frozen=True)
class Chart:
    """An SVG element and its legend; `averaged`: whether curves had too many points, so that means are drawn."""

    svg: str
    keys: tuple[Key, ...]
    averaged: bool


def draw_chart(
    curves: Sequence[Curve],
    below: str,
    name: str = "chart",
    places: Mapping[str, int] | None = None,
    logarithms: bool = False,
) -> Chart | None:
    """A chart of curves; None if there is nothing to draw.

    Each curve is a line. Where a series has several, these are thin and light, and their mean is drawn over them at the
    x that all of them have.

    Args:
        curves: by series; what is not finite, or too large to draw, is left out.
        below: the quantity on the x axis.
        name: of the chart, unique on its page: the ids in the SVG depend on it.
        places: series -> place among all of the page, which its colour and dashes depend on; None for this order.
        logarithms: whether the y axis is logarithmic if the values are positive and span a factor of 100.
    """
    curves = [
        Curve(it.series, tuple(p for p in it.points if all(abs(value) < LARGEST for value in p))) for it in curves
    ]
    curves = [it for it in curves if it.points]
    if not curves:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

    values = [y for it in curves for _, y in it.points]
    keys = []
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axis = figure.subplots()
        for number, series in enumerate(dict.fromkeys(it.series for it in curves)):
            place = places[series] if places else number
            own = [it for it in curves if it.series == series]
            last = (mean_of(own) or [it.points[-1] for it in own])[-1][1]
            keys.append(Key(series, last, len(own), place % COLOURS, place // COLOURS % len(DASHES)))
            draw_series(axis, own, keys[-1])
        axis.set_xlabel(below)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if logarithms and min(values) > 0 and max(values) >= 100 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(axis="y", color=GRID, linewidth=1)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    averaged = any(len(it.points) > POINTS for it in curves)
    return Chart(for_page(file.getvalue()), tuple(keys), averaged)


def draw_series(axis: "Axes", curves: Sequence[Curve], key: Key) -> None:
    """Draw the curves of one series, and their mean if there are several."""
    look: dict[str, Any] = {
        "color": f"#fe00{key.colour:02x}",
        "linestyle": DASHES[key.dash],
        "solid_joinstyle": "round",
    }
    several = len(curves) > 1
    for it in curves:
        points = thinned(it.points)
        marker = "o" if len(points) < 12 else None
        width, alpha = (1.0, 0.45) if several else (2.0, 1.0)
        axis.plot(
            *zip(*points, strict=True), marker=marker, markersize=1 + 2 * width, linewidth=width, alpha=alpha, **look
        )
    if several:
        if mean := thinned(mean_of(curves)):
            axis.plot(*zip(*mean, strict=True), linewidth=2.0, **look)


def mean_of(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean of curves, at the x that all of them have."""
    found = [dict(it.points) for it in curves]
    common = sorted(set.intersection(*map(set, found)))
    return [(x, sum(points[x] for points in found) / len(found)) for x in common]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: means of as many neighbours, at the last x of each."""
    step = math.ceil(len(points) / POINTS)
    if step <= 1:
        return list(points)
    ends = range(len(points), 0, -step)  # from the end, so that the last x stays
    parts = [points[max(0, end - step) : end] for end in ends][::-1]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def for_page(svg: str) -> str:
    """matplotlib's SVG file as an element of a page: its size and colours are the page's, its ids unique or gone."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|<g/>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda it: it[0] if it[1] in used else "", svg)
    svg = re.sub(
        r"font(-family)?: (?:([\d.]+px) )?'[^;\"]*;? ?", lambda it: f"font-size: {it[2]};" if it[2] else "", svg
    )
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|<defs>\s*</defs>', "", svg).replace("xlink:href", "href")
    # Two digits after the point, in attributes and not in text.
    svg = re.sub(r'="[^"]*"', lambda it: re.sub(r"(\d\.\d\d)\d+", r"\1", it[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
