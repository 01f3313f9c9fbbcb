"""Weights & Biases and MLflow beside TensorBoard: what a run logs, from a thread of its own.

mmengine's own backends are not used: W&B's ignores step numbers, uploads the code and cannot resume, and MLflow's
opens a store that MLflow 3 refuses.
"""

import importlib.util
import numbers
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MessageHub

from semaim.errors import UserError, nearest
from semaim.places import IN_CHECKOUT

PATIENCE = 60.0  #: seconds that the end of a run waits for what is not sent yet
LONGEST = 500  #: characters of a parameter in MLflow


class Tracker(Protocol):
    """A service that keeps the figures of runs."""

    title: str  #: of the service
    place: str  #: in it, for the log

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Figures by name."""

    def picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """A picture, uint8 (H, W, 3)."""

    def close(self, figures: dict[str, float], finished: bool) -> None:
        """The end of the run, with the figures of results.json."""


class Wandb:
    """Weights & Biases.

    Args:
        project: the project's name.
        run: name of the run, the same after resuming.
        folder: work folder.
        config: the run's settings.
    """

    title = "W&B"

    def __init__(self, project: str, run: str, folder: Path, config: dict):
        import wandb

        # Its copy of the terminal would catch the progress bar.
        settings = wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE)
        self.run: Any = wandb.init(
            project=project, id=run, name=folder.resolve().name, dir=folder, resume="allow", settings=settings
        )
        self.run.config.update(config, allow_val_change=True)
        # W&B's own step only grows: it would drop what a run computes again after its last checkpoint.
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")
        folder_of = Path(self.run.dir).parent
        where = f"{folder_of}, which `wandb sync` sends" if self.run.offline else self.run.url
        self.place, self.image = f"project {project}: {where}", wandb.Image

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """See `Tracker`."""
        self.run.log({**values, "iteration": iteration})

    def picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """See `Tracker`."""
        self.run.log({name: self.image(image), "iteration": iteration})

    def close(self, figures: dict[str, float], finished: bool) -> None:
        """See `Tracker`."""
        self.run.summary.update(figures)
        self.run.finish(exit_code=int(not finished))


class MLflow:
    """MLflow, on the server or data base of MLFLOW_TRACKING_URI, else in the folder mlruns beside the work folder.

    Args:
        experiment: the experiment's name.
        run, folder, config: as for `Wandb`.
    """

    title = "MLflow"

    def __init__(self, experiment: str, run: str, folder: Path, config: dict):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            place = (folder.resolve().parent / "mlruns").as_uri()
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # else MLflow 3 wants a data base, which needs SQLAlchemy
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(place)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        known = self.client.search_runs([number], f"tags.`semaim.run` = '{run}'", max_results=1)
        own = known[0] if known else self.client.create_run(
            number, run_name=folder.resolve().name, tags={"semaim.run": run}
        )  # fmt: skip
        self.id = own.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        # A parameter cannot be changed: a resumed run's are those of its start.
        params = [Param(key, value) for key, value in parameters(config).items() if key not in own.data.params]
        for start in range(0, len(params), 100):  # at most 100 in one request
            self.client.log_batch(self.id, params=params[start : start + 100])
        self.place = f"experiment {experiment}: {place}"

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """See `Tracker`."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id, metrics=[Metric(spelt(name), value, now, iteration) for name, value in values.items()]
        )

    def picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """See `Tracker`."""
        self.client.log_image(self.id, image, f"{name}/iteration_{iteration:07d}.png")

    def close(self, figures: dict[str, float], finished: bool) -> None:
        """See `Tracker`."""
        for name, value in figures.items():
            self.client.log_metric(self.id, f"results/{spelt(name)}", value)
        self.client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


#: Key of a config's `trackers`, which is the package's name -> class, and the variable with the default name.
TRACKERS: dict[str, tuple[Callable[[str, str, Path, dict], Tracker], str]] = {
    "wandb": (Wandb, "WANDB_PROJECT"),
    "mlflow": (MLflow, "MLFLOW_EXPERIMENT_NAME"),
}


