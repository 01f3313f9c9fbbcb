"""The charts of a stage: for each logged quantity one, with the curves of all its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from semaim.drawing.curves import Chart, Curve, Key, draw_chart
from semaim.registry import tasks
from semaim.results.figures import headed
from semaim.results.parts import RunPart

LOSS, RATE = "Training loss", "Learning rate"  #: the first charts of a stage


class Quantity(NamedTuple):
    """A logged quantity: its name with the unit, the unit alone, and the quantity on the x axis."""

    title: str
    unit: str
    below: str


@dataclass(frozen=True)
class Overlay:
    """A chart, and what its caption and its legend say."""

    title: str
    below: str
    chart: Chart
    notes: list[str]
    unit: str

    @property
    def label(self) -> str:
        """The chart in words, for who does not see it."""
        return f"{self.title} over the {self.below}s; last: {', '.join(map(self.words, self.chart.keys))}"

    def words(self, key: Key) -> str:
        """An entry of the legend: the series and its last value."""
        return f"{key.series} {self.last(key)}"

    def last(self, key: Key) -> str:
        """The last value of a series, as text."""
        return f"{key.last:.2f}" if self.unit == "%" else f"{key.last:.4g}"


def overlays_of(runs: Sequence[RunPart], anchor: str, places: dict[str, int]) -> list[Overlay]:
    """The charts of a stage's runs.

    Args:
        runs: all of them.
        anchor: of the stage on the page; ids in the charts begin with it.
        places: series -> place, of the stages before; new ones are added, so that each has one colour on the page.
    """
    names = series_of(runs)
    for name in names.values():
        places.setdefault(name, len(places))
    curves: dict[Quantity, list[Curve]] = {}
    for run in runs:
        for quantity, points in logged(run).items():
            curves.setdefault(quantity, []).append(Curve(names[run.setting], tuple(points)))
    found: list[Overlay] = []
    order = [LOSS, RATE]
    for quantity in sorted(curves, key=lambda it: order.index(it.title) if it.title in order else len(order)):
        loss = quantity.title == order[0]
        chart = draw_chart(curves[quantity], quantity.below, f"{anchor}-{len(found)}", places, loss)
        if chart:
            methods = {run.method for run in runs if names[run.setting] in {key.series for key in chart.keys}}
            pretrains = any(run.task and run.task.pretrains for run in runs)
            unlike = loss and pretrains and len(methods) > 1
            notes = notes_of(chart) + ["Losses of methods with different targets cannot be compared."] * unlike
            found.append(Overlay(quantity.title, quantity.below, chart, notes, quantity.unit))
    return found


def notes_of(chart: Chart) -> list[str]:
    """Sentences for a chart's caption."""
    several = any(key.curves > 1 for key in chart.keys)
    notes = ["Thin: each seed. Thick: their mean."] if several else []
    return notes + ["Each point is the mean of neighbouring logged values."] * chart.averaged


def series_of(runs: Sequence[RunPart]) -> dict[tuple[str, ...], str]:
    """Setting -> the name of its series: the method, and in what it differs from others of the method."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    names = {}
    for setting in settings:
        alike = [other for other in settings if other[0] == setting[0]]
        apart = [part for place, part in enumerate(setting[1:], 1) if len({other[place] for other in alike}) > 1]
        names[setting] = ", ".join(filter(None, [setting[0] or "not recorded", *apart]))
    return names


def logged(run: RunPart) -> dict[Quantity, list[tuple[float, float]]]:
    """The logged values of a run, (x, y) by rising x: loss, learning rate, and its task's metrics in their unit."""
    training = sorted((line for line in run.lines if "validation" not in line), key=lambda line: line["iter"])
    validations = [line for line in run.lines if "validation" in line]
    found = {
        Quantity(LOSS, "", "iteration"): numbers(training, "iter", "loss"),
        Quantity(RATE, "", "iteration"): numbers(training, "iter", "lr"),
    }
    # A validation's `step` is the epoch, which a training by iterations does not count.
    x, below = ("step", "epoch") if any("epoch" in line for line in training) else ("iter", "iteration")
    for task in [run.task] if run.task else tasks():
        for key, metric in task.metrics.items() if task.trains else ():
            points = [(at, metric.factor * y) for at, y in numbers(validations, x, key) if metric.measured(y)]
            if metric.tabled:
                title = headed(f"{metric.label} in validation", metric.unit)
                found[Quantity(title, metric.unit, below)] = points
    return {quantity: points for quantity, points in found.items() if points}


def numbers(lines: Sequence[Mapping], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the log lines that have both; for each x the last."""
    found = {line[x]: line[y] for line in lines if all(isinstance(line.get(key), int | float) for key in (x, y))}
    return sorted(found.items())
