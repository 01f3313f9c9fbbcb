"""Curves of a run: a picture of its training, and line charts of all logged values for an HTML page.

A chart is the geometry of an SVG, which takes its colours from the page. The logged values are those that
`semaim.results.logs` reads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

WIDTH, HEIGHT = 360, 220  #: as shown on a phone, so that the text stays readable there
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34  #: margins
POINTS = 400  #: lines with more points are thinned out


def draw_curve(scalars: Sequence[dict], title: str = "") -> Image.Image:
    """Loss and learning rate over the iterations: 700 x 400 pixels.

    Args:
        scalars: by rising `iter`, each with `loss` and `lr`, as `semaim.results.logs.read_scalars` returns them.
        title: text above the plot.
    """
    from matplotlib.figure import Figure  # takes a second to import, and charts do not need it

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


@dataclass(frozen=True)
class Line:
    """One line: its name with the last value, and its points "x,y x,y ..." in the drawing."""

    name: str
    points: str
    dots: tuple[tuple[float, float], ...]  #: drawn when the points are too few for a line alone


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` x `HEIGHT`; ticks are (position, text)."""

    title: str
    below: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def make_chart(title: str, below: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart | None:
    """A chart of curves, name -> (x, y) by rising x; None if there is nothing to draw."""
    curves = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    xs, ys = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    across, up = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs + across), max(xs + across)
    y_low, y_high = min(ys + up), max(ys + up)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    lines = []
    for name, points in curves.items():
        step = max(1, math.ceil(len(points) / POINTS))
        drawn = [place(*point) for point in points[::-1][::step][::-1]]  # from the end: the last point stays
        text = " ".join(f"{x},{y}" for x, y in drawn)
        lines.append(Line(f"{name} {points[-1][1]:.4g}", text, tuple(drawn) if len(drawn) < 12 else ()))
    return Chart(
        title,
        below,
        tuple(lines),
        tuple((place(x, y_low)[0], f"{x:g}") for x in across),
        tuple((place(x_low, y)[1], f"{y:g}") for y in up),
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers around and within a range."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def charts_of(lines: Sequence[dict], validated: Mapping[str, Mapping[str, str]]) -> list[Chart]:
    """Charts of loss, learning rate and validations.

    Args:
        lines: of `semaim.results.logs.read_lines`.
        validated: title of a chart -> name of a figure in the log -> label of its curve.
    """
    training = sorted((line for line in lines if "validation" not in line), key=lambda line: line["iter"])
    charts = [
        make_chart(title, "iteration", {name: numbers(training, "iter", key)})
        for title, name, key in (("training loss", "loss", "loss"), ("learning rate", "rate", "lr"))
    ]
    validations = [line for line in lines if "validation" in line]
    for title, names in validated.items():
        curves = {shown: numbers(validations, "step", key) for key, shown in names.items()}
        charts.append(make_chart(f"validation: {title}", "epoch", curves))
    return [chart for chart in charts if chart]


def numbers(lines: Sequence[dict], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the log lines that have both; for each x the last."""
    found = {line[x]: line[y] for line in lines if all(isinstance(line.get(key), int | float) for key in (x, y))}
    return sorted(found.items())
