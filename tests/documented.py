"""What the pages tell a reader to type: found, run in a sandbox in the page's order, or checked without running it."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, which
from textwrap import dedent
from typing import NamedTuple
from unittest.mock import patch

import yaml
from commands import CPU, ROOT, fork

from semaim.cli import dispatch

#: Blocks of these languages are commands; others than these and Python are no input of a shell or an interpreter.
SHELL = ("", "bash", "sh", "shell", "console")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n`]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
#: Words at which a shell ends a simple command.
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "<<", "2>&1"}
#: Scripts for several GPUs -> the command that each starts with the same words.
SCRIPTS = {
    "tools/pretrain.sh": lambda *words: ["pretrain", *words],
    "tools/dist_train.sh": lambda config, gpus, *words: ["train", config, "--gpus", gpus, *words],
    "tools/dist_test.sh": lambda config, file, gpus, *words: ["test", config, file, "--gpus", gpus, *words],
    "tools/slurm_train.sh": lambda _, job, config, folder, *words: ["train", config, "--work-dir", folder, *words],
}
#: What a shell does with a line before it starts a program.
NOT_SIMPLE = re.compile(r"[|&;<>*?~$`{]|^[A-Z_]+=")
LISTED = ROOT / "tests/not_run.yaml"
#: Not linked into a sandbox: what runs write, and what no page reads.
OWN = ("data", "work_dirs", "build", "dist", "site")
#: Not linked either: it, and what calls it, would install into the environment that the tests run in.
INSTALLER = "setup.sh"


class Step(NamedTuple):
    """A command, or consecutive blocks of Python: one script."""

    page: str  #: path in the repository
    python: bool
    text: str  #: of a command: one line, without comments

    @property
    def name(self) -> str:
        """How tests/not_run.yaml lists it: a command as it is, Python by its first line."""
        return f"python: {self.text.strip().splitlines()[0]}" if self.python else self.text


def pages() -> list[str]:
    """All pages that may have commands."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *docs]


def without_comment(line: str) -> str:
    """A line of a shell without its comment; a # within quotes or a word is none."""
    quote = ""
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (not place or line[place - 1].isspace()):
            return line[:place]
    return line


def commands_in(text: str, console: bool = False) -> list[str]:
    """The commands of a block, each on one line; of a console only what follows its prompt."""
    lines, found = [without_comment(line).strip() for line in text.splitlines()], []
    if console:
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    before = ""
    for line in filter(None, lines):
        whole = f"{before} {line}".strip()
        before = whole.removesuffix("\\") if whole.endswith("\\") else ""
        if not before:
            found.append(" ".join(whole.split()))
    assert not before, f"nothing follows the backslash: {before}"
    return found


def steps(page: str, text: str | None = None) -> list[Step]:
    """What a page has its reader type, in its order."""
    found: list[Step] = []
    for block in FENCE.finditer((ROOT / page).read_text() if text is None else text):
        content = dedent(block["text"])
        if block["language"] in SHELL:
            found += [Step(page, False, line) for line in commands_in(content, block["language"] == "console")]
        elif block["language"] == "python":
            found.append(Step(page, True, content))
    return found


class Listed(NamedTuple):
    """tests/not_run.yaml."""

    reasons: dict[str, str]
    not_run: dict[str, dict[str, list[str]]]  #: reason -> page -> names of steps
    run_by: dict[str, str]  #: page -> the test that reads and runs it
    continues: dict[str, str]  #: page -> the page whose commands come before its own

    def names(self, page: str) -> list[str]:
        """What is not run of a page."""
        return [name for listed in self.not_run.values() for name in listed.get(page, [])]

    def reason(self, step: Step) -> str | None:
        """Why a step is not run; None if it is run."""
        return next((why for why, listed in self.not_run.items() if step.name in listed.get(step.page, [])), None)


def listed() -> Listed:
    """What is not run, and why."""
    return Listed(**yaml.safe_load(LISTED.read_text()))


def to_run(page: str) -> list[Step]:
    """Steps that are not listed; Python blocks that follow each other are one script, as in one interpreter."""
    known, found = listed(), []
    for step in steps(page):
        if known.reason(step):
            continue
        if step.python and found and found[-1].python:
            step = Step(page, True, f"{found.pop().text}\n{step.text}")
        found.append(step)
    return found


# Running.


def links(folder: Path) -> None:
    """Fill a folder with the repository's tree, every file a link: what is written there stays there."""
    for parent, folders, files in os.walk(ROOT):
        top = Path(parent) == ROOT
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and not (top and name in OWN)]
        here = folder / Path(parent).relative_to(ROOT)
        here.mkdir(parents=True, exist_ok=True)
        for name in (name for name in files if name != INSTALLER):
            (here / name).symlink_to(Path(parent) / name)
    (folder / ".venv").symlink_to(sys.prefix)


