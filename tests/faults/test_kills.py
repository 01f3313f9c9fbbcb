"""kill -9 at random places of every stage, started again as a user would: results are the uninterrupted run's.

Each case runs once without a kill. Then lives follow: a run that is killed some times, started again with --resume each
time, and at last left to end. Seeds are kept, so a life that fails can be repeated: SEMAIM_KILLS=LIFE.
"""

import csv
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from attempts import (
    SAVED,
    Attempt,
    chosen,
    finishing,
    measured,
    partials,
    rotating,
    saving,
    starting,
    stepping,
    stored,
    tally,
    tool_line,
    validating,
    whole_run,
)  # fmt: skip
from commands import flags
from counts import record

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint

SEED = 20260
#: What of results.json depends on the time and not on the run; somebody may commit while the attacks run.
OF_THE_TIME = ("date", "commit")
TINY = {"model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
        "model.network.depth": 2, "model.network.drop_path_rate": 0.3, "total_batch_size": 8}  # fmt: skip
DENSE = {"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "total_batch_size": 4,
         "train_cfg.max_iters": 20,
         "train_cfg.val_interval": 5, "default_hooks.checkpoint.interval": 2}  # fmt: skip
LOGS = {"num_workers": 0, "default_hooks.logger.interval": 1, "log_processor.window_size": 1}

TRAINING = {starting: 2, stepping: 3, saving: 4, rotating: 3}
MEASURED = {**TRAINING, validating: 3, finishing: 2, measured: 2}
LATE = (finishing, measured)  #: after these there is nothing left to kill, so they are for the last kill of a life


@dataclass(frozen=True)
class Case:
    """A stage at its smallest.

    Args:
        config, data, options, more: of its command line; data is a folder of the scenes.
        kills: how many in all. lives: over how many runs.
        spots: where they fall, with weights.
        victims: who is killed, with weights.
    """

    config: str
    data: str
    options: dict
    kills: int
    lives: int
    more: tuple[str, ...] = ()
    spots: dict[Callable, int] = field(default_factory=lambda: MEASURED)
    victims: dict[str, int] = field(default_factory=lambda: {"tool": 1})

    def line(self, scenes: Path, work: Path, *more: str) -> list[str]:
        """The command line."""
        places = ["--data-root", scenes / self.data, "--work-dir", work]
        return tool_line("train.py", self.config, *places, *self.more, *more, *flags(self.options))


PRETRAIN = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
EPOCHS = {**TINY, **LOGS, "base_lr": 0.032, "param_scheduler.warmup": 0.5, "default_hooks.checkpoint.interval": 1}
PRETRAINING = {**EPOCHS, "train_cfg.max_epochs": 12, "default_hooks.pictures.interval": 4}
LABELLED = {**EPOCHS, "train_cfg.max_epochs": 6, "train_cfg.val_interval": 2}
DETECTOR = {**DENSE, **LOGS, "model.backbone.depth": 2, "model.backbone.pretrain_img_size": 32,
            "model.neck.in_channels": 32}  # fmt: skip
SEGMENTOR = {**DENSE, **LOGS, "model.neck.embed_dim": 32, "model.decode_head.in_channels": "32,32,32,32",
             "model.auxiliary_head.in_channels": 32}  # fmt: skip
MMDET, MMSEG = "mmdet_configs/semaim_mask_rcnn_scenes.py", "mmseg_configs/semaim_upernet_scenes.py"
TWO, SEVERAL = ("--gpus", "2"), {"tool": 2, "all": 1, "child": 2}

CASES = {
    "pretraining": Case(PRETRAIN, "classes", PRETRAINING, 36, 8, spots=TRAINING),
    "pretraining_workers": Case(PRETRAIN, "classes", PRETRAINING | {"num_workers": 2}, 16, 4, (), TRAINING, SEVERAL),
    "pretraining_two": Case(PRETRAIN, "classes", PRETRAINING, 14, 4, TWO, TRAINING, SEVERAL),
    "finetuning": Case(
        "semaim/configs/finetune/vit_tiny_scenes.py", "labelled", LABELLED | {"model.mixup": 0.8}, 24, 6
    ),
    "linear": Case("semaim/configs/linear/vit_tiny_scenes.py", "labelled", LABELLED, 24, 6),
    "detection": Case(MMDET, "coco", DETECTOR, 24, 6),
    "segmentation": Case(MMSEG, "ade", SEGMENTOR, 24, 6),
    "segmentation_two": Case(MMSEG, "ade", SEGMENTOR, 8, 2, TWO, MEASURED, SEVERAL),
}


