"""The attacks notice what they are for, and their counts become tables."""

import json
import shutil
import sys

import torch
from attempts import Attempt
from table import tables
from test_kills import compared, figures

from semaim.checkpoints.files import read_checkpoint, write_checkpoint


def test_every_difference_to_the_uninterrupted_run_is_noticed(pretrained, tmp_path):
    whole, work = pretrained.parent, tmp_path / "work"
    shutil.copytree(whole, work, symlinks=True)
    assert compared(work, whole) == []

    (work / ".epoch_9.pth.7.partial").touch()
    (file,) = work.glob("*/vis_data/scalars.json")
    first, *rest = file.read_text().splitlines()
    row = json.loads(first)
    file.write_text("\n".join([json.dumps(row | {"loss": row["loss"] + 1e-7}), *rest, '{"iter": 5, "lo']))
    saved = read_checkpoint(work / "epoch_1.pth")
    name = next(iter(saved["model"]))
    saved["model"][name] = torch.nextafter(saved["model"][name], torch.tensor(9.0))
    write_checkpoint(saved, work / "epoch_1.pth")
    (work / "results.json").write_text('{"metrics": {}, "date": "now"}')
    found = " ".join(compared(work, whole))
    for part in ("not computed to the same bits", "final weights", "results are different", "half-written files"):
        assert part in found, found


def test_tracebacks_are_counted_without_those_of_pythons_resource_tracker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time, multiprocessing\n"
        "from multiprocessing import resource_tracker\n"
        "context = multiprocessing.get_context('spawn')\n"
        "lock = context.Lock()\n"
        "if 'tracker' in sys.argv: os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)\n"
        "time.sleep(0.5)\n"
        "other = context.Lock()\n"
        "if 'fail' in sys.argv: raise ValueError\n"
    )
    for words, printed, counted in (([], 0, 0), (["tracker"], 1, 0), (["fail"], 1, 1), (["tracker", "fail"], 2, 1)):
        attempt = Attempt([sys.executable, str(script), *words], tmp_path, tmp_path / "-".join(["t", *words]))
        attempt.wait()
        found = sum("Traceback" in row for row in attempt.rows)
        assert (found, attempt.tracebacks()) == (printed, counted), attempt.tail()


def test_figures_do_not_depend_on_the_folder_or_the_time(tmp_path):
    for name, date in (("a", "1"), ("b", "2")):
        (tmp_path / name / "run").mkdir(parents=True)
        content = {"metrics": {"top1": 1.0}, "checkpoint": str(tmp_path / name / "x.pth"), "date": date}
        (tmp_path / name / "run/results.json").write_text(json.dumps(content))
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    (tmp_path / "b/run/results.json").write_text(json.dumps({"metrics": {"top1": 2.0}}))
    assert figures(tmp_path / "a") != figures(tmp_path / "b")


def test_counts_become_tables():
    kills = {"attack": "kills_linear", "kills": 3, "lives": 1, "spots": {"saving": 2, "starting": 1}, "problems": [],
             "after_a_checkpoint": 2, "while_writing": 1, "seconds": 9}  # fmt: skip
    slope = {"first": 1, "last": 1, "largest": 2**20, "samples": 3, "slope": 2**19, "slope_95": [0, 2**20]}
    leaks = {"attack": "leaks_training", "steps": 1000, "found": {"memory of main": slope, "files of main": slope}}
    text = tables(
        [
            kills,
            {**kills, "attack": "kills_sweep"},
            leaks,
            {
                "attack": "label_maps",
                "files": 7,
                "python": "3",
                "crashes": [],
                "by_format": {"a": {"read": 1, "refused": 2}, "b": 3},
            },
        ]  # fmt: skip
    )
    assert "| linear | 3 | 1 | 1 | 2 | 2 | 1 | 0 | 9 |" in text and "| all | 6 | 2 | 2 | 4 | 4 | 2 | 0 | 18 |" in text
    assert "| memory of main, MiB | +0.50 | +0.00 to +1.00 | 1 |" in text and (
        "| label maps | files: 7; crashes: 0; by format: a (read 1, refused 2), b 3 |" in text
    )
