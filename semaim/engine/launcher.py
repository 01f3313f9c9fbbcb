"""One process per GPU or, without GPUs, CPU processes: how many, how they start, how they join."""

import ctypes
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from semaim.engine import watching
from semaim.errors import Stopped, UserError
from semaim.reading import forget, read_once

SPAWNED = "SEMAIM_SPAWNED"  #: environment variable of the processes that `spawn` starts: its own number
LOST = "the connection to another process is lost: it, or its machine, has ended"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(number: int = signal.SIGTERM) -> bool:
    """Have a signal sent to this process when its parent ends for any reason; False if this is not Linux."""
    return _LIBC is not None and _LIBC.prctl(_PR_SET_PDEATHSIG, int(number)) == 0


def check_processes(processes: int | str) -> int:
    """Number of processes to start here: as given, or for "all" one per visible GPU, or one on a CPU."""
    gpus = torch.cuda.device_count()
    if processes == "all":
        return gpus or 1
    if not str(processes).isdigit():
        raise UserError(f"{processes!r} GPUs requested: give a number, or all")
    processes = int(processes)
    if processes < 1:
        raise UserError(f"{processes} GPUs requested: give 1 or more")
    if gpus and processes > gpus:
        raise UserError(f"{processes} GPUs requested, {gpus} visible: give at most {gpus}")
    cores = os.cpu_count() or 1
    if not gpus and processes > cores:
        raise UserError(f"{processes} processes requested; this machine has no GPU and {cores} CPU cores: give fewer")
    return processes


def launched() -> bool:
    """Whether torchrun, `spawn` or a cluster's scheduler started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout: float = watching.TIMEOUT) -> int:
    """Join the other processes, if launched as one of several; returns the number of processes.

    Args:
        timeout: s that a process may be waited for, see `semaim.engine.watching.Watch`.
    """
    if not launched():
        return 1
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The watch ends the run first, with a better message.
        limit = datetime.timedelta(seconds=timeout + min(30, timeout))
        # mmengine's runner would do it later, but its start-up needs CUDA.
        try:
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=limit)
        except torch.distributed.DistError as error:
            raise UserError(cannot_meet(error)) from None
        watching.watch(timeout)
    return torch.distributed.get_world_size()


def cannot_meet(error: Exception) -> str:
    """Why processes did not find one another, in a line."""
    where = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT') or os.environ.get('PORT')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"{where} is in use, by another run or program: set PORT (with torchrun or Slurm, MASTER_PORT) to another"
        )
    return f"the processes do not meet at {where}: {' '.join(str(error).split())[:200]}"


def leave() -> None:
    """Close the process group when all processes have arrived here.

    A process that exits early may lose what another has yet to receive; one that exits with its group open may abort in
    gloo's threads (two small processes did so in 26 of 60 tries). So each process reports in the store, which blocks
    none, that it is done.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    if store.add("semaim/through", 1) == torch.distributed.get_world_size():
        store.set("semaim/all_through", "")
    watching.progress("the end")
    # How long, the watch decides: one process may still measure alone.
    while not hasattr(store, "clone") and not store.check(["semaim/all_through"]):
        time.sleep(0.05)  # before torch 2.8 the watch reports through the same connection, which `wait` would block
    store.wait(["semaim/all_through"], datetime.timedelta(days=30))
    watching.unwatch()
    torch.distributed.destroy_process_group()


def command(
    prepare: Callable[[int], Any],
    work: Callable[[Any], object],
    gpus: int | str,
    timeout: float = watching.TIMEOUT,
    saves_in: str | None = None,
) -> int:
    """`run_command`, where each file is read only once until the work begins."""
    with read_once():
        return run_command(prepare, work, gpus, timeout, saves_in)


