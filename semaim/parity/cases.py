"""Recorded cases, comparisons, and running them all.

A case is `<family>/<case>.json` (configuration, scalars, and per tensor its shape, meaning and tolerance), mostly
with `<case>.safetensors` next to it. Parameters and inputs are read from the file, and every recorded result has to
be reproduced: fp32 tensors to the file's tolerance, fp64 losses and gradient norms to 1e-8. Deliberate differences
from the reference are computed, too, and listed as deviations.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from semaim.errors import UserError

EXACT = 1e-6  #: tolerance where the file has none: tables and keys in fp32
FP64 = 1e-8  #: relative tolerance of the reference's fp64 scalars
SAMPLES = {None: slice(None), "the first only": slice(1)}  #: which of the named images a case uses


@dataclass
class Check:
    """One comparison: largest absolute error (relative for fp64 scalars) and its tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass
class CaseReport:
    """All comparisons of a case, and deliberate differences from the reference."""

    case: str
    checks: list[Check] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    uncovered: str = ""  #: why the case was not run

    @property
    def passed(self) -> bool:
        """Whether everything compared is within its tolerance."""
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The comparison nearest to, or furthest beyond, its tolerance."""
        return max(self.checks, key=lambda c: (not c.passed, c.error / c.tolerance), default=None)

    def add(self, name: str, ours: Tensor, golden: Tensor, tolerance: float | None) -> None:
        """Compare tensors of one shape."""
        ours, golden = ours.detach().double(), golden.double()
        if ours.shape != golden.shape:
            raise UserError(f"{self.case}: {name} has shape {tuple(ours.shape)}, recorded is {tuple(golden.shape)}")
        error = (ours - golden).abs().max().item() if ours.numel() else 0.0
        self.checks.append(Check(name, error, EXACT if tolerance is None else tolerance))

    def add_relative(self, name: str, ours: float, golden: float, tolerance: float = FP64) -> None:
        """Compare fp64 scalars by relative error."""
        self.checks.append(Check(name, abs(ours - golden) / max(abs(golden), 1e-300), tolerance))


class Case:
    """One recorded case."""

    def __init__(self, file: Path):
        try:
            self.meta = read_json(file)
            self.name: str = self.meta["case"]
            self.scalars: dict[str, Any] = self.meta.get("scalars", {})
            tensors = file.with_suffix(".safetensors")
            self.tensors = load_file(tensors) if tensors.exists() else {}
            #: (B, 3, H, W), or a dict of such by name
            self.images: Tensor | dict[str, Tensor] | None = None
            if named := self.meta.get("images"):
                if "file" in named:
                    self.images = read_images(file, named)
                else:
                    self.images = {name: read_images(file, one) for name, one in named.items()}
        except (KeyError, TypeError, StopIteration) as error:
            raise UserError(f"{file} is no recorded case: {type(error).__name__} {error}") from None

    @property
    def batch(self) -> Tensor:
        """The images (B, 3, H, W) of a case that names one set; `UserError` for another."""
        if not isinstance(self.images, Tensor):
            raise UserError(f"{self.name} is no recorded case of this family: it names no single set of images")
        return self.images

    @property
    def named_batches(self) -> dict[str, Tensor]:
        """Name -> images (B, 3, H, W) of a case that names several sets; `UserError` for another."""
        if not isinstance(self.images, dict):
            raise UserError(f"{self.name} is no recorded case of this family: it names no sets of images")
        return self.images

    def tolerance(self, name: str) -> float | None:
        """Absolute tolerance of a tensor; None if it has to be equal."""
        return self.meta["tensors"][name]["atol"]

    def parameters(self) -> dict[str, Tensor]:
        """The reference's parameters and buffers, under its own names."""
        return {name[6:]: tensor for name, tensor in self.tensors.items() if name.startswith("param.")}


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; `UserError` if it got none."""
    if parameter.grad is None:
        raise UserError("a parameter whose gradient is recorded got none")
    return parameter.grad


def run_case(case: Case, checks: Callable[[Case, CaseReport], None]) -> CaseReport:
    """Run one case with its family's checks."""
    report = CaseReport(case.name)
    checks(case, report)
    if not report.checks and not report.uncovered:
        failed = case.meta["status"] != "ok"
        why = case.meta.get("error", case.meta["status"]) if failed else "the case holds nothing that is known here"
        report.uncovered = f"the reference has no result: {why}" if failed else why
    return report


def run_folder(folder: Path, families: Mapping[str, Callable[[Case, CaseReport], None]]) -> Iterator[CaseReport]:
    """Run all cases in a folder, or in a family's folder, one after another."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    files = [file for file in sorted(folder.rglob("*.json")) if "case" in read_json(file)]
    if not files:
        raise UserError(f"no recorded cases in {folder}: looked for *.json with a `case`")
    for file in files:
        family = str(read_json(file)["case"]).split("/")[0]
        if family in families:
            yield run_case(Case(file), families[family])
        else:
            yield CaseReport(f"{family}/{file.stem}", uncovered=f"{family} is not part of this package yet")


def read_images(file: Path, named: dict) -> Tensor:
    """The images (B, 3, H, W) that a case names; their file is in its folder or the one above."""
    folder = next(f for f in (file.parent, file.parent.parent) if (f / named["file"]).exists())
    return load_file(folder / named["file"])[named["tensor"]][SAMPLES[named.get("samples")]]


def read_json(file: Path) -> dict:
    """A JSON file's object."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
