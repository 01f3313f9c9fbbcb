"""How a training stops: on a signal or after a failure its state is saved first, if it is whole."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from semaim.checkpoints.files import CannotSave
from semaim.data.seeding import seed_of
from semaim.engine.launcher import SPAWNED
from semaim.engine.saving import SaveCheckpoints
from semaim.engine.sharding import is_sharded
from semaim.engine.watching import STOPS, explained, progress
from semaim.errors import Diverged, Stopped, UserError


class Resumable(BaseLoop):
    """Base of the loops: they start at any iteration, seed from (seed, iteration, rank) alone, and save when stopped.

    Attributes:
        stop_signal: number of the signal that asked this process to stop.
        stopping: whether this iteration is the last; all processes have to agree, see `DeferredRuntimeInfo`.
        lost: error of the collective that failed in this iteration, see `DeferredRuntimeInfo`.
        whole: whether weights and optimizer are those after `_iter` iterations.
        saved: whether the state has been saved in a validation after a signal.
    """

    stop_signal: int | None = None
    stopping = False
    lost: RuntimeError | None = None
    whole, saved = True, False

    def seek(self, epoch: int, iteration: int) -> None:
        """Start after `epoch` whole epochs and `iteration` iterations in all."""
        self._epoch, self._iter = epoch, iteration

    def run(self) -> torch.nn.Module:
        """Train; save before ending by a signal, bad data, a lost worker or, on gloo, a lost process."""
        self.stop_signal, self.stopping, self.lost = None, False, None
        self.whole, self.saved = True, False
        several = get_world_size() > 1
        # With nohup, SIGHUP stays ignored.
        numbers = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        leaving = False
        try:
            return self.work()
        except CannotSave:
            self.is_first()  # so that no other process saves what this one could not
            raise
        except Diverged as error:
            self.is_first()
            raise self.advised(error) from None
        except Stopped as error:  # all processes have agreed
            self.stop_signal = error.status - 128
            leaving = several
            try:
                self.save()
            except Diverged as diverged:
                raise self.advised(diverged) from None
            if several:
                torch.distributed.barrier()  # if one exited, the launcher would end the one that saves
            raise
        except UserError:
            self.save_failed()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            found = explained(error)
            if found or several and "gloo" in str(error):
                self.save_failed()
            if found:
                raise found from None
            if self.stop_signal == signal.SIGTERM and SPAWNED in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)  # the launcher has sent it after another process had failed
            raise
        finally:
            # After the first has left, a scheduler may end the others, whose status must not change by that. At its end
            # Python restores defaults, but not of what is ignored.
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_IGN if leaving else handler)

    def saver(self) -> SaveCheckpoints | None:
        """The hook that saves the run's checkpoints."""
        return next((hook for hook in self.runner.hooks if isinstance(hook, SaveCheckpoints)), None)

    def advised(self, error: Diverged) -> Diverged:
        """The error, with where to continue from."""
        saver = self.saver()
        return Diverged(f"{error}; {saver.advice(self.runner)}") if saver else error

    def save(self, alone: bool = False) -> None:
        """Save the state after the last optimizer step as interrupted.pth; `alone` as for `SaveCheckpoints.save`."""
        saver = self.saver()
        steps, rest = divmod(self._iter, self.dataloader.batch_sampler.accumulation)
        if saver and steps:
            saver.save(self.runner, self.epoch, self._iter - rest, "interrupted.pth", alone)

    def save_failed(self) -> None:
        """Save after an error; of several processes only one, without the others, which cannot be reached.

        Each has the same weights, unless they are sharded. A collective that fails in the backward pass does so before
        the optimizer's step, but running statistics have then taken in the batch, so with these nothing is saved. After
        the step, `whole` is false until the iteration is done. On NCCL the other processes hang, and only the one with
        the error comes here.
        """
        if not self.whole:
            return
        if get_world_size() == 1:
            self.save()
            return
        if is_sharded(self.runner.model) or has_running_statistics(self.runner.model):
            return
        if self.is_first():
            self.save(alone=True)

    def is_first(self) -> bool:
        """Whether this is the first of several processes that asks, after an error."""
        if get_world_size() == 1:
            return True
        try:
            return torch.distributed.distributed_c10d._get_default_store().add("semaim/saves", 1) == 1
        except RuntimeError:  # rank 0, which had the store, has ended
            return get_rank() == 1

    def _on_signal(self, number: int, frame) -> None:
        """Stop where weights and counters agree: after an iteration or in a validation; at a second Ctrl-C, at once."""
        alone = get_world_size() == 1
        if self.stop_signal:
            if number == signal.SIGINT == self.stop_signal:
                raise KeyboardInterrupt  # without saving: this may be in the optimizer's step
            return  # a scheduler repeats itself
        self.stop_signal, self.stopping = number, alone
        if alone and self.runner.message_hub.get_info("loop_stage") == "val":
            raise Stopped(number)
        if is_main_process() and not (SPAWNED in os.environ and number == signal.SIGTERM):
            when = "this iteration" if self.stopping else "the next iteration in which losses are read"
            with suppress(OSError):
                # The logger may hold its lock.
                os.write(2, f"{signal.Signals(number).name}: stopping after {when}\n".encode())

    def share_buffers(self) -> None:
        """Give all processes the same running statistics of batch normalisation, to validate and continue with."""
        if get_world_size() > 1:
            for buffer in self.runner.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def batches(self) -> Iterator:
        """The loader's batches."""
        found = iter(self.dataloader)
        # Torch's handler raises at once when a worker has ended, perhaps in the optimizer's step. Without it, that is
        # an error where the next batch is needed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return found

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One forward and backward pass, and the optimizer's step if it is due."""
        runner = self.runner
        progress(f"iteration {self._iter + 1}", 2 * self._iter + 1)
        seed = seed_of(runner.seed, self._iter, get_rank())
        torch.manual_seed(seed)  # drop path, sampled boxes
        np.random.seed(seed % 2**32)  # mixup and cutmix
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        self.whole = False
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter, self.whole = self._iter + 1, True
        progress(f"loading the batch of iteration {self._iter + 1}", 2 * self._iter)
        if self.lost:
            raise self.lost
        if self.stopping:
            raise Stopped(self.stop_signal or signal.SIGTERM)


def has_running_statistics(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model: batch normalisation with running statistics."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    return any(norm.track_running_stats for norm in norms)


@HOOKS.register_module()
class Validating(Hook):
    """Reports the batches of validations and tests as progress, and saves in a long validation if a signal has come."""

    def before_val_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """A batch has been loaded. One of several processes cannot leave alone, and a scheduler may not wait."""
        progress(f"validation batch {batch_idx + 1}")
        loop = runner.train_loop
        if loop.stop_signal and is_main_process() and not is_sharded(runner.model) and not loop.saved:
            loop.saved = True
            loop.save(alone=True)

    def before_test_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """A batch has been loaded."""
        progress(f"test batch {batch_idx + 1}")

    def after_val_epoch(self, runner, metrics=None) -> None:
        """All has been measured."""
        progress("what follows a validation")
