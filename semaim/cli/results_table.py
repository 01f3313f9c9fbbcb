"""Our results next to published ones: tools/results_table.py work_dirs/ --format md (see --help)."""

import argparse
from pathlib import Path

from semaim.cli.choices import FORMATS
from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print what the runs in some work folders measured, next to published figures of the same tasks."
        " Runs that differ only in their seed are averaged. A difference is printed if nothing that is known of the two"
        " differs; every other row says which field does. Gains between methods have 95 % intervals.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="searched recursively for results.json")
    parser.add_argument("--format", choices=FORMATS, default="md", help="of the table (default: %(default)s)")
    parser.add_argument("--glance", action="store_true", help="Markdown of our own figures, one line per encoder")
    parser.add_argument("--out", metavar="FILE", help="write to a file (default: the terminal)")
    parser.add_argument(
        "--against",
        metavar="METHOD",
        help="what gains are over, such as mae or random (default: MAE if it is there, else random weights)",
    )
    parser.add_argument("--no-published", action="store_true", help="our own figures only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_args(argv, prog)
    from semaim.results import formats, load_published
    from semaim.results.skipping import tell
    from semaim.results.table import make_table

    render = formats.glance if args.glance else formats.FORMATS[args.format]
    published = not (args.no_published or args.glance)
    table = make_table(args.folders, load_published(), published, args.against)
    tell(table.skipped)
    text = render(table)
    if not text:
        raise UserError("--glance compares encoders, and the results are all of one: leave it out")
    if not args.out:
        print(text, end="")
        return
    try:
        Path(args.out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from None
