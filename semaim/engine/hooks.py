"""What happens around training steps: the running average, the log line, the progress bar, pictures of orders."""

import atexit
import datetime
import logging
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook, LoggerHook, RuntimeInfoHook, iter_timer_hook
from mmengine.registry import HOOKS, LOG_PROCESSORS
from mmengine.runner import LogProcessor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from semaim.engine.sharding import gathered, is_sharded
from semaim.errors import Diverged
from semaim.models.targets import ema_decay

# mmengine's timer takes differences of the wall clock: images/s and ETA were wrong whenever it was set.
iter_timer_hook.time = SimpleNamespace(time=time.monotonic)


@HOOKS.register_module()
class DeferredRuntimeInfo(RuntimeInfoHook):
    """mmengine's, but losses and the gradient norm are read all at once, when a log line or a checkpoint needs them.

    Reading a number waits until the GPU has computed it and leaves the GPU without work. On a CPU there is no wait, so
    numbers are read in each iteration. The loss is the mean over all processes; if it is NaN or infinite, `Diverged` is
    raised, at the latest before anything is saved. Each process also tells the others whether it received a stop
    signal.

    Args:
        late: whether to read only at log lines; None to do so on a GPU.
    """

    def __init__(self, late: bool | None = None):
        self.late = torch.cuda.is_available() if late is None else late
        self.waiting: list[tuple[int, dict[str, torch.Tensor]]] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Keep the iteration's outputs; read them at once, or when a log line is due."""
        values = dict(outputs)
        if (norm := getattr(runner.optim_wrapper, "grad_norm", None)) is not None:
            values["grad_norm"], runner.optim_wrapper.grad_norm = norm, None
        self.waiting.append((runner.iter + 1, {name: value.detach() for name, value in values.items()}))
        every = min((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), default=1)
        due = self.every_n_inner_iters(batch_idx, every) or self.end_of_epoch(runner.train_dataloader, batch_idx)
        if due or not self.late:
            self.read(runner)

    def read(self, runner, alone: bool = False) -> None:
        """Write all pending numbers to the message hub; every process has to call it, unless `alone`."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        losses = torch.stack([values["loss"] for _, values in waiting])
        if get_world_size() > 1 and not alone:
            shared = torch.cat([losses, losses.new_tensor([runner.train_loop.stop_signal is not None])])
            try:
                torch.distributed.all_reduce(shared)
                losses, asked = shared[:-1] / get_world_size(), shared[-1]
                runner.train_loop.stopping |= bool(asked)
            except RuntimeError as error:  # a process has ended: the loop raises this when the iteration is done
                runner.train_loop.lost = error
        numbers = torch.stack([value.double() for _, values in waiting for value in values.values()]).tolist()
        for (iteration, values), loss in zip(waiting, losses.tolist(), strict=True):
            mine, numbers = numbers[: len(values)], numbers[len(values) :]
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} in iteration {iteration}: the run diverged")
            for name, number in {**dict(zip(values, mine, strict=True)), "loss": loss}.items():
                runner.message_hub.update_scalar(f"train/{name}", number)


def read_outputs(runner, alone: bool = False) -> None:
    """`DeferredRuntimeInfo.read` of a runner; raises `Diverged`, so that a run that has diverged is not saved."""
    for hook in runner.hooks:
        if isinstance(hook, DeferredRuntimeInfo):
            hook.read(runner, alone)


@HOOKS.register_module()
class UpdateEma(Hook):
    """Updates the guide's running average after every optimizer step, with the decay of the epoch."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Update if the optimizer has just stepped."""
        network = getattr(runner.model, "module", runner.model).network
        accumulation = runner.train_dataloader.batch_sampler.accumulation
        if hasattr(network, "ema") and (runner.iter + 1) % accumulation == 0:
            network.update_ema(ema_decay(runner.epoch))