def run_command(
    prepare: Callable[[int], Any], work: Callable[[Any], object], gpus: int | str, timeout: float, saves_in: str | None
) -> int:
    """Run a tool's work in the given number of processes; returns the exit status.

    Args:
        prepare: called once, with the number of processes, before any is started: raises `UserError` early.
        work: what every process does; its argument is the result of `prepare`, or None if another process called it.
        gpus: GPUs of this machine ("all" for all), or CPU processes if it has none.
        timeout: s that a process may be waited for.
        saves_in: folder of the run's checkpoints; None if it has none.
    """
    if not timeout > 0:
        raise UserError(f"--timeout {timeout:g}: give a number of seconds above 0")
    prepared = None
    if not launched():
        processes = check_processes(gpus)
        nodes = int(os.environ.get("NNODES", 1))
        prepared = prepare(processes * nodes)
        if processes > 1 or nodes > 1:
            forget()  # this process only waits
            return spawn(restart_command(), processes, saves_in)
    if SPAWNED in os.environ:
        end_with_parent()
        if os.getppid() != int(os.environ[SPAWNED]):
            return 1  # it ended before that, while this process was starting
    world = join(timeout)
    try:
        try:
            work(prepared)
        except (RuntimeError, OSError, EOFError) as error:
            if found := watching.explained(error):
                raise found from None
            raise
        if world > 1:
            leave()
        return 0
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: lower --cfg-options images_per_gpu=N (accumulated steps keep the total batch), or set"
            " model.network.with_cp=True (detectors and segmentors: model.backbone.with_cp=True)"
        ) from None
    except KeyboardInterrupt as error:
        if world == 1:
            raise
        return getattr(error, "status", 130)  # the parent process reports it
    except RuntimeError as error:
        if world > 1 and ("gloo" in str(error) or isinstance(error, torch.distributed.DistBackendError)):
            late = "timed out" in str(error).lower()
            if late or SPAWNED not in os.environ:
                reason = "another process has not answered within --timeout" if late else LOST
                print(f"rank {os.environ['RANK']}: {reason}; {continues(saves_in)}", file=sys.stderr, flush=True)
            if late:
                return watching.TIMED_OUT
            time.sleep(60)  # another process failed and reported why; the launcher ends this one with its status
            return 1
        raise
    finally:
        watching.unwatch()
        # After an error no process waits for the others; NCCL, whose work may hang, is left to its watchdog.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()


def continues(saves_in: str | None) -> str:
    """From where a run that has ended continues."""
    if saves_in is None:
        return "the same command starts it again"
    newest = (Path(saves_in) / "latest.pth").resolve()
    return f"the run continues from {newest} with --resume" if newest.exists() else f"nothing is saved in {saves_in}"


def restart_command() -> list[str]:
    """The arguments that Python was started with, to start it again, also for `python -m semaim.cli`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", "semaim.cli"] if spec and spec.name == "semaim.cli.__main__" else sys.argv[:1]
    return [*start, *sys.argv[1:]]


def spawn(arguments: list[str], processes: int, saves_in: str | None = None) -> int:
    """Run this command in `processes` processes; NNODES, NODE_RANK, MASTER_ADDR, PORT for several nodes as in mmdet.

    Args:
        arguments: of Python.
        processes: on this machine.
        saves_in: as for `run_command`.
    """
    nodes = int(os.environ.get("NNODES", 1))
    endpoint = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('PORT', 29500 if nodes > 1 else 0)}"
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="semaim",
        rdzv_backend="static" if nodes > 1 else "c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": int(os.environ.get("NODE_RANK", 0)), "timeout": 900},
        max_restarts=0,
    )
    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the failing process has reported why
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    # Only this process receives Ctrl-C, and passes it on so that the others save. SIGTERM is passed on as Ctrl-C, too:
    # SIGTERM itself ends the remaining processes after one has failed. With nohup, SIGHUP stays ignored.
    passed_on = ["SIGINT", "SIGUSR1"] + ["SIGHUP"] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    config.signals_to_handle, config.shutdown_timeout = ",".join(passed_on), 120  # s; older torch ignores these
    os.environ[SPAWNED] = str(os.getpid())
    terminated: list[int] = []

    def on_sigterm(number: int, frame: object) -> None:
        terminated.append(number)
        signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        raise Stopped(signal.SIGTERM if terminated else error.sigval) from None
    except ChildFailedError as error:
        return failed(error, saves_in)
    except torch.distributed.DistError as error:
        raise UserError(cannot_meet(error)) from None
    finally:
        del os.environ[SPAWNED]
        signal.signal(signal.SIGTERM, handler)
    return 0


def failed(error: ChildFailedError, saves_in: str | None) -> int:
    """Report the processes that a signal has ended; returns the exit status of all.

    Those that had to end because another had failed are among the failures: by SIGTERM, or with exit status 1.
    """
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    known = [code for code in codes.values() if code > 1]
    if known:
        if known[0] - 128 in watching.STOPS:
            raise Stopped(known[0] - 128)
        if known[0] >= watching.TIMED_OUT:
            print(continues(saves_in), file=sys.stderr)
        return known[0]  # the process has said why
    for rank, code in codes.items():
        if code < 0:
            died = watching.ended_by(f"rank {rank} (process {error.failures[rank].pid})", -code)
            print(f"error: {died}; {continues(saves_in)}", file=sys.stderr)
            return died.status
    return 1
