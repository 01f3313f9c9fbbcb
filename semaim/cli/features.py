"""Features of images by any encoder, in a file: tools/features.py SOURCE IMAGES... --out FILE.npy (see --help)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from semaim.cli.choices import POOLS
from semaim.cli.options import add_flags, device_of
from semaim.errors import UserError, writing


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the features of images by any encoder: a vector for each image, or its patch tokens.",
        epilog="FILE.npy is float32 (images, channels), with --tokens (images, patches, channels), patches row by row;"
        " FILE.txt beside it has the path of each row's image. FILE.parquet has the columns path and features. Images"
        " are prepared as the encoder's source says: size, crop, mean and standard deviation. An image that cannot be"
        " read has no row. The numbers are those of semaim.load_encoder(SOURCE).features(images, pool), in fp32.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="checkpoint of any dialect, timm:NAME[.TAG], hf-hub:OWNER/REPO, local-dir:DIR",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .npy or .parquet file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--pool",
        choices=POOLS,
        help="class token, mean of the patches, or the model's own pooling (default: cls; avg without a class token)",
    )
    what.add_argument("--tokens", action="store_true", help="write the patch tokens, after the final norm, into a .npy")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the encoder's)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images (default: %(default)s)",
    )
    add_flags(parser, "--device", "--arch")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_args(argv, prog)
    out = Path(args.out)
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out {out}: name a .npy or .parquet file")
    if args.tokens and out.suffix != ".npy":
        raise UserError(f"--out {out}: patch tokens are written to a .npy file")
    for flag, least in (("size", 1), ("batch", 1), ("workers", 0)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise UserError(f"--{flag} {value}: give {least} or more")
    listed = out.with_suffix(".txt")
    if out.suffix == ".npy" and listed.exists() and not out.exists():
        raise UserError(f"--out {out} would overwrite {listed}, which is of no earlier {out.name}: name another file")
    from semaim.data.findings import progress_bar  # takes seconds, as what follows
    from semaim.data.folder import find_images
    from semaim.engine.feature_files import WRITERS, check_space, features_of, prepare

    device = device_of(args.device)
    given = [path for name in args.images for path in (find_images(name) if Path(name).is_dir() else [name])]
    paths = list(dict.fromkeys(given))
    if odd := [path for path in paths if "\n" in path]:
        raise UserError(f"{odd[0]!r} has a line break in its name, which a list of files cannot hold: rename it")
    prepared = prepare(args.source, args.arch, args.size)
    encoder = prepared.encoder
    pool = None if args.tokens else args.pool or ("cls" if encoder.has_class_token else "avg")
    if pool is not None:
        encoder.check_pool(pool)
    print(f"{prepared.words}\n{len(paths):,} images; {f'pool {pool}' if pool else 'patch tokens'}")

    count, broken = 0, 0
    with writing(out):
        writer = WRITERS[out.suffix](out)
        try:
            with progress_bar("features", len(paths), True) as advance:
                parts = features_of(prepared, paths, pool, args.batch, args.workers, device)
                for number, part in enumerate(parts):
                    for line in part.errors:
                        print(f"error: {line}", file=sys.stderr)
                    broken += len(part.errors)
                    if part.features is not None:
                        if not count:
                            check_space(out, len(paths), part.features.shape[1:])
                        writer.add(part.features, part.paths)
                        count += len(part.features)
                    advance(len(part.paths) + len(part.errors))
                    if number % 100 == 99 and not sys.stderr.isatty():
                        print(f"features of {count + broken:,} of {len(paths):,} images", flush=True)
            if not count:
                raise UserError(f"none of the {broken:,} images can be read: nothing is written")
            writer.finish()
        except BaseException:  # an interrupt, too, leaves no half file
            writer.discard()
            raise
    print(f"wrote {out}: {count:,} rows")
    if broken:
        raise UserError(f"{broken:,} of {len(paths):,} images have no row: see the errors above")
    return 0
