"""Results of a benchmark: rows with their targets, the machine, a table and a JSON file."""

import contextlib
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from semaim.engine.results import commit
from semaim.errors import writing


@dataclass
class Row:
    """One measured figure, for ours and for the baseline.

    Attributes:
        what, where: what was measured, and on "CPU" or "GPU".
        unit: of `ours` and `baseline`.
        target: bound of `ratio`, or of `ours` itself if `of_ours` is set; None for a figure without target.
        at_least: whether the target is a lower bound; else an upper one.
        ours, baseline: medians; None if not measured.
        ratio: ours over baseline, or its inverse for times, as the target needs it.
        spread: (smallest, largest) ratio among the repeats.
        loss_difference: largest relative difference of losses, and of gradients, between the two before any timing.
        details: sizes and other settings.
    """

    what: str
    where: str
    unit: str
    target: float | None = None
    at_least: bool = True
    of_ours: bool = False
    ours: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    loss_difference: float | None = None
    details: dict = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """met, missed, "no target", or why there is no figure."""
        value = self.ours if self.of_ours else self.ratio
        if self.ours is None:
            return f"not measured: {self.details.get('reason', 'not requested')}"
        if self.target is None or value is None:
            return "no target"
        return "met" if (value >= self.target if self.at_least else value <= self.target) else "missed"


def without_gpu(what: str, unit: str, target: float, at_least: bool = True, of_ours: bool = False) -> Row:
    """The row of a figure that needs a GPU, on a machine without one."""
    return Row(what, "GPU", unit, target, at_least, of_ours, details={"reason": "no GPU"})


def hardware() -> dict:
    """Processor, cores, threads, GPU and versions, as plain values."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
    }


def write(path: Path, name: str, rows: list[Row], **more) -> None:
    """Write rows, machine, command, date and commit as JSON."""
    content = {
        "benchmark": name,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        **more,
    }
    with writing(path):
        path.write_text(json.dumps(content, indent=2) + "\n")


def show(rows: list[Row]) -> None:
    """Print the rows as a table of 150 columns or the terminal's width, if that is larger."""
    table = Table("what", "where", "ours", "baseline", "unit", "ratio", "spread", "target", "verdict")
    for row in rows:
        bound = "-" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
        spread = "-" if row.spread is None else f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
        table.add_row(
            row.what, row.where, number(row.ours), number(row.baseline), row.unit, number(row.ratio), spread, bound,
            row.verdict,
        )  # fmt: skip
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
