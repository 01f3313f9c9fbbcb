"""The flags of `semaim.data.scenes`, separate from the drawing code, which `--help` does not need."""

import argparse
import os

LEVELS = ("easy", "normal")  #: names of `semaim.data.scene_drawing.LEVELS`


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    """Flags named like the arguments of `write_scenes`."""
    text = "Scenes of emoji objects with exact labels: the data set that needs no download."
    parser = argparse.ArgumentParser(prog=prog, description=text)
    parser.add_argument("directory", metavar="DIR", help="folder to make; must be absent, empty, or the same")
    parser.add_argument("--images", type=int, required=True, help="scenes in all, train and val together")
    parser.add_argument("--size", type=int, default=128, help="side of a scene in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share of val (%(default)s)")
    parser.add_argument("--level", default="normal", help=f"difficulty: {' or '.join(LEVELS)} (%(default)s)")
    parser.add_argument("--unlabelled", type=int, default=0, help="further images, without labels (%(default)s)")
    parser.add_argument("--unlabelled-size", type=int, help="their side in pixels (as --size)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    return parser
