"""Memory, open files, threads and shared memory of a long run stay flat, in the main process and in its workers."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from attempts import STEP, Attempt, alive, tool_line
from commands import flags
from counts import record
from scipy.stats import linregress, t

from semaim.data.scenes import write_scenes

STEPS, EVERY, WARM = 1000, 50, 200
#: By how much a process may grow in 1,000 steps. One batch is 8 x 3 x 32 x 32 floats = 96 KiB: one that is kept every
#: 25 steps would be 3.75 MiB. What does grow is the log's history, at most 10 numbers of 16 bytes a step: 0.15 MiB. A
#: file, a thread or a process that is kept once an epoch would be 200; files in flight between workers come and go.
ALLOWED = {"memory": 3.75 * 2**20, "shared": 10 * 96 * 2**10, "files": 4, "threads": 0, "processes": 0}


def of_process(number: int) -> dict[str, int]:
    """Bytes of resident memory and of mapped shared memory, open files and threads of a process."""
    place = Path(f"/proc/{number}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    shared = 0
    for line in (place / "maps").read_text().splitlines():
        if "/dev/shm/" in line or "/memfd:" in line:
            first, last = line.split(" ", 1)[0].split("-")
            shared += int(last, 16) - int(first, 16)
    anonymous = int(status["RssAnon"].split()[0]) * 1024
    return {"memory": anonymous, "shared": shared, "files": len(list((place / "fd").iterdir())),
            "threads": int(status["Threads"])}  # fmt: skip


def sample(attempt: Attempt) -> dict[str, dict[str, int]]:
    """The main process, and the sum of all others."""
    found: dict[str, dict[str, int]] = {}
    for number in alive(attempt.mark):
        with suppress(OSError):  # it has just ended
            name = "main" if number == attempt.process.pid else "workers"
            values = of_process(number)
            before = found.setdefault(name, dict.fromkeys(values, 0) | {"processes": 0})
            found[name] = {key: before[key] + value for key, value in values.items()}
            found[name]["processes"] = before["processes"] + 1
    return found


def flat(rows: list[tuple[float, dict]], unit: float) -> tuple[dict[str, dict], list[str]]:
    """First, last and largest values and their slope with its 95 % interval, and in words what is not flat.

    Memory counts by its slope; all else, which goes up and down with what workers hand over, by the interval's low end.

    Args:
        rows: (when, `sample`), after the warm-up.
        unit: over how much of `when` the slope is, in which `ALLOWED` may be added.
    """
    found: dict[str, dict] = {}
    problems = []
    for name in sorted({name for _, row in rows for name in row}):
        for key, allowed in ALLOWED.items():
            when, values = zip(*((when, row[name][key]) for when, row in rows if name in row), strict=True)
            line = linregress(when, values)
            half = float(np.nan_to_num(t.ppf(0.975, len(when) - 2) * line.stderr))
            slope, low, high = (round(float(unit * (line.slope + side * half)), 2) for side in (0, -1, 1))
            found[f"{key} of {name}"] = {"first": values[0], "last": values[-1], "largest": max(values),
                                         "samples": len(values), "slope": slope, "slope_95": [low, high]}  # fmt: skip
            if (slope if key == "memory" else low) > allowed:
                problems.append(f"{key} of {name} grows by {slope} ({low} to {high}), allowed is {allowed}")
    return found, problems


@pytest.mark.faults
def test_a_thousand_steps_leave_memory_files_and_threads_as_they_were(scenes, tmp_path):
    options = {
        "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
        "model.network.depth": 2, "total_batch_size": 8, "num_workers": 2, "train_cfg.max_epochs": STEPS // 5,
        "default_hooks.logger.interval": 1, "default_hooks.checkpoint.interval": 20,
        "default_hooks.pictures.interval": 0,  # matplotlib takes and gives back tens of MiB for one
    }  # fmt: skip
    places = ["--data-root", scenes, "--work-dir", tmp_path / "run"]
    line = tool_line("train.py", "semaim/configs/pretrain/semaim_vit_tiny_scenes.py", *places, *flags(options))
    begun, attempt, rows = time.monotonic(), Attempt(line, tmp_path / "run", tmp_path / "tmp"), []
    for step in range(WARM, STEPS, EVERY):
        if attempt.until(lambda it, step=step: it.count(STEP) >= step, 0):
            rows.append((step, sample(attempt)))
    assert attempt.wait() == 0, attempt.tail(40)
    assert len(rows) == (STEPS - WARM) // EVERY and attempt.count(STEP) == STEPS
    found, problems = flat(rows, unit=1000)
    seconds = round(time.monotonic() - begun)
    record("leaks_training", steps=STEPS, warm_up=WARM, found=found, problems=problems, seconds=seconds)
    assert {"memory of main", "memory of workers"} <= found.keys() and not problems, problems


@pytest.mark.faults
def test_features_of_5000_images_leave_memory_as_it_was(pretrained, tmp_path):
    """k-NN, sampled over the 4,000 training images: what grows are the features, 32 floats of each image."""
    write_scenes(tmp_path / "many", 5000, 32, seed=1)
    options = {
        "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
        "model.network.depth": 2, "num_workers": 2, "images_per_gpu": 5,
    }  # fmt: skip
    places = ["--data-root", tmp_path / "many/classes", "--work-dir", tmp_path / "run"]
    line = tool_line("test.py", "semaim/configs/knn/vit_tiny_scenes.py", pretrained, *places, *flags(options))
    begun, attempt, rows = time.monotonic(), Attempt(line, tmp_path / "run", tmp_path / "tmp"), []
    while attempt.process.poll() is None:
        values = sample(attempt)
        both = values.get("workers", {}).get("processes") == 2 and "main" in values
        if rows and not both:
            break  # the end of the training images; the validation images have workers of their own
        if both:
            rows.append((time.monotonic() - begun, values))
        time.sleep(0.05)
    assert attempt.wait() == 0, attempt.tail(40)
    rows = rows[len(rows) // 4 :]
    took = rows[-1][0] - rows[0][0]
    found, problems = flat(rows, unit=took)
    record("leaks_features", images=4000, found=found, problems=problems, seconds=round(time.monotonic() - begun))
    assert len(rows) >= 10 and not problems, problems


def test_a_kept_batch_and_a_kept_file_are_noticed():
    """One batch every ten steps, a file every fifty; the noise of files in flight alone is none."""
    busy = [0, 4, 1, 3, 2, 4, 0, 3, 1, 2, 4, 0, 2, 3, 1, 4]

    def rows(kept):
        for step, files in zip(range(WARM, STEPS, EVERY), busy, strict=True):
            memory, more = kept * step / 10 * 96 * 2**10, kept * step / 50
            values = {"memory": 5e8 + memory, "shared": 0, "files": 14 + files + more, "threads": 4, "processes": 1}
            yield step, {"main": values}

    assert flat(list(rows(0)), 1000)[1] == []
    (memory, files) = flat(list(rows(1)), 1000)[1]
    assert memory.startswith("memory of main grows by 9830400.0") and files.startswith("files of main grows by ")
