"""Stages side by side: what begins when, what ends when one fails or a signal comes, what is printed; with shells."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from semaim.errors import run
from semaim.results import pipeline, running
from semaim.results.running import Children
from semaim.results.stages import Stage

ROOT = Path(__file__).resolve().parent.parent
FOREVER = "while :; do sleep 0.05; done"
SAVES = "trap 'echo saved >> {own}/saved; exit 9' INT TERM; echo > {own}/begun; " + FOREVER
SOON = "echo > {own}/begun; echo '{{}}' > {own}/results.json"
MEET = "until [ -e {other}/begun ]; do sleep 0.05; done; "  #: wait until another stage has begun


@dataclass(frozen=True)
class Shell(Stage):
    """A stage whose command is a shell's."""

    script: str = ""

    def command(self):
        return ["sh", "-c", self.script]


def stage(work, method, script, name="knn", **more):
    """A stage; in its script, {own} is its folder and {other} that of the method `other`, of the same name."""
    folder, other = (work / method / "seed0" / name for method in (method, "other"))
    return Shell(name, method, 0, "", folder, script=script.format(own=folder, other=other), **more)


@pytest.fixture
def carried(capfd):
    """A function that works through stages; exit status, output, error."""

    def call(*stages, jobs=2):
        capfd.readouterr()
        return run(lambda: pipeline.work_through(list(stages), jobs)), *capfd.readouterr()

    return call


def test_stages_meet_and_wait_for_what_they_need(tmp_path, carried):
    # Each of the two waits for the other to begin; the third needs one of them, and that both were let through.
    first = stage(tmp_path, "other", "echo > {own}/begun; until [ -e {own}/met ]; do sleep 0.05; done; " + SOON)
    second = stage(tmp_path, "one", MEET + "echo > {other}/met; " + SOON)
    third = stage(tmp_path, "two", "[ -e {other}/results.json ] && " + SOON, needs=first.title)
    status, output, error = carried(third, first, second)
    assert (status, error) == (0, "") and all(it.result.exists() for it in (first, second, third))
    assert output.index("other/seed0/knn took") < output.index("stage 1 of 3, two/seed0/knn:")
    again = carried(third, first, second)
    assert again[0] == 0 and again[1].count("has finished") == 3 and "took" not in again[1]


def test_without_jobs_one_follows_the_other_as_listed(tmp_path, carried):
    first = stage(tmp_path, "other", SOON + "; echo {own} has no title")
    second = stage(tmp_path, "one", "[ -e {other}/results.json ] && " + SOON)
    status, output, _ = carried(first, second, jobs=1)
    assert status == 0 and f"\n{first.folder} has no title\n" in output
    assert carried(replace(second, method="again", folder=tmp_path / "again", script="exit 5"), first, jobs=1)[0] == 5


def test_lines_begin_with_the_title_and_end(tmp_path, carried):
    stages = [
        stage(tmp_path, method, "for i in 1 2 3 4 5; do echo $i; done; printf 'bar 1\\rbar 2'; printf e >&2; " + SOON)
        for method in ("one", "two")
    ]
    status, output, error = carried(*stages)
    assert (status, error) == (0, "")
    for it in stages:
        said = [row.removeprefix(f"[{it.title}] ") for row in output.splitlines() if row.startswith(f"[{it.title}] ")]
        assert said == ["1", "2", "3", "4", "5", "bar 1", "bar 2e"]
    rest = [row for row in output.splitlines() if not row.startswith("[")]
    assert len(rest) == 6 and all("took" in row or row.startswith(("stage ", "sh -c ")) for row in rest), rest


def test_a_failure_ends_the_one_beside_it_and_gives_its_status(tmp_path, carried):
    beside = stage(tmp_path, "other", SAVES)
    fails, waits = stage(tmp_path, "one", MEET + "exit 3"), stage(tmp_path, "two", SOON)
    status, output, error = carried(beside, fails, waits)
    assert status == 3 and (beside.folder / "saved").read_text() == "saved\n" and not waits.folder.exists()
    assert error.splitlines() == [
        "one/seed0/knn failed with exit status 3; what has finished stays",
        "other/seed0/knn was stopped with it: the same command continues from there",
    ]
    silent = stage(tmp_path, "three", "true")  # and leaves nothing behind
    assert carried(silent)[0] == 1


