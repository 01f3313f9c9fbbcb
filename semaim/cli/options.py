"""Flags that several commands have."""

import argparse

from semaim.errors import UserError


class ConfigOptions(argparse.Action):
    """As mmengine's DictAction, which is imported when the flag is read; what it cannot read is a `UserError`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace, values, option_string=None) -> None:
        """Add KEY=VALUE pairs to the dict that the flag gives."""
        from mmengine.config import DictAction  # takes seconds

        read = DictAction(self.option_strings, self.dest, nargs=self.nargs)
        for word in values:
            key, equals, _ = word.partition("=")
            if not equals or not key.strip("."):
                raise UserError(f"--cfg-options {word}: write KEY=VALUE, such as base_lr=1e-4, without spaces")
            try:
                read(parser, namespace, [word], option_string)
            except AssertionError as error:  # of brackets
                raise UserError(f"--cfg-options {word}: {' '.join(str(error).split())}") from None


FLAGS: dict[str, dict] = {
    "--data-root": {"metavar": "DIR", "help": "folder of the data, in place of the config's"},
    "--pretrained": {"metavar": "FILE", "help": "checkpoint, of any dialect, whose encoder to start from"},
    "--work-dir": {"metavar": "DIR", "help": "where to write (default: work_dirs/CONFIG)"},
    "--allow-partial": {
        "action": "store_true",
        "help": "load what fits of an encoder that is another network; results.json and the table say so",
    },
    "--gpus": {
        "default": "1",
        "metavar": "N",
        "help": "GPUs of this machine, or CPU processes where it has none; all for all",
    },
    "--cfg-options": {
        "nargs": "+",
        "action": ConfigOptions,
        "metavar": "KEY=VALUE",
        "help": "change keys of the config",
    },
}


def add_flags(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add some of `FLAGS`."""
    for name in names:
        parser.add_argument(name, **FLAGS[name])
