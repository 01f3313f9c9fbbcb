"""Find what is wrong with a data set: tools/verify_dataset.py {data,coco,ade20k,images} ROOT (see --help)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from semaim.cli.options import add_flags
from semaim.errors import UserError

if TYPE_CHECKING:
    from semaim.data.findings import Report


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check every annotation and every image of a data set; nothing is changed.",
        epilog="Exit status: 0 nothing wrong (warnings allowed), 1 problems found, 2 nothing to check.",
    )
    commands = parser.add_subparsers(dest="layout", required=True)
    data = commands.add_parser(
        "data",
        help="data of your own in any layout of docs/own_data.md; prints the YAML of --data that describes them",
    )
    data.add_argument("root", metavar="ROOT", nargs="?", help="may be left out with --data")
    add_flags(data, "--classes", "--data")
    coco = commands.add_parser("coco", help="annotations/instances_{train,val}2017.json and {train,val}2017/")
    coco.add_argument("root", metavar="ROOT", nargs="?", help="may be left out with --ann and --images")
    coco.add_argument("--ann", metavar="FILE", help="one annotation file of another name, relative to ROOT")
    coco.add_argument("--images", metavar="DIR", help="the folder of its images, relative to ROOT")
    ade = commands.add_parser("ade20k", help="images/{training,validation} and annotations/{training,validation}")
    ade.add_argument("root", metavar="ROOT", help="holds images/ and annotations/")
    ade.add_argument("--classes", type=int, default=150, help="unlabelled not counted (%(default)s)")
    ade.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="0 means unlabelled and classes count from 1, as in ADE20K; with --no-, they count from 0",
    )
    ade.add_argument(
        "--most-ignored",
        type=float,
        metavar="SHARE",
        help="largest share of a split's pixels that may be unlabelled, from 0 to 1 (default: any)",
    )
    images = commands.add_parser("images", help="any images: folders, a list file, or tar shards, as for pretraining")
    images.add_argument("root", metavar="ROOT", help="folder of images, with its subfolders")
    images.add_argument("--out", metavar="FILE", help="write a list of the images to leave out, for dataset.skip")
    images.add_argument("--smallest", type=int, default=16, help="least side of an image in pixels (%(default)s)")
    for command in (data, coco, ade, images):
        command.add_argument(
            "--workers", type=int, default=min(16, os.cpu_count() or 1), help="images at a time (%(default)s)"
        )
        command.add_argument("--report", metavar="FILE", help="write what was found as JSON, too")
    return parser.parse_args(argv)


def verify(args: argparse.Namespace) -> list[Report]:
    """Reports of everything found, each printed as soon as it is ready."""
    from semaim.data.findings import SPLITS
    from semaim.data.label_maps import verify_ade20k
    from semaim.data.verify import verify_coco

    if args.layout == "ade20k":
        numbers = {"classes": args.classes, "reduce_zero_label": args.reduce_zero_label}
        more = {"workers": args.workers, "progress": True, "most_ignored": args.most_ignored}
        reports = [verify_ade20k(args.root, **numbers, **more)]
        print(reports[0])
        return reports
    if args.layout == "data":
        from semaim.data.verify_own import verify_own

        named = [name.strip() for name in args.classes.split(",")] if args.classes else None
        text, reports = verify_own(args.root, args.data, named, args.workers)
        print(*reports, text, sep="\n")
        return reports
    if args.layout == "images":
        from semaim.data.image_files import verify_images, write_list

        report, left_out = verify_images(args.root, args.smallest, args.workers, progress=True)
        print(report)
        if args.out:
            write_list(left_out, args.out)
        return [report]
    if bool(args.ann) != bool(args.images):
        raise UserError("--ann and --images go together: one annotation file and the folder of its images")
    if not args.root and not args.ann:
        raise UserError("name the ROOT of a data set, or one annotation file with --ann FILE --images DIR")
    root = Path(args.root or ".")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    pairs = [(root / f"annotations/instances_{split}2017.json", root / f"{split}2017") for split in SPLITS]
    if args.ann:
        pairs = [(root / args.ann, root / args.images)]
    elif not any(ann.is_file() for ann, _ in pairs):
        raise UserError(f"no annotations in {root}: looked for annotations/instances_{{train,val}}2017.json")
    reports = []
    for ann, images in pairs:
        if not args.ann and not ann.is_file():
            print(f"{ann}\n  not there, left out")
            continue
        reports.append(verify_coco(ann, images, args.workers, progress=True))
        print(reports[-1], flush=True)
    return reports


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    # Hide Pillow's warnings about EXIF and the like; what matters is in the report.
    warnings.filterwarnings("ignore", module="PIL")
    reports = verify(args)
    ok = not any(report.problems for report in reports)
    if args.report:
        document = {"ok": ok, "reports": [dataclasses.asdict(report) for report in reports]}
        try:
            Path(args.report).write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.report}: {error.strerror}") from None
    return 0 if ok else 1