@pytest.mark.parametrize(("name", "trapped"), [("INT", "INT"), ("TERM", "TERM"), ("HUP", "TERM"), ("USR1", "TERM")])
def test_a_signal_ends_both_once(tmp_path, carried, name, trapped):
    ends = SAVES.replace("INT TERM", trapped)
    beside = stage(tmp_path, "other", ends)
    asks = stage(
        tmp_path, "one", f"trap 'echo saved >> {{own}}/saved; exit 0' {trapped}; {MEET}kill -{name} $PPID; {FOREVER}"
    )
    waits = stage(tmp_path, "two", SOON)
    before = signal.getsignal(signal.SIGINT)
    status, output, error = carried(beside, asks, waits)
    assert (
        status == 128 + signal.Signals[f"SIG{name}"]
        and not waits.folder.exists()
        and signal.getsignal(signal.SIGINT) is before
    )
    for it in (beside, asks):
        assert (it.folder / "saved").read_text() == "saved\n"
        assert f"interrupted in {it.title}: the same command continues from there\n" in error


def test_a_signal_while_a_command_starts_reaches_it_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(running.os, "killpg", lambda group, number: told.append(number) or os.kill(group, number))
    with Children() as children:

        class Popen(subprocess.Popen):
            def __init__(self, *more, **keys):
                super().__init__(*more, **keys)
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(running.subprocess, "Popen", Popen)
        assert children.follow(["sleep", "600"]) == 128 + signal.SIGINT and told == [signal.SIGINT]
        assert not children.running
        # After it nothing starts.
        assert children.follow(["touch", str(tmp_path / "file")]) == 130 and not (tmp_path / "file").exists()


def test_each_signal_is_passed_on_once(monkeypatch):
    told, children = [], Children()
    monkeypatch.setattr(running.os, "killpg", lambda *what: told.append(what))

    class Child:
        pid = 7

    child = Child()
    children.running[child] = 0
    children.stop(signal.SIGTERM)
    children.pass_on(child)  # as the thread does that has just started it
    assert told == [(7, signal.SIGTERM)]
    children.stop(signal.SIGINT)
    assert told[1:] == [(7, signal.SIGINT)]
    children.running.clear()
    children.pass_on(child)  # it has ended
    assert len(told) == 2 and not children.running


def test_an_error_of_ours_beside_a_stage_ends_it_and_is_one_line(tmp_path, carried):
    beside = stage(tmp_path, "other", SAVES)
    broken = stage(tmp_path, "one", "", name="finetune")  # begins first
    (tmp_path / "one").write_text("a file where its folder should be")
    before = set(threading.enumerate())
    status, output, error = carried(beside, broken)
    for thread in set(threading.enumerate()) - before:
        thread.join()  # until it has ended too, whether it had come to begin or not
    assert (beside.folder / "saved").exists() or not (beside.folder / "begun").exists()
    assert not beside.result.exists() and status == 2 and error == f"error: {broken.folder}: Not a directory\n"
    assert carried(broken, jobs=1)[::2] == (2, error)


def test_a_reader_that_leaves_ends_the_stages(tmp_path):
    """As `| head` does: nobody would see what they say."""
    code = f"""
import sys, pathlib, test_jobs as jobs
work = pathlib.Path({str(tmp_path)!r})
loud = jobs.stage(work, "one", jobs.MEET + "while :; do echo line; sleep 0.01; done")
stages = [jobs.stage(work, "other", jobs.SAVES), loud]
sys.exit(jobs.run(lambda: jobs.pipeline.work_through(stages, 2)))
"""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, "-c", code], env=env, **pipe) as parent:
        for row in parent.stdout:
            if row == "[one/seed0/knn] line\n":
                break
        parent.stdout.close()
        assert (parent.wait(600), parent.stderr.read()) == (141, "")
    assert (tmp_path / "other/seed0/knn/saved").read_text() == "saved\n"


def test_stages_that_wait_for_one_another_are_no_success(tmp_path, carried):
    pair = [
        stage(tmp_path, method, SOON, needs=f"{needs}/seed0/knn") for method, needs in (("one", "two"), ("two", "one"))
    ]
    for jobs in (1, 2):
        status, _, error = carried(*pair, jobs=jobs)
        assert status == 2 and error == "error: one/seed0/knn waits for two/seed0/knn, which waits too\n"


def test_what_is_needed_need_not_be_asked_for(tmp_path, carried):
    alone = stage(tmp_path, "one", SOON, needs="one/seed0/pretrain")  # which finished long ago
    assert carried(alone)[0] == 0 and alone.result.exists()
