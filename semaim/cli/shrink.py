"""A copy of a data set with smaller images: tools/shrink.py SRC DST --side 384 (see --help)."""

import argparse
import os
import warnings

from semaim.cli.benchmark import number
from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a copy of a data set whose images have short sides of at most --side pixels, in tar shards:"
        " training decodes less. --data-root DST then takes the place of SRC, for pretraining and for class folders. An"
        " interrupted copy goes on with the same command; at the end every image is checked.",
        epilog="Exit status: 0 the copy is whole (warnings allowed), 1 problems found, 2 nothing to copy.",
    )
    parser.add_argument("source", metavar="SRC", help="images in folders, such as SRC/train/CLASS/ and SRC/val/CLASS/")
    parser.add_argument("target", metavar="DST", help="folder for the copy")
    parser.add_argument(
        "--side", type=number(16), required=True, metavar="N",
        help="largest short side in pixels; smaller images are copied as they are. A square crop of the share s of"
        " an image of 4 x 3 has N * sqrt(4 s / 3) pixels a side: 224 for N = 434 and s = 0.2, pretraining's smallest",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=number(1), default=90, metavar="Q", help="of the JPEGs (default: %(default)s)"
    )
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise",
        help="what an image that cannot be read does: it ends the command, or is left out and listed (default: raise)",
    )  # fmt: skip
    parser.add_argument(
        "--most-damaged", type=float, default=0.01, metavar="SHARE", help="that may be left out (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=number(1), default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="compare a finished copy with SRC; write nothing")
    args = parser.parse_args(argv)
    if args.quality > 100:
        raise UserError(f"--quality {args.quality}: give 1 to 100")
    if not 0 <= args.most_damaged <= 1:
        raise UserError(f"--most-damaged {args.most_damaged:g}: give a share, from 0 to 1")
    return args


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    warnings.filterwarnings("ignore", module="PIL")  # about EXIF and the like, which training ignores
    from semaim.data.copying import shrink

    report = shrink(
        args.source, args.target, args.side, args.quality, on_error=args.on_error, most_damaged=args.most_damaged,
        workers=args.workers, only_check=args.check, progress=True,
    )  # fmt: skip
    print(report)
    return 1 if report.problems else 0