def asked(cfg: Config) -> dict[str, str]:
    """Trackers of a config -> name of the project or experiment, which is completed in place.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    found = {}
    for key, name in (cfg.get("trackers") or {}).items():
        if key not in TRACKERS:
            raise UserError(f"trackers.{key}: no such tracker: {nearest(key, TRACKERS)}")
        if name is None:
            continue
        if importlib.util.find_spec(key) is None:
            install = f".venv/bin/python -m pip install -c constraints.txt -e '.[{key}]'"
            install = install if IN_CHECKOUT else f"pip install 'semaim[{key}]'"
            raise UserError(f"--{key}: the package {key} is not installed: {install}")
        found[key] = name or os.environ.get(TRACKERS[key][1]) or "semaim"
    if found:
        cfg.trackers = found
    return found


class Sender:
    """One of a visualizer's writers: hands everything to a tracker in a thread, and warns once if that fails.

    So neither a slow nor a lost network changes a training.

    Args:
        tracker: where it goes.
        warn: called with one line.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]):
        self.tracker, self.warn, self.said = tracker, warn, False
        self.iteration = 0
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add_scalars(self, scalar_dict: Mapping, step: int = 0, file_path: str | None = None, **_) -> None:
        """Numbers; `step` is an iteration, or for validations by epoch an epoch, which is never larger.

        A validation's have names of their own, as both have a loss.
        """
        self.iteration = max(self.iteration, step)
        stage = "val/" if MessageHub.get_current_instance().get_info("loop_stage", None) == "val" else ""
        values = {f"{stage}{name}": float(it) for name, it in scalar_dict.items() if isinstance(it, numbers.Real)}
        self._put(self.tracker.scalars, values, self.iteration)

    def add_scalar(self, name: str, value: float, step: int = 0, **_) -> None:
        """One number."""
        self.add_scalars({name: value}, step)

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_) -> None:
        """A picture, uint8 (H, W, 3)."""
        self._put(self.tracker.picture, name, image, self.iteration)

    def add_config(self, config: Config, **_) -> None:
        """Nothing: the tracker has it."""

    def add_graph(self, model: Any, data_batch: Any, **_) -> None:
        """Nothing: no tracker shows it."""

    def close(self) -> None:
        """Nothing: results.json is written after the writers are closed, see `finish`."""

    def finish(self, figures: Mapping[str, float], finished: bool) -> None:
        """End the tracker's run, and wait for at most `PATIENCE`."""
        self._put(self.tracker.close, dict(figures), finished)
        self.waiting.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._warn(f"not all was sent within {PATIENCE:.0f} s")

    def _put(self, method: Callable, *arguments: Any) -> None:
        self.waiting.put((method, arguments))

    def _work(self) -> None:
        while (task := self.waiting.get()) is not None:
            method, arguments = task
            try:
                method(*arguments)
            except BaseException as error:  # of the network, the disk and the service: none is the run's concern
                self._warn(" ".join(str(error).split())[:160] or type(error).__name__)

    def _warn(self, reason: str) -> None:
        if not self.said:
            self.said = True
            self.warn(f"{self.tracker.title}: {reason}; the run goes on, and TensorBoard's files have everything")


@contextmanager
def tracked(runner: Any, cfg: Config, run: str, resumed: bool) -> Iterator[dict[str, float]]:
    """Track what a run logs, on the main process, with the trackers of its config.

    Args:
        runner: whose visualizer writes.
        cfg: of the run.
        run: its name, which a resumed run keeps.
        resumed: it has begun already: if a tracker does not start, there is a warning and no error.

    Yields:
        Takes the final figures, by name.

    Raises:
        UserError: a tracker does not start.
    """
    senders: dict[str, Sender] = {}
    for key, name in asked(cfg).items() if is_main_process() else ():
        try:
            tracker = TRACKERS[key][0](name, run, Path(cfg.work_dir), cfg.to_dict())
        except (Exception, SystemExit) as error:  # of the network, the login and the service
            reason = f"--{key}: cannot start: {' '.join(str(error).split())[:200] or type(error).__name__}"
            if not resumed:
                offline = "WANDB_MODE=offline" if key == "wandb" else "without MLFLOW_TRACKING_URI"
                raise UserError(f"{reason} ({offline} it needs no network)") from None
            runner.logger.warning(f"{reason}; the run goes on without it")
            continue
        runner.logger.info(f"{tracker.title}, {tracker.place}")
        senders[key] = Sender(tracker, runner.logger.warning)
    runner.visualizer._vis_backends.update(senders)
    figures: dict[str, float] = {}
    finished = False
    try:
        yield figures
        finished = True
    finally:
        for sender in senders.values():
            sender.finish(figures, finished)


def parameters(config: Mapping, above: str = "") -> dict[str, str]:
    """A config's settings by path, as MLflow's parameters: text of at most `LONGEST` characters."""
    found: dict[str, str] = {}
    for key, value in config.items():
        path = f"{above}{key}"
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= parameters(value, f"{path}.")
        else:
            found[spelt(path)[:250]] = str(value)[:LONGEST]
    return found


def spelt(name: str) -> str:
    """A name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
