"""Draw the built-in scenes: semaim scenes DIR --images 1000, like python -m semaim.data.scenes."""

from semaim.data.scene_options import make_parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    make_parser(prog).parse_args(argv)  # help and errors come before the slow import
    from semaim.data.scenes import main as draw

    return draw(argv, prog)