@pytest.fixture(scope="session")
def images(labelled, scenes, tmp_path_factory) -> Path:
    """Folders of all layouts: 40 labelled scenes of 32 pixels, 12 with boxes, masks and maps of 64."""
    from semaim.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("images")
    write_scenes(folder / "dense", 15, 64, seed=0)
    for name, place in (("classes", scenes), ("labelled", labelled)):
        (folder / name).symlink_to(place)
    for name in ("coco", "ade"):
        (folder / name).symlink_to(folder / "dense" / name)
    return folder


def logged(work: Path) -> list[dict]:
    """Every training line that any part of a run has logged, also those that a later part repeats."""
    rows = []
    for file in sorted(work.glob("*/vis_data/scalars.json")):
        for text in file.read_text().splitlines():
            try:
                row = json.loads(text)
            except ValueError:  # cut by a kill
                continue
            if "iter" in row and "loss" in row:
                rows.append({key: row[key] for key in row if key in ("iter", "lr", "grad_norm") or "loss" in key})
    return rows


def measured_by(work: Path) -> dict | None:
    """What results.json says of the run itself; None if there is none."""
    if not (work / "results.json").exists():
        return None
    found = json.loads((work / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in OF_THE_TIME}


def step_of(work: Path) -> int:
    """The step that a resumed run would go on from; a file that cannot be read fails."""
    newest = newest_checkpoint(work)
    return read_checkpoint(newest)["step"] if newest else 0


def same_tensors(one: dict, other: dict) -> bool:
    """Whether two state dictionaries are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def compared(work: Path, whole: Path) -> list[str]:
    """How a finished run differs from the uninterrupted one; empty if it does not."""
    found = []
    expected = {row["iter"]: row for row in logged(whole)}
    rows = logged(work)
    different = [row["iter"] for row in rows if row != expected[row["iter"]]]
    if different:
        found.append(f"steps {different} were not computed to the same bits")
    if {row["iter"] for row in rows} != expected.keys():
        found.append("steps are missing in the log")
    ours, theirs = (read_checkpoint(folder / "latest.pth") for folder in (work, whole))
    if ours["step"] != theirs["step"] or not same_tensors(ours["model"], theirs["model"]):
        found.append("the final weights are different")
    states = [saved["optimizer"]["state"] for saved in (ours, theirs)]
    if not all(same_tensors(states[0][index], states[1][index]) for index in states[1]):
        found.append("the optimizer's state is different")
    results, due = (measured_by(folder) or {} for folder in (work, whole))
    if different := [key for key in results.keys() | due.keys() if results.get(key) != due.get(key)]:
        found.append(f"results are different: {sorted(different)}")
    if names := partials(work):
        found.append(f"half-written files are left: {names}")
    names, usual = ({path.name for path in folder.iterdir() if path.suffix != ""} for folder in (work, whole))
    if usual - names:
        found.append(f"missing: {sorted(usual - names)}")
    return found


def attack(case: Case, images: Path, place: Path, whole: Path, start: float, seed: int, life: int, kills: int):
    """One life of a run. Returns its kills, each a dict, and problems, in words."""
    rng, work = random.Random(f"{seed} {life}"), place / f"life{life}"
    done, problems, step = [], [], 0
    for number in range(kills + 1):
        before = partials(work)
        attempt = Attempt(
            case.line(images, work, *(["--resume"] if number else [])), work, place / f"tmp{life}_{number}"
        )
        last = number == kills
        spots = {spot: weight for spot, weight in case.spots.items() if number == kills - 1 or spot not in LATE}
        spot, victim = chosen(rng, spots), chosen(rng, case.victims)
        reached, delay = spot(rng, start)
        hit = not last and attempt.until(reached, delay)
        if hit:
            attempt.kill(victim, rng)
        status = attempt.wait()
        here = f"life {life}, start {number}, {spot.__name__ if hit else 'to its end'} {victim if hit else ''}"
        if attempt.left:
            problems.append(f"{here}: {len(attempt.left)} processes are left")
        kill = {"spot": spot.__name__, "victim": victim, "status": status, "step": step_of(work), "partials": 0}
        if status == 0:  # to its end, or what was killed was no longer needed
            done += [kill] if hit else []
            problems += [f"{here}: {problem}" for problem in compared(work, whole)]
            return done, problems, len(attempt.listed_temporary())
        if not hit:
            problems.append(f"{here}: exit status {status}\n{attempt.tail()}")
            return done, problems, 0
        if attempt.tracebacks():
            problems.append(f"{here}: a traceback\n{attempt.tail(6)}")
        now, said = kill["step"], [found[1] for row in attempt.rows if (found := SAVED.search(row))]
        step = max([step, *(read_checkpoint(path)["step"] for path in said[-1:])])
        if now < step:
            problems.append(f"{here}: the newest checkpoint is of step {now}, there was one of {step}")
        step = now
        done.append(kill | {"partials": len(set(partials(work)) - set(before))})
    return done, problems, 0


def run_case(name: str, images: Path, place: Path, lives: range, kills: int, **counted) -> None:
    """All lives of a case; fails with all their problems, after the counts are written."""
    case, begun = CASES[name], time.monotonic()
    whole, start = whole_run(case.line(images, place / "whole"), place / "whole", place / "tmp_whole")
    done, problems, temporary = [], [], len(whole.listed_temporary())
    for life in lives:
        more, found, left = attack(case, images, place, place / "whole", start, SEED, life, kills)
        done, problems, temporary = done + more, problems + found, temporary + left
    steps = len(logged(place / "whole"))
    record(
        f"kills_{name}", seed=SEED, lives=len(lives), kills=len(done), steps=steps, problems=problems,
        spots=tally(kill["spot"] for kill in done), victims=tally(kill["victim"] for kill in done),
        statuses=tally(str(kill["status"]) for kill in done), after_a_checkpoint=sum(kill["step"] > 0 for kill in done),
        while_writing=sum(kill["partials"] > 0 for kill in done), files_left_in_tmpdir=temporary,
        seconds=round(time.monotonic() - begun), **counted,
    )  # fmt: skip
    assert not problems, "\n".join(problems)
    assert done, "no run was killed"


@pytest.mark.faults
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, images, tmp_path):
    if name in ("detection", "segmentation", "segmentation_two"):
        needed = "mmdet" if name == "detection" else "mmseg"
        pytest.importorskip(needed, reason=f"{needed} is not installed: runs after tools/setup.sh --extras all")
    case = CASES[name]
    lives = range(case.lives)
    if once := os.environ.get("SEMAIM_KILLS"):
        lives = range(int(once), int(once) + 1)
    run_case(name, images, tmp_path, lives, -(-case.kills // case.lives))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretraining", "segmentation"])
def test_a_run_killed_while_it_saves_goes_on_as_if_it_had_not_been(name, images, tmp_path, monkeypatch):
    if name == "segmentation":
        pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
    case = replace(CASES[name], spots={saving: 1})
    whole, start = whole_run(case.line(images, tmp_path / "whole"), tmp_path / "whole", tmp_path / "tmp_whole")
    done, problems, _ = attack(case, images, tmp_path, tmp_path / "whole", start, SEED, 0, kills=1)
    assert not problems and len(done) == 1, problems


# Tools that start others. The same command is typed again.

SWEEP = ["semaim/configs/linear/vit_tiny_scenes.py", "--epochs", "4", "--lr", "0.1", "0.2"]
QUICK = ["--scale", "quick", "--methods", "semaim", "--jobs", "2", "--length", "images=130", "unlabelled=80", "size=32",
         "pretrain=4", "finetune=2", "detection=2", "segmentation=2"]  # fmt: skip


def sweep_line(images: Path, work: Path) -> list[str]:
    """The sweep of a linear probe, two runs."""
    options = {**TINY, **LOGS, "default_hooks.checkpoint.interval": 1}
    return tool_line("sweep.py", *SWEEP, "--data-root", images / "labelled", "--work-dir", work, *flags(options))


def reproduce_line(images: Path, work: Path) -> list[str]:
    """From drawing the scenes to the table, two stages at a time."""
    return tool_line("reproduce.py", *QUICK, "--work-dir", work)


def figures(work: Path) -> dict[str, object]:
    """Every results.json in a folder, wherever the folder is, and the rows of its tables."""
    found: dict[str, object] = {}
    for path in sorted(work.rglob("results.json")):
        content = json.loads(path.read_text().replace(str(work), "WORK"))
        found[str(path.relative_to(work))] = {key: content[key] for key in content if key not in OF_THE_TIME}
    for path in (work / "sweep.csv", work / "table.csv"):
        if path.exists():
            rows = csv.DictReader(path.read_text().replace(str(work), "WORK").splitlines())
            found[path.name] = [{key: row[key] for key in row if key not in OF_THE_TIME} for row in rows]
    return found


def weights(work: Path) -> dict[str, dict]:
    """The final weights of every run in a folder."""
    paths = sorted(work.rglob("latest.pth"))
    return {str(path.relative_to(work)): read_checkpoint(path)["model"] for path in paths if path.exists()}


@pytest.mark.faults
@pytest.mark.parametrize(("name", "lives", "kills"), [("sweep", 4, 5), ("reproduce", 6, 8)])
def test_a_killed_tool_that_starts_others_goes_on_by_the_same_command(name, lives, kills, images, tmp_path):
    for module in ("mmdet", "mmseg"):
        pytest.importorskip(module, reason=f"{module} is not installed: runs after tools/setup.sh --extras all")
    line = {"sweep": sweep_line, "reproduce": reproduce_line}[name]
    begun, whole = time.monotonic(), tmp_path / "whole"
    attempt, _ = whole_run(line(images, whole), whole, tmp_path / "tmp_whole")
    took, expected, trained = time.monotonic() - begun, figures(whole), weights(whole)
    assert len(expected) >= 3 and trained
    done, problems = [], []
    for life in range(lives):
        rng, work = random.Random(f"{SEED} {name} {life}"), tmp_path / f"life{life}"
        for number in range(kills + 1):
            attempt = Attempt(line(images, work), work, tmp_path / f"tmp{life}_{number}")
            spot = chosen(rng, {starting: 3, stepping: 2, validating: 1, finishing: 1, stored: 2})
            victim = chosen(rng, {"tool": 3, "all": 1, "child": 2})
            reached, delay = spot(rng, took / 2)
            if hit := number < kills and attempt.until(reached, delay):
                attempt.kill(victim, rng)
            status, had = attempt.wait(), figures(work)
            here = f"life {life}, start {number}, {spot.__name__ if hit else 'to its end'} {victim if hit else ''}"
            if attempt.left:
                problems.append(f"{here}: {len(attempt.left)} processes are left")
            if attempt.tracebacks():
                problems.append(f"{here}: a traceback\n{attempt.tail(6)}")
            different = [key for key in had if "json" in key and had[key] != expected.get(key)]
            problems += [f"{here}: {key} is different" for key in different]
            if hit:
                done.append({"spot": spot.__name__, "victim": victim, "status": status})
            if status == 0:
                break
            if not hit:
                problems.append(f"{here}: exit status {status}\n{attempt.tail()}")
                break
        found = weights(work)
        if figures(work) != expected:
            problems.append(f"life {life}: other figures than the uninterrupted {name}'s")
        if found.keys() != trained.keys() or not all(same_tensors(found[key], trained[key]) for key in trained):
            problems.append(f"life {life}: other weights than the uninterrupted {name}'s")
        if left := partials(work):
            problems.append(f"life {life}: half-written files are left: {left}")
    record(
        f"kills_{name}", seed=SEED, lives=lives, kills=len(done), problems=problems, runs=len(trained),
        spots=tally(kill["spot"] for kill in done), victims=tally(kill["victim"] for kill in done),
        statuses=tally(str(kill["status"]) for kill in done), seconds=round(time.monotonic() - begun),
    )  # fmt: skip
    assert not problems, "\n".join(problems)
    assert done, "nothing was killed"
