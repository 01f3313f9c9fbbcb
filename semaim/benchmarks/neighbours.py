"""Time and memory of k-NN at the size of ImageNet, on random features.

    python -m semaim.benchmarks.neighbours [--bank 1281167] [--queries 50000] [--width 768] [--memory-gb 0.5]

The features lie in files, as those of a run do. Anonymous memory is what the process itself needs; the pages of the
files that are in memory too can be taken away at any time.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from semaim.benchmarks.measuring import process_memory
from semaim.engine.evaluation import Frozen
from semaim.errors import run
from semaim.tasks.knn import NearestNeighbours

CLASSES = 1000
ROWS = 65536  #: written to the files at a time


class Cost(NamedTuple):
    """Seconds of wall-clock time and of all cores, and peak bytes of anonymous memory beyond those at the start."""

    seconds: float
    cpu_seconds: float
    peak: float


def random_features(path: Path, rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """fp16 (rows, width) in a file, opened as a read-only memory map, and labels."""
    random = np.random.default_rng(seed)
    written = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, ROWS):
        written[start : start + ROWS] = random.standard_normal((min(ROWS, rows - start), width), dtype=np.float32)
    written.flush()
    return np.load(path, mmap_mode="r"), random.integers(0, CLASSES, rows)


def cost(work: Callable[[], object]) -> Cost:
    """What `work` costs; its memory is looked at every 5 ms."""
    before, ended = process_memory("RssAnon"), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, process_memory("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    begun, cpu = time.monotonic(), time.process_time()
    try:
        work()
    finally:
        ended.set()
        watching.join()
    return Cost(time.monotonic() - begun, time.process_time() - cpu, peak - before)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=1_281_167, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--queries", type=int, default=50_000, metavar="N", help="validation images (%(default)s)")
    parser.add_argument("--width", type=int, default=768, metavar="N", help="channels (%(default)s)")
    parser.add_argument("--memory-gb", type=float, default=0.5, metavar="GB", help="as in the config (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="of the files, removed at the end (default: a temporary one)")
    args = parser.parse_args(argv)
    evaluation = NearestNeighbours(memory_gb=args.memory_gb)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bank = random_features(Path(folder) / "bank.npy", args.bank, args.width, 0)
        queries = random_features(Path(folder) / "queries.npy", args.queries, args.width, 1)
        data = Frozen(bank, queries, CLASSES, torch.device("cpu"), print)
        found = cost(lambda: evaluation.run(data))
    products = 2 * args.bank * args.queries * args.width / found.seconds / 1e9
    print(f"{args.queries:,} queries among {args.bank:,}, {args.width} channels, {evaluation.chunk:,} rows at a time:")
    print(
        f"{found.seconds:,.0f} s ({found.cpu_seconds:,.0f} s of {torch.get_num_threads()} threads,"
        f" {products:,.0f} GFLOP/s), {found.peak / 1e9:.2f} GB of anonymous memory"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
