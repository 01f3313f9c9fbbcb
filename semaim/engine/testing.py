"""Measuring a checkpoint, for every task."""

import torch
from mmengine.config import Config

import semaim.engine.hooks  # noqa: F401  registers what configs name
import semaim.engine.optim  # noqa: F401
from semaim.engine.launcher import join
from semaim.engine.training import Prepared, check_sockets, runnable_task
from semaim.errors import UserError
from semaim.reading import forget


def prepare_test(cfg: Config, weights: str | None, check: bool = True) -> Prepared:
    """Build the data of a test and check what can be checked in advance; the config is completed in place.

    Args:
        cfg: of the test.
        weights: a checkpoint of any dialect, or another value that the task accepts, such as "random".
        check: check for everything that would end the test later; else the parent process has done so.

    Raises:
        UserError: something is wrong that would end the test, or give a wrong figure.
    """
    check_sockets(cfg)
    task = runnable_task(cfg)
    if cfg.get("tta") and not getattr(task, "averages", False):
        raise UserError("--tta is for segmentors")
    if cfg.get("tasks") is not None and not getattr(task, "shares", False):
        raise UserError("--tasks is for configs of frozen features, such as semaim/configs/knn/vit_base.py")
    if cfg.get("test_roots") and not getattr(task, "shares", False):
        raise UserError("--test-root is for frozen features: semaim/configs/test_sets, or --tasks test_sets")
    if not weights:
        raise UserError(f"name a checkpoint: tools/test.py CONFIG FILE{task.instead}")
    return task.prepare_test(cfg, weights, check)


def test(cfg: Config, weights: str, prepared: Prepared | None = None) -> dict[str, float]:
    """Measure a checkpoint as the config says, in this process, together with any others of a distributed launch.

    Args:
        cfg: of the test.
        weights: as for `prepare_test`.
        prepared: result of `prepare_test` for this config, in this process; None to prepare here.

    Returns:
        Metrics by name, as in results.json.
    """
    join()
    torch.manual_seed(cfg.seed)
    run = prepared or prepare_test(cfg, weights, check=False)
    metrics = run.task.measure(cfg, run, weights)
    forget()
    return metrics
