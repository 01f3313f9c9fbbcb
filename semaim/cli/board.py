"""Show the curves and pictures of runs in the browser, by TensorBoard: semaim board [DIR] (see --help)."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from semaim.errors import UserError


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [DIR] [flags of TensorBoard]",
        description="Show the curves and pictures of all runs in DIR, a work folder or a folder of them, in the"
        " browser. This starts the TensorBoard of this environment, which prints its address; Ctrl-C ends it. Flags"
        " are TensorBoard's own: --port 6007 for another port, --bind_all for browsers on other machines.",
    )
    parser.add_argument("folder", nargs="?", default="work_dirs", metavar="DIR", help="(default: %(default)s)")
    # Only the first word is ours: argparse could not tell DIR from the value of a flag that it does not know.
    own = 1 if words and (not words[0].startswith("-") or words[0] in ("-h", "--help")) else 0
    folder = parser.parse_args(words[:own]).folder
    if not Path(folder).is_dir():
        raise UserError(f"no such folder: {folder}: name the work folder of a run, or a folder of them")
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"TensorBoard is not installed: {sys.executable} -m pip install tensorboard")
    # In place of this process, so that signals are TensorBoard's.
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", folder, *words[own:]])