def run_page(page: str, folder: Path, before: Path | None = None) -> None:
    """Type the page's commands in a new sandbox, after those of another's; each has to succeed."""
    links(folder)
    for name in OWN[:2]:
        if before is not None and (before / name).exists():
            copytree(before / name, folder / name, symlinks=True)
    for step in to_run(page):
        done = run(step, folder)
        output = f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{page}: exit status {done.returncode} of\n{step.text}\n{output}"


def run(step: Step, folder: Path) -> subprocess.CompletedProcess:
    """A step's whole run, offline and on the CPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, **CPU, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "VIRTUAL_ENV": sys.prefix}
    env |= {"PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1"}  # no command may change the environment
    env["PATH"] = f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    if step.python:
        (folder / "typed.py").write_text(step.text)
        line = [str(folder / "typed.py")]
    elif (started := python_script(shlex.split(step.text))) and not NOT_SIMPLE.search(step.text):
        line = [str(folder / started[0]), *started[1]]
    else:
        bash = ["bash", "-euo", "pipefail", "-c", step.text]
        return subprocess.run(bash, capture_output=True, text=True, timeout=1800, env=env, cwd=folder)
    return fork(line, env, folder, timeout=1800)


def python_script(words: list[str]) -> tuple[str, list[str]] | None:
    """The script that a command runs, and the arguments; None for what is no Python script."""
    program, *rest = words
    if Path(program).name == "semaim":
        return ".venv/bin/semaim", rest
    if program.endswith(".py"):
        return program, rest
    if Path(program).name.startswith("python") and rest and rest[0].endswith(".py"):
        return rest[0], rest[1:]
    return None


# Checking what is not run.


class Parsed(BaseException):
    """A command's arguments are right; raised in place of its work."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__()
        self.arguments = arguments


def stop_after_parsing(parser, args=None, namespace=None):
    """In place of `parse_args`."""
    found, unknown = parser.parse_known_args(args, namespace)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed(found)


def simple(text: str) -> Iterator[list[str]]:
    """The simple commands of a line, without the variables set before them."""
    words: list[str] = []
    for word in [*shlex.split(text), ";"]:
        if word in OPERATORS:
            if words:
                yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


def check(text: str, placeholders: bool = False) -> None:
    """What can be known of a command without running it; `AssertionError` or an error of the suite."""
    from semaim.engine.config import load_config
    from semaim.registry import list_tasks

    for words in simple(text):
        arguments = parsed(words)
        if arguments is None:
            continue
        if tasks := getattr(arguments, "tasks", None):
            assert {*tasks.split(",")} <= {*list_tasks()}, f"no such task: {tasks}"
        config = getattr(arguments, "config", None)
        if config and not (placeholders and config == "CONFIG"):
            load_config(str(config), getattr(arguments, "cfg_options", None))


def parsed(words: list[str]) -> argparse.Namespace | None:
    """The arguments of one of the suite's commands, by its own parser; None for others, which have to exist."""
    if words[0].endswith(".sh"):
        assert os.access(ROOT / words[0], os.X_OK), f"no such script: {words[0]}"
        if words[0] not in SCRIPTS:
            return None
        return stopped(lambda: dispatch(SCRIPTS[words[0]](*words[1:])))
    if started := python_script(words):
        script, rest = started
        if Path(script).name == "semaim":
            return stopped(lambda: dispatch(rest))
        assert (ROOT / script).is_file(), f"no such file: {script}"
        if not script.startswith("tools/"):
            return None
        return stopped(lambda: importlib.import_module(f"semaim.cli.{Path(script).stem}").main(rest))
    if Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
        assert find_spec(words[2]), f"no such module: {words[2]}"
        if not words[2].startswith("semaim."):
            return None
        with patch.object(sys, "argv", words[2:]):
            return stopped(importlib.import_module(words[2]).main)
    assert which(words[0]) or subprocess.run(["bash", "-c", f"type {words[0]}"], capture_output=True).returncode == 0, (
        f"no such program: {words[0]}"
    )
    return None


def stopped(start) -> argparse.Namespace:
    """The arguments at which a command has stopped."""
    try:
        with patch.object(argparse.ArgumentParser, "parse_args", stop_after_parsing):
            start()
    except Parsed as found:
        return found.arguments
    except SystemExit as end:
        raise AssertionError(f"exit status {end.code}") from None
    raise AssertionError("it parses no arguments")
