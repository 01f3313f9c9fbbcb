#!/usr/bin/env python
"""Look into checkpoints, write them in other dialects: tools/checkpoint.py {inspect,convert,export} (see --help)."""

import argparse
import sys

from semaim import checkpoint
from semaim.errors import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Checkpoints of plain ViTs: official SemAIM, MAE, timm, DINO, mmpretrain, detectron2, ours."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what it is, and what each consumer would load")
    inspect.add_argument("file")
    convert = commands.add_parser("convert", help="write it in another dialect, the same weights to the last bit")
    convert.add_argument("file")
    convert.add_argument("out", help=".pth, or for timm also .safetensors")
    convert.add_argument("--to", required=True, choices=checkpoint.DIALECTS)
    export = commands.add_parser("export", help='write what timm.create_model("local-dir:DIR", pretrained=True) opens')
    export.add_argument("file")
    export.add_argument("folder", metavar="DIR")
    for command in (convert, export):
        command.add_argument("--allow-partial", action="store_true", help="write what is a plain ViT's of another one")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.command == "inspect":
        print(checkpoint.inspect(args.file))
    elif args.command == "convert":
        left = checkpoint.convert(args.file, args.out, args.to, args.allow_partial)
        print(f"wrote {args.out} ({args.to})" + (f"; left out: {checkpoint.grouped(left)}" if left else ""))
    else:
        architecture = checkpoint.export(args.file, args.folder, args.allow_partial)
        print(f"wrote {args.folder}, a {architecture} of timm, opened by")
        print(f'    timm.create_model("local-dir:{args.folder}", pretrained=True)')
        found = checkpoint.read(args.file)
        if found.heads_guessed:
            heads = found.sizes["num_heads"]
            print(f"{heads} head{'s' * (heads > 1)}, a guess: the file does not tell; see num_heads in its config.json")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
