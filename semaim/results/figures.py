"""Figures of a run as text, in the unit of its task's metric; and the tables by class that mmdet and mmseg log."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semaim.record import Record
from semaim.registry import Metric, task_titled, tasks
from semaim.results.runs import metrics_in

NOTHING = "–"  #: where there was nothing to measure
#: Of a metric in mmdet's tables by class: its evaluation ("bbox"), its column ("mAP_50") -> its key in results.json.
KEY = "coco/{}_{}"


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Args:
        label: of the metric, or its key if no task declares it.
        text: the figure in `unit`, which is not part of it; `NOTHING` if there was nothing to measure.
        unit: such as "%"; empty if not known.
        headline: whether lists of runs show it.
    """

    label: str
    text: str
    unit: str
    headline: bool

    @property
    def heading(self) -> str:
        """Label and unit."""
        return headed(self.label, self.unit)

    @property
    def words(self) -> str:
        """The figure with its unit."""
        return f"{self.text} {self.unit}" if self.unit and self.text != NOTHING else self.text


def headed(label: str, unit: str) -> str:
    """A label with its unit, as a heading."""
    return f"{label}, {unit}" if unit else label


def metrics_of(record: Record) -> dict[str, Metric]:
    """Key of a recorded figure -> its metric: as declared by its task, by the file, or by any task."""
    own = task_titled(record.task)
    found: dict[str, Metric] = {}
    for task in [*([own] if own else []), *(other() for other in tasks() if own is None)]:
        for key, metric in {**task.described(record.metrics), **task.reported(record.metrics)}.items():
            found.setdefault(key, metric)
    return (metrics_in(record.reported) if record.reported and own is None else {}) | found


def figures_of(record: Record) -> list[Figure]:
    """All figures of a results.json, those of known metrics first and in their order.

    If none is for lists of runs, all are.
    """
    known, found = metrics_of(record), []
    order = [key for key in known if key in record.metrics]
    for key in [*order, *(key for key in record.metrics if key not in known)]:
        value, metric = float(record.metrics[key]), known.get(key)
        if metric is None:
            found.append(Figure(key, worded(record.metrics[key]), "", False))
        else:
            found.append(Figure(metric.label, in_unit(value, metric), metric.unit, bool(metric.tabled or metric.short)))
    if not any(it.headline for it in found):
        found = [Figure(it.label, it.text, it.unit, True) for it in found]
    return found


def in_unit(value: float, metric: Metric) -> str:
    """A recorded number in the unit of its metric: percent to two digits, others to four significant ones."""
    if not metric.measured(value) or math.isnan(value):
        return NOTHING
    return f"{metric.factor * value:.2f}" if metric.unit == "%" else f"{metric.factor * value:.4g}"


def worded(value: object) -> str:
    """A value of results.json as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else json.dumps(value)


# By class


@dataclass
class ClassTable:
    """Figures by class: title, headings with units, and rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


def classes_of(logs: Sequence[str]) -> list[ClassTable]:
    """The last table by class of each kind that mmdet (with `classwise`) and mmseg log, in the unit of its metrics."""
    known = {key: metric for task in tasks() for key, metric in task.metrics.items()}
    found: dict[str, ClassTable] = {}
    for log in logs:
        evaluated, head, rows = "", None, []
        for line in [*log.splitlines(), ""]:
            if line.startswith(("|", "+-")):
                cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
                if line.startswith("|") and head is None:
                    head = cells
                elif line.startswith("|"):
                    rows.append(cells)
            elif head is not None:
                if head[0].lower() in ("class", "category") and len(head) > 2:
                    table = class_table(evaluated, head[1:], rows, known)
                    found[table.title] = table
                head, rows = None, []
            if match := re.search(r"Evaluating (\w+)\.\.\.", line):
                evaluated = match[1]
    return list(found.values())


def class_table(evaluated: str, columns: list[str], rows: list[list[str]], known: Mapping[str, Metric]) -> ClassTable:
    """A logged table in the unit of its metrics.

    Args:
        evaluated: mmdet's evaluation: "bbox" or "segm"; for mmseg's tables something else.
        columns: logged names of all columns but the first.
        rows: logged cells; the first is the class.
        known: key in results.json -> metric.
    """
    # mmseg's table has percent; its columns are classes' shares in the means of the metrics mIoU and mAcc.
    metrics = [known.get(KEY.format(evaluated, name)) for name in columns]
    if not any(metrics):
        percent = Metric("")
        heads = [headed(name, percent.unit) if f"m{name}" in known else name for name in columns]
        cells = [[plain(cell) for cell in row[1:]] for row in rows]
        title = by_class_of(columns)
    else:
        kind = next(metric.label for metric in metrics if metric)
        heads = [
            headed(metric.label, metric.unit) if metric else name for name, metric in zip(columns, metrics, strict=True)
        ]
        cells = [[plain(cell, metric) for cell, metric in zip(row[1:], metrics, strict=False)] for row in rows]
        title = f"{kind} of each class"
    return ClassTable(title, ["class", *heads], [[row[0], *line] for row, line in zip(rows, cells, strict=True)])


def recorded_classes(classwise: Mapping[str, Mapping[str, float | None]]) -> ClassTable:
    """The figures by class of a results.json, kind -> class -> percent, titled as the table that the run has logged."""
    kinds, percent = list(classwise), Metric("")
    rows = [
        [name, *(NOTHING if classwise[kind].get(name) is None else f"{classwise[kind][name]:.2f}" for kind in kinds)]
        for name in dict.fromkeys(name for figures in classwise.values() for name in figures)
    ]
    return ClassTable(by_class_of(kinds), ["class", *(headed(kind, percent.unit) for kind in kinds)], rows)


def by_class_of(kinds: Sequence[str]) -> str:
    """The title of a table of these figures."""
    return f"{', '.join(kinds)} of each class"


def plain(cell: str, metric: Metric | None = None) -> str:
    """A logged cell in the unit of its metric, or as it is if there is none or it is no number."""
    try:
        value = float(cell)
    except ValueError:
        return cell
    if math.isnan(value):
        return NOTHING
    return in_unit(value, metric) if metric else cell