@LOG_PROCESSORS.register_module()
class TrainLog(LogProcessor):
    """One line: progress, loss, learning rate, gradient norm, images/s, share of time waiting for data, ETA.

    Args:
        window_size: iterations whose mean loss and time a line shows.
        by_epoch: whether lines and scalars count in epochs.
    """

    mean_pattern: re.Pattern[str]  #: mmengine's: the values whose mean a line shows

    def get_log_after_iter(self, runner, batch_idx: int, mode: str) -> tuple[dict, str]:
        """Scalars for the writers and the line for the terminal."""
        if mode != "train":
            return super().get_log_after_iter(runner, batch_idx, mode)
        tag, _ = super().get_log_after_iter(runner, batch_idx, mode)
        batches = runner.train_dataloader.batch_sampler
        tag["images_per_second"] = batches.images * get_world_size() / tag["time"]
        tag["data_share"] = tag["data_time"] / tag["time"]
        # Peak in MB: of GPU allocations, which mmengine logs, or of the process.
        tag.setdefault("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        eta = datetime.timedelta(seconds=int(runner.message_hub.get_info("eta")))
        if self.by_epoch:
            epochs, steps = runner.max_epochs, len(batches)
            place = f"epoch {runner.epoch + 1:{len(str(epochs))}}/{epochs} [{batch_idx + 1:{len(str(steps))}}/{steps}]"
        else:
            place = f"iteration {runner.iter + 1:{len(str(runner.max_iters))}}/{runner.max_iters}"
        parts = [f"{name} {value:.3f}" for name, value in tag.items() if name.startswith(("loss_", "decode."))]
        line = (
            place
            + f"  loss {tag['loss']:.4f}  lr {tag['lr']:.3e}"
            + (f" ({', '.join(parts)})" if parts else "")
            + (f"  grad {tag['grad_norm']:.3f}" if "grad_norm" in tag else "")
            + f"  {tag['images_per_second']:.1f} images/s  data {100 * tag['data_share']:.0f}%"
            + f"  memory {tag['memory']} MB"
            + f"  ETA {eta}"
        )
        return tag, line

    def get_log_after_epoch(self, runner, batch_idx: int, mode: str, with_non_scalar: bool = False) -> tuple[dict, str]:
        """As mmengine's, but with the validation's own loss: mmengine gives the mean over the last `window_size`."""
        smoothed, self.mean_pattern = self.mean_pattern, re.compile("time")
        try:
            return super().get_log_after_epoch(runner, batch_idx, mode, with_non_scalar)
        finally:
            self.mean_pattern = smoothed


@HOOKS.register_module()
class ProgressBar(Hook):
    """A progress bar under the log lines, if the terminal is interactive: loss, images/s and ETA beside it.

    They are what the last log line was computed from, or newer: the bar reads no number from the GPU itself.
    """

    def before_train(self, runner) -> None:
        """Show the bar, and pass the log lines through it so that they scroll above."""
        self.progress = None
        terminal = (
            sys.stdout and sys.stdout.isatty() and "JPY_PARENT_PID" not in os.environ
        )  # a notebook keeps all lines
        if not (is_main_process() and terminal):
            return
        self.progress = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.progress.start()
        atexit.register(self.progress.stop)  # after a failed run the terminal must have its cursor back
        self.streams = [h for h in runner.logger.handlers if type(h) is logging.StreamHandler]
        for handler in self.streams:
            handler.setStream(sys.stdout)  # now rich's own
        self.task = self.progress.add_task("training", total=runner.max_iters, completed=runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Advance the bar."""
        if self.progress:
            hub, window = runner.message_hub, runner.log_processor.window_size
            seconds = hub.get_scalar("train/time").mean(window)
            rate = runner.train_dataloader.batch_sampler.images * get_world_size() / seconds
            parts = [f"{rate:.1f} images/s", f"ETA {datetime.timedelta(seconds=int(hub.get_info('eta')))}"]
            if loss := hub.log_scalars.get("train/loss"):
                parts.insert(0, f"loss {loss.current():.4f}")
            self.progress.update(self.task, completed=runner.iter + 1, description="  ".join(parts))

    def after_train(self, runner) -> None:
        """Remove the bar."""
        if self.progress:
            self.progress.stop()
            for handler in self.streams:
                handler.setStream(sys.stdout)


@HOOKS.register_module()
class OrderPictures(Hook):
    """Pictures of a few images, drawn as the method specifies: their orders or their reconstructions.

    Written to `orders/epoch_NNNN.png` (or `reconstructions/`) in the work folder, and to TensorBoard: before the first
    epoch, every `interval` epochs, and after the last.

    Args:
        interval: epochs between two pictures; 0 for none.
        images: number of images in a picture.
    """

    priority = "LOW"

    def __init__(self, interval: int = 20, images: int = 8):
        self.interval, self.images = interval, images

    def before_train(self, runner) -> None:
        """The picture before training."""
        if self.interval and runner.iter == 0:
            self.draw(runner, 0)

    def after_train_epoch(self, runner) -> None:
        """The picture after every `interval` epochs and after the last."""
        done = runner.epoch + 1
        if self.interval and (done % self.interval == 0 or done == runner.max_epochs):
            self.draw(runner, done)

    def draw(self, runner, epoch: int) -> None:
        """Draw and write one picture, on the main process."""
        model = getattr(runner.model, "module", runner.model)
        state = gathered(model.network.state_dict()) if is_sharded(model) else None
        if not is_main_process():
            return
        from semaim.drawing.encoder import DRAWN  # matplotlib takes a second to import
        from semaim.engine.pretraining import model_from_checkpoint

        if state:
            model = model_from_checkpoint({"config": runner.cfg.to_dict(), "model": state})
        images = runner.train_dataloader.dataset.preview(self.images)
        kind = model.method.picture
        picture = DRAWN[kind](model, images, title=f"epoch {epoch}")
        folder = Path(runner.work_dir) / f"{kind}s"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"epoch_{epoch:04d}.png")
        runner.visualizer.add_image(f"{kind}s", np.asarray(picture), step=epoch)
