"""One bad run folder never hides the others: it is named and left out, whatever is in it."""

import json
import resource
import subprocess
import sys

import pytest
from commands import CPU, ROOT
from counts import record

#: Table, glance, gains, sweep's table and report for each seed, with a memory limit and a time limit for each.
CHILD = """
import contextlib, io, json, os, resource, shutil, signal, sys, traceback
from pathlib import Path
sys.path[:0] = [{faults!r}]
from broken_runs import GOOD, WHOLE, mutate, write_run
from semaim.cli import report, results_table, sweep
from semaim.errors import run
import semaim.results.report, semaim.results.formats
work = Path({work!r})
def outcome(main, *words):
    out, err = io.StringIO(), io.StringIO()
    signal.alarm({seconds})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(lambda: main(list(map(str, words))))
    except BaseException:
        return "traceback", out.getvalue(), traceback.format_exc()
    signal.alarm(0)
    return code, out.getvalue(), err.getvalue()

for seed in [None, *json.loads(sys.argv[1])]:
    shutil.rmtree(work, ignore_errors=True)
    write_run(work / "runs/good", method="Other", metrics={{"top1": GOOD}})
    write_run(work / "runs/mae", method="MAE", metrics={{"top1": 70.0}}, checkpoint="m/latest.pth", pretrain_epochs=800)
    write_run(work / "runs/bad")
    what = "nothing" if seed is None else mutate(work / "runs/bad", seed)
    print(json.dumps(["begin", seed, what]), flush=True)
    for name, main, words in (
        ("table", results_table.main, [work / "runs"]),
        ("csv", results_table.main, [work / "runs", "--format", "csv"]),
        ("against", results_table.main, [work / "runs", "--against", "mae", "--no-published", "--format", "html"]),
        ("glance", results_table.main, [work / "runs", "--glance"]),
        ("alone", results_table.main, [work / "runs/bad"]),
        ("sweep", sweep.main, ["c.py", "--table", "--work-dir", work / "runs"]),
        ("report", report.main, [work / "runs", "--out", work / "r.html"]),
    ):
        code, out, err = outcome(main, *words)
        page = (work / "r.html").read_text() if name == "report" and code == 0 else out
        shown = [f"{{GOOD}}" in page, "<script>alert" in page]
        print(json.dumps(["end", seed, what, name, code, *shown, err]), flush=True)
    if seed is None:  # everything is imported
        limit = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + {limit}
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


def attack(seeds, work, limit=2 * 2**30, seconds=60):
    """[seed, what was broken, command, exit status, whether the good run is shown, whether a script is, stderr], ..."""
    code = CHILD.format(faults=str(ROOT / "tests/faults"), work=str(work), limit=limit, seconds=seconds)
    left, found, crashes = list(seeds), [], []
    while left:
        line = [sys.executable, "-W", "error::UserWarning", "-c", code, json.dumps(left)]
        env = {**CPU, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
        told = [json.loads(text) for text in done.stdout.splitlines()]
        found += [it[1:] for it in told if it[0] == "end" and it[1] is not None]
        begun = [it for it in told if it[0] == "begin" and it[1] is not None]
        if done.returncode == 0:
            break
        assert begun, done.stderr[-2000:]
        crashes.append((begun[-1], done.returncode, done.stderr[-2000:]))
        left = left[left.index(begun[-1][1]) + 1 :]
    return found, crashes


def judged(found):
    """What should not be: tracebacks, a good run that is not shown, scripts but in CSV, errors of several lines."""
    wrong = []
    for seed, what, name, code, shown, script, error in found:
        lines = error.strip().splitlines()
        fine = all(line.startswith(("skipped: ", "error: ") if code else "skipped: ") for line in lines)
        alone = name == "alone" and code in (0, 2) or name == "glance" and code == 2 and "all of one" in error
        right = alone or name == "sweep" and code == 0 or code == 0 and shown
        if not right or script and name != "csv" or not fine or name == "alone" and code == 2 and len(lines) > 1:
            wrong.append((seed, what, name, code, shown, script, error[-1500:]))
    return wrong


@pytest.mark.slow
def test_some_broken_run_folders(tmp_path):
    found, crashes = attack(range(30), tmp_path / "w")
    assert not crashes and not judged(found)
    assert sum("skipped: " in it[-1] for it in found if it[2] == "report") > 5, "some are named"


@pytest.mark.faults
def test_broken_run_folders(tmp_path):
    count = 400
    found, crashes = attack(range(1000, 1000 + count), tmp_path / "w")
    wrong = judged(found)
    tracebacks = [it for it in wrong if it[3] == "traceback"]
    named = len({it[0] for it in found if "skipped: " in it[-1]})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    counts = {"folders": count, "commands": len(found), "crashes": len(crashes), "tracebacks": len(tracebacks)}
    record("run_folders", **counts, wrong=len(wrong), named=named, peak_mb=peak)
    assert not crashes and not wrong, (crashes[:3], wrong[:5])
