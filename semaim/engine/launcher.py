"""One process per GPU or, without GPUs, CPU processes: how many, how they start, how they join."""

import ctypes
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from semaim.errors import UserError
from semaim.reading import read_once

SPAWNED = "SEMAIM_SPAWNED"  #: environment variable of the processes that `spawn` starts
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


def join() -> int:
    """Join the other processes, if launched as one of several; returns the number of processes."""
    if not launched():
        return 1
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # mmengine's runner would do it later, but its start-up needs CUDA.
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=1)
        )
    return torch.distributed.get_world_size()


def leave() -> None:
    """Close the process group when all processes have arrived here.

    A process that exits early may lose what another has yet to receive; one that exits with its group open may abort in
    gloo's threads (two small processes did so in 26 of 60 tries). So each process reports in the store, which blocks
    none, that it is done.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    if store.add("semaim/through", 1) == torch.distributed.get_world_size():
        store.set("semaim/all_through", "")
    store.wait(["semaim/all_through"])
    torch.distributed.destroy_process_group()


def command(prepare: Callable[[int], Any], work: Callable[[Any], object], gpus: int | str) -> int:
    """`run_command`, where each file is read only once until the work begins."""
    with read_once():
        return run_command(prepare, work, gpus)


def run_command(prepare: Callable[[int], Any], work: Callable[[Any], object], gpus: int | str) -> int:
    """Run a tool's work in the given number of processes; returns the exit status.

    Args:
        prepare: called once, with the number of processes, before any is started: raises `UserError` early.
        work: what every process does; its argument is the result of `prepare`, or None if another process called it.
        gpus: GPUs of this machine ("all" for all), or CPU processes if it has none.
    """
    prepared = None
    if not launched():
        processes = check_processes(gpus)
        nodes = int(os.environ.get("NNODES", 1))
        prepared = prepare(processes * nodes)
        if processes > 1 or nodes > 1:
            return spawn(restart_command(), processes)
    if SPAWNED in os.environ:
        end_with_parent()
    world = join()
    try:
        work(prepared)
        if world > 1:
            leave()
        return 0
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: lower --cfg-options images_per_gpu=N (accumulated steps keep the total batch), or set"
            " model.network.with_cp=True (detectors and segmentors: model.backbone.with_cp=True)"
        ) from None
    except KeyboardInterrupt:
        if world == 1:
            raise
        return 130  # the parent process reports it
    except RuntimeError as error:
        if world > 1 and ("gloo" in str(error) or isinstance(error, torch.distributed.DistBackendError)):
            time.sleep(60)  # another process failed and reported why; the launcher ends this one with its status
            return 1
        raise
    finally:
        # After an error no process waits for the others; NCCL, whose work may hang, is left to its watchdog.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()


def restart_command() -> list[str]:
    """The arguments that Python was started with, to start it again, also for `python -m semaim.cli`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", "semaim.cli"] if spec and spec.name == "semaim.cli.__main__" else sys.argv[:1]
    return [*start, *sys.argv[1:]]


def spawn(arguments: list[str], processes: int) -> int:
    """Run this command in `processes` processes; NNODES, NODE_RANK, MASTER_ADDR, PORT for several nodes as in mmdet."""
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
    # SIGTERM itself ends the remaining processes after one has failed.
    config.signals_to_handle, config.shutdown_timeout = "SIGINT,SIGHUP", 120  # s; older torch ignores these
    os.environ[SPAWNED] = "1"
    handler = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))  # one ended by a signal: below 0
    finally:
        del os.environ[SPAWNED]
        signal.signal(signal.SIGTERM, handler)
    return 0
