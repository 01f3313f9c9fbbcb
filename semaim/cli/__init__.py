"""The command line: `semaim COMMAND ...`, the same commands as tools/."""

from __future__ import annotations

import sys
from importlib import import_module

#: command -> its module here, arguments put before the given ones, description.
COMMANDS = {
    "pretrain": ("pretrain", (), "pretrain SemAIM: ViT-B/16 on all GPUs, or another config"),
    "train": ("train", (), "train what a config says: pretraining, fine-tuning, a probe, a detector, a segmentor"),
    "test": ("test", (), "measure a checkpoint: accuracy, k-NN, a fast probe, box and mask AP, mIoU"),
    "predict": ("predict", (), "predict images and videos with a detector, segmentor or classifier"),
    "features": ("features", (), "write the features of images by any encoder"),
    "visualize": ("visualize", (), "pictures of orders, attention, reconstructions, predictions and curves"),
    "browse": ("browse", (), "a picture of training images after augmentation"),
    "verify": ("verify_dataset", (), "find what is wrong with a data set: images, annotations, label maps"),
    "shrink": ("shrink", (), "write a copy of a data set with smaller images, which load faster"),
    "inspect": ("checkpoint", ("inspect",), "what a checkpoint is, and what each task would load from it"),
    "convert": ("checkpoint", ("convert",), "write a checkpoint in another dialect"),
    "export": ("checkpoint", ("export",), "write an encoder as a folder that timm opens"),
    "convert-labels": ("convert_labels", (), "write label maps with other numbers"),
    "scenes": ("scenes", (), "draw the built-in scenes, the data set that needs no download"),
    "sweep": ("sweep", (), "search learning rate and layer decay"),
    "reproduce": ("reproduce", (), "from images to the results table, every stage"),
    "table": ("results_table", (), "measured results next to published ones"),
    "board": ("board", (), "curves and pictures of runs in the browser, by TensorBoard"),
    "report": ("report", (), "one HTML file about runs"),
    "bench": ("benchmark", (), "speed and memory compared with a baseline"),
    "env": ("check_env", (), "what is installed, and what works on this machine"),
    "parity": ("check_parity", (), "compare with recorded results of the reference implementations"),
    "tags": ("check_tags", (), "whether each task loads every plain ViT of timm's correctly"),
}
OPTIONS = ("-h", "--help", "--version")


def usage() -> str:
    """What `semaim --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    head = "usage: semaim COMMAND ...\n\nPretrains plain vision transformers, and measures any of them.\n\ncommands:"
    foot = "options:\n  -h, --help  show this; after a command, its flags\n  --version   show the version"
    return "\n".join([head, *lines, "", foot])


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names; returns its exit status."""
    from semaim.errors import run

    words = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: dispatch(words))


def dispatch(words: list[str]) -> int | None:
    """As `main`, but raises errors."""
    from semaim.errors import UserError, nearest

    if not words or words[0] in OPTIONS[:2]:
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else UserError.status
    if words[0] == "--version":
        from semaim import __version__

        print(f"semaim {__version__}")
        return 0
    if words[0] not in COMMANDS:
        kind, known = ("option", OPTIONS) if words[0].startswith("-") else ("command", COMMANDS)
        raise UserError(f"unknown {kind} {words[0]}: {nearest(words[0], known)}")
    module, before, _ = COMMANDS[words[0]]
    # argparse adds a subcommand to the program's name itself.
    prog = "semaim" if before else f"semaim {words[0]}"
    return import_module(f"semaim.cli.{module}").main([*before, *words[1:]], prog)
