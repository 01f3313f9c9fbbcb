"""Compare the model with recorded results of the reference implementations: tools/check_parity.py FOLDER."""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run every recorded case in a folder (all families, or one family's) and compare.",
        epilog="Exit status 0 if every case that is run passes, 1 if one fails or none could be run.",
    )
    parser.add_argument("folder", type=Path, help="folder of cases: NAME.json with NAME.safetensors")
    parser.add_argument("--verbose", action="store_true", help="show every comparison")
    args = parser.parse_args(argv)
    import torch  # takes seconds, as what follows

    from semaim.parity import FAMILIES, run_folder
    from semaim.parity.deviations import read_deviations

    torch.set_num_threads(1)  # the tolerances were measured with one thread

    passed = failed = uncovered = 0
    print(f"{'case':34} {'worst comparison':34} {'error':>9} {'tolerance':>9}  verdict")
    for report in run_folder(args.folder, FAMILIES):
        if report.uncovered:
            uncovered += 1
            print(f"{report.case:34} {'':54}  not run: {report.uncovered}")
            continue
        passed, failed = passed + report.passed, failed + (not report.passed)
        worst, verdict = report.worst, "pass" if report.passed else "FAIL"
        assert worst is not None, "a case without a comparison is not covered"
        shown = report.checks if args.verbose else [c for c in report.checks if not c.passed and c is not worst]
        print(f"{report.case:34} {worst.name:34} {worst.error:9.2e} {worst.tolerance:9.2e}  {verdict}")
        for check in shown:
            mark = "" if check.passed else "  FAIL"
            print(f"{'':34} {check.name:34} {check.error:9.2e} {check.tolerance:9.2e}{mark}")
        for text in report.deviations:
            print(f"    deviation: {text}")
    print("further deliberate differences from the references (docs/recipes.md):")
    for deviation in read_deviations():
        print(f"    {deviation.stage}: {deviation}")
    print(f"{passed} passed, {failed} failed" + (f", {uncovered} not run" if uncovered else ""))
    return 1 if failed or not passed else 0
