"""Inspect checkpoints, write them in other dialects: tools/checkpoint.py {inspect,convert,export} (see --help)."""

import argparse
import tempfile
from pathlib import Path

from semaim.cli.choices import DIALECTS
from semaim.cli.options import add_flags
from semaim.errors import UserError
from semaim.places import is_name, to_install


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Checkpoints of plain ViTs: official SemAIM, MAE, timm, DINO, mmpretrain, detectron2, ours.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what it is, and what each task would load")
    inspect.add_argument("file", metavar="SOURCE", help="a file, timm:NAME[.TAG], hf-hub:OWNER/REPO or local-dir:DIR")
    add_flags(inspect, "--arch")
    convert = commands.add_parser("convert", help="write it in another dialect, the same weights to the last bit")
    convert.add_argument("file", help="a checkpoint of any dialect")
    convert.add_argument("out", help=".pth, or for timm also .safetensors")
    convert.add_argument(
        "--to",
        required=True,
        choices=(*DIALECTS, "mmdet"),
        help="mmdet takes a whole ViTDet detector of detectron2's, the others an encoder",
    )
    export = commands.add_parser("export", help="write a folder that timm opens, with a model card")
    export.add_argument("file", metavar="FILE", help="a checkpoint of any dialect")
    export.add_argument("folder", metavar="DIR", help="where to write; with --to hf-hub OWNER/REPO on the hub")
    export.add_argument("--to", choices=("hf-hub",), help="push it to the Hugging Face hub, in one commit")
    export.add_argument("--private", action="store_true", help="with --to hf-hub: to a private repository")
    export.add_argument("--license", metavar="NAME", help="of the weights, by the hub's name, such as apache-2.0")
    export.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="WORK_DIR",
        help="work folders, or folders of them, whose results of FILE the model card has",
    )
    for command in (convert, export):
        command.add_argument("--allow-partial", action="store_true", help="of another ViT, write a plain ViT's parts")
    return parser.parse_args(argv)


def convert_detector(file: str, out: str, to: str) -> list[str]:
    """As `checkpoints.convert`, for a whole detector; `UserError` if mmdet is not installed."""
    try:
        from semaim.detection.released import convert
    except ImportError as error:
        raise UserError(f"{to} cannot be imported ({error}): install it with {to_install('all')}") from None
    return convert(file, out)


def warn_of_heads(file: str, out: str) -> None:
    """Warn if the written file would be taken for one of another number of heads, which no tensor shows."""
    from semaim import checkpoints

    heads, guess = (checkpoints.read(path).sizes["num_heads"] for path in (file, out))
    if heads != guess:
        print(f"it has {heads} heads; {out} does not say so and is taken for one of {guess}: set num_heads, or use")
        print(f"    tools/checkpoint.py export {file} DIR")


def exported(args: argparse.Namespace) -> None:
    """Write the folder and its card, push it if asked to, and say how to open it."""
    from semaim import checkpoints
    from semaim.checkpoints.pushing import check_repository, push
    from semaim.results.card import Measured, check_card, check_license, write_card

    check_license(args.license)
    if args.to:
        check_repository(args.folder)
    else:
        check_card(args.folder)
    measured = Measured(args.file, args.runs)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if args.to else args.folder)
        source = f"hf-hub:{args.folder}" if args.to else f"local-dir:{args.folder}"
        architecture = checkpoints.export(args.file, folder, args.allow_partial)
        write_card(args.file, folder, source, architecture, args.license, measured)
        wrote = f"pushed {push(folder, args.folder, args.private)}" if args.to else f"wrote {folder}"
    print(f"{wrote}, a {architecture} of timm with a model card, opened by")
    print(f'    timm.create_model("{source}", pretrained=True)')
    if not args.license:
        print("its card says that no licence was stated: --license NAME states one")


def inspected(source: str, arch: str | None = None) -> str:
    """The description of a file of our own ViT's shape, or of any other encoder."""
    from semaim import checkpoints
    from semaim.encoders.inspecting import describe
    from semaim.encoders.sources import trained_here

    if arch or is_name(source) or trained_here(checkpoints.read_file(source)):
        return describe(source, arch)
    try:
        own = checkpoints.inspect(source)
    except UserError as error:
        refused = error
    else:
        try:
            other = describe(source)
        except UserError as error:
            other = f"refused: {error}"
        return f"{own}\n\nBy the configs plain_*.py, for any encoder:\n{other}"
    try:
        return describe(source)
    except UserError as error:
        raise refused if "--arch" not in str(error) else error from None


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    from semaim import checkpoints  # takes seconds
    from semaim.checkpoints.normalisation import Statistics

    if args.command == "inspect":
        print(inspected(args.file, args.arch))
    elif args.command == "convert":
        if args.to == "mmdet":
            left = convert_detector(args.file, args.out, args.to)
        else:
            left = checkpoints.convert(args.file, args.out, args.to, args.allow_partial)
        print(f"wrote {args.out} ({args.to})" + (f"; left out: {checkpoints.grouped(left)}" if left else ""))
        if args.to != "mmdet":
            warn_of_heads(args.file, args.out)
        statistics = checkpoints.read(args.file).statistics if args.to == "timm" else None
        if statistics and not statistics.same(Statistics()):
            print(f"its images have {statistics}; this file holds none: set dataset.mean and dataset.std, or use")
            print(f"    tools/checkpoint.py export {args.file} DIR")
    elif args.private and not args.to:
        raise UserError("--private is for --to hf-hub")
    else:
        exported(args)
        found = checkpoints.read(args.file)
        if found.heads_guessed:
            heads = found.sizes["num_heads"]
            print(f"{heads} head{'s' * (heads > 1)}, a guess: the file has no number; see num_heads in its config.json")
    return 0
