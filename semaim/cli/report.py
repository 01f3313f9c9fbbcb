"""One HTML file about runs: tools/report.py work_dirs/ --out report.html (see --help)."""

import argparse
from pathlib import Path

from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write one HTML file about all runs in some work folders: the results table with published figures,"
        " curves, orders during training, predictions, per-class figures, times, memory and configs, as far as the runs"
        " have recorded them. The file contains its pictures and needs no network.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="work folders of runs, or folders of them")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="where to write the report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_args(argv, prog)
    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: name a .html file")
    from semaim.results.report import write_report  # takes seconds to import
    from semaim.results.skipping import tell

    tell(write_report([Path(folder) for folder in args.folders], out))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
