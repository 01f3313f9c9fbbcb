"""docs/reference/commands.md, from the parsers of the commands and the usage of the shell scripts."""

import argparse
import re
import shlex
from importlib import import_module
from textwrap import fill
from unittest.mock import patch

from commands import ROOT

from semaim.cli import COMMANDS

PAGE = ROOT / "docs/reference/commands.md"
HEAD = """# Commands

All arguments of every command. `semaim COMMAND --help` prints the same; `tools/NAME.py` is the same command from a
checkout. CONFIG is a config file or the name of a shipped one, FILE a checkpoint, SOURCE an encoder's file or name
([encoders](../encoders.md)), DIR a folder.

A wrong input ends a command with one line that begins with `error:`, and exit status 2, or 3 if the loss is NaN or
infinite ([troubleshooting](../troubleshooting.md)). After Ctrl-C it is 130, after another signal 128 and its number.

*Generated from the code by `python tests/generate.py`.*
"""
#: A line that shows what a command is for; its data sets and files are the reader's.
EXAMPLES = {
    "pretrain": "semaim pretrain semaim/configs/pretrain/semaim_vit_small_112px_300e.py 1 --data-root my_photos",
    "train": "semaim train semaim/configs/finetune/vit_base_100e.py --pretrained FILE --data-root DIR --gpus all",
    "test": "semaim test semaim/configs/knn/plain_vit.py timm:vit_base_patch16_dinov3.lvd1689m --data-root DIR",
    "predict": "semaim predict mmdet_configs/semaim_mask_rcnn.py FILE my_photos --out predicted",
    "visualize": "semaim visualize order FILE my_photos --out orders.png",
    "browse": "semaim browse semaim/configs/pretrain/semaim_vit_base_800e.py --data-root my_photos --out crops.png",
    "verify": "semaim verify images data/imagenet --out skip.txt",
    "shrink": "semaim shrink data/imagenet data/imagenet_320 --side 320",
    "inspect": "semaim inspect timm:vit_small_patch16_224.augreg_in21k",
    "convert": "semaim convert FILE encoder.pth --to timm",
    "export": "semaim export FILE exported",
    "scenes": "semaim scenes data/scenes --images 1000",
    "sweep": "semaim sweep mmseg_configs/semaim_upernet.py --pretrained FILE --lr 1e-4 2e-4 4e-4",
    "reproduce": "semaim reproduce --scale quick --work-dir work_dirs/quick",
    "table": "semaim table work_dirs",
    "report": "semaim report work_dirs --out report.html",
    "bench": "semaim bench pretrain",
    "env": "semaim env",
}


class Asked(Exception):
    """The parser whose help was asked for."""


def parser_of(name):
    """The parser of a command, as `semaim NAME --help` makes it."""
    module, before, _ = COMMANDS[name]

    def asked(parser, file=None):
        raise Asked(parser)

    with patch.object(argparse.ArgumentParser, "print_help", asked):
        try:
            import_module(f"semaim.cli.{module}").main([*before, "--help"], "semaim" if before else f"semaim {name}")
        except Asked as found:
            return found.args[0]
    raise ValueError(f"semaim {name} --help prints no help of a parser")


def written(action):
    """An argument as it is typed: `--seeds N [N ...]`, `IMAGE ...`."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else None
    value = action.metavar or choices or action.dest.upper()
    many = {"+": f"{value} [{value} ...]", "*": f"[{value} ...]", "?": f"[{value}]", 0: "", argparse.REMAINDER: "..."}
    value = many.get(action.nargs, value) if not isinstance(value, tuple) else " ".join(value)
    return f"{', '.join(action.option_strings)} {value}".strip()


def cell(text):
    """Text in a table, in which a stroke would end the cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def said(action, prog):
    """The help of an argument, its default filled in."""
    values = {**vars(action), "prog": prog}
    if action.choices is not None:
        values["choices"] = ", ".join(map(str, action.choices))
    return cell((action.help or "") % values)


def section(parser, level, title):
    """A parser's description, its arguments as tables, and its subcommands as sections of their own."""
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    inner = [a for a in shown if isinstance(a, argparse._SubParsersAction)]
    words = [written(a) for a in shown if not a.option_strings and a not in inner]
    needed = [written(a) for a in shown if a.option_strings and a.required]
    free = any(a.option_strings and not a.required for a in shown)
    line = parser.usage or " ".join([parser.prog, *words, *needed, *["[flags]"] * free, *["COMMAND ..."] * bool(inner)])
    out = [
        f"{'#' * level} `{title}`",
        "",
        fill(cell(parser.description or ""), 120, break_on_hyphens=False),
        "",
        "```text",
    ]
    out += [line % {"prog": parser.prog}, "```", ""]
    # A group that a command makes itself has a table of its own.
    tables = {"argument": parser._action_groups[0]._group_actions + parser._action_groups[1]._group_actions}
    tables |= {group.title: group._group_actions for group in parser._action_groups[2:]}
    for heading, actions in tables.items():
        rows = [f"| `{code(written(a))}` | {said(a, parser.prog)} |" for a in actions if a in shown and a not in inner]
        out += [f"| {heading} | meaning |", "| --- | --- |", *rows, ""] if rows else []
    if parser.epilog:
        out += [fill(cell(parser.epilog), 120, break_on_hyphens=False), ""]
    for action in inner:
        for name, other in action.choices.items():
            out += section(other, level + 1, f"{title} {name}")
    return out


def code(text):
    """Code in a table."""
    return text.replace("|", "\\|")


def scripts():
    """The shell scripts with what they say of themselves."""
    out = ["## Shell scripts", ""]
    for path in sorted((ROOT / "tools").glob("*.sh")):
        comment = re.match(r"(?:#!.*\n)((?:#.*\n)+)", path.read_text())
        lines = [line.removeprefix("#").removeprefix(" ") for line in comment[1].splitlines()]
        if usage := re.search(r'^usage="(.*?)"$', path.read_text(), re.M | re.S):
            lines += ["", *usage[1].splitlines()]
        out += [f"### `tools/{path.name}`", "", "```text", *lines, "```", ""]
    return out


def page():
    """The page's text."""
    out = [HEAD]
    out += ["| command | what it does |", "| --- | --- |"]
    out += [f"| [`semaim {name}`](#semaim-{name}) | {cell(text)} |" for name, (_, _, text) in COMMANDS.items()]
    out += ["| [`tools/NAME.sh`](#shell-scripts) | installing, testing, training on several GPUs and with Slurm |", ""]
    for name in COMMANDS:
        part = section(parser_of(name), 2, f"semaim {name}")
        if name in EXAMPLES:
            part[4:4] = [f"Example: `{EXAMPLES[name]}`", ""]
        out += part
    return "\n".join(out + scripts()).rstrip() + "\n"


def check_examples():
    """The examples are lines that the parsers take; argparse ends the program where they are not."""
    for name, line in EXAMPLES.items():
        words = shlex.split(line)[2:]
        parser_of(name).parse_args(words[:1] + words[2:] if name == "pretrain" else words)
