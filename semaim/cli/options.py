"""`--cfg-options KEY=VALUE ...` of the commands."""

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
