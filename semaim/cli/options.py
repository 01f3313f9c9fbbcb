"""Flags shared by several commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from semaim.errors import UserError

if TYPE_CHECKING:
    import torch

#: The end of `--help` of commands that start processes.
NODES = "Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each, or start it with torchrun."
STATUSES = (
    "Exit status: 0; 2 for a mistake in what is given, or no space to save; 3 if the loss has diverged; 124 after"
    " --timeout; 128 + N if signal N has ended the run (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1: a training"
    " has saved its state) or one of its processes (137: killed, most likely for want of memory); 1 otherwise."
)


class ConfigOptions(argparse.Action):
    """mmengine's DictAction, imported only when the flag is used; `UserError` for what it cannot parse."""

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
    "--data-root": {"metavar": "DIR", "help": "folder of the data (default: the config's)"},
    "--classes": {
        "metavar": "NAME,...",
        "help": "names of the classes of label maps, in the order of their values 0, 1, ... (docs/own_data.md)",
    },
    "--data": {
        "metavar": "FILE.yaml",
        "help": "description of the data: folders, classes, colours (docs/own_data.md)",
    },
    "--pretrained": {
        "metavar": "SOURCE",
        "help": "encoder to start from: a checkpoint of any dialect, timm:NAME[.TAG], hf-hub:OWNER/REPO, local-dir:DIR",
    },
    "--arch": {"metavar": "NAME[.TAG]", "help": "timm's name of the encoder in a file that does not tell it"},
    "--work-dir": {"metavar": "DIR", "help": "where to write (default: work_dirs/CONFIG)"},
    "--allow-partial": {
        "action": "store_true",
        "help": "load what fits of an encoder that is a different network; results.json and the table say so",
    },
    "--wandb": {
        "nargs": "?",
        "const": "",
        "metavar": "PROJECT",
        "help": "log to Weights & Biases too (default project: $WANDB_PROJECT, or semaim); WANDB_MODE=offline without"
        " network",
    },
    "--mlflow": {
        "nargs": "?",
        "const": "",
        "metavar": "EXPERIMENT",
        "help": "log to MLflow too (default experiment: $MLFLOW_EXPERIMENT_NAME, or semaim), at $MLFLOW_TRACKING_URI"
        " or in mlruns beside the work folder",
    },
    "--gpus": {
        "default": "1",
        "metavar": "N",
        "help": "number of GPUs of this machine, or all; without a GPU, number of CPU processes",
    },
    "--device": {"metavar": "DEVICE", "help": "cpu, cuda or cuda:N (default: a GPU where there is one)"},
    "--timeout": {
        "type": float,
        "default": 1800.0,
        "metavar": "SECONDS",
        "help": "end a run of several processes, with exit status 124, if one keeps the others waiting for this time"
        " without a batch, checkpoint or picture (default: %(default)g)",
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


def device_of(name: str | None) -> torch.device:
    """The device to run on; `UserError` if it does not exist."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).strip().splitlines()[0]}") from None
    return device
