"""Whole detectors against detectron2's ViTDet; the contents of a case decide what is checked."""

from collections.abc import Callable
from importlib.util import find_spec

from semaim.parity.cases import Case, CaseReport
from semaim.parity.detector_recipe import check_keys, check_resize
from semaim.parity.detector_runs import check_test, check_train
from semaim.places import to_install

#: key of a case's scalars or of its description -> the checks of such cases
CHECKS: dict[str, Callable[[Case, CaseReport], None]] = {
    "detections": check_test,
    "losses": check_train,
    "resize_scale_sizes_target_1024": check_resize,
    "optimizer": check_keys,
}


def check(case: Case, report: CaseReport) -> None:
    """Run one case; without mmdet it is reported as not run."""
    if find_spec("mmdet") is None:
        report.uncovered = f"mmdet is not installed: {to_install('all')}"
        return
    for held, checks in CHECKS.items():
        if held in case.scalars or held in case.meta:
            checks(case, report)
