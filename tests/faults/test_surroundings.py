"""A run in bad surroundings: folders that cannot be written or go away, closed outputs, odd paths, a clock that jumps.

What does not hold yet is marked as such, strictly: once it holds, the mark has to go.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import SAVED, STEP, Attempt, partials, tool_line
from commands import CPU, ROOT, flags, losses
from counts import record

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.results.logs import read_scalars

pytestmark = pytest.mark.faults

CONFIG = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
SMALL = {
    "model.network.img_size": 32, "model.network.embed_dim": 32, "model.network.num_heads": 2,
    "model.network.depth": 2, "total_batch_size": 8, "num_workers": 0, "train_cfg.max_epochs": 4,
    "param_scheduler.warmup": 0.5, "default_hooks.logger.interval": 1, "default_hooks.checkpoint.interval": 1,
    "log_processor.window_size": 1,
}  # fmt: skip
ODD = "a b'c\"d $HOME %s {x} *?[y]\nnew -line ünï 漢字 🦊"
CLOCK = """
import os, time
real, calls = time.time, [0]
def jumping():
    calls[0] += 1
    return real() + float(os.environ["CLOCK_SHIFT"]) + float(os.environ["CLOCK_JUMP"]) * (calls[0] // 7 % 2)
time.time = jumping
"""


def line(scenes, work, *more, **options):
    """The command line of a pretraining of 20 steps."""
    places = ["--data-root", scenes, "--work-dir", work]
    return tool_line("train.py", CONFIG, *places, *more, *flags({**SMALL, **options}))


def run(words, environment=(), **options):
    """The run, to its end."""
    env = {**os.environ, **CPU, **dict(environment)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(words, env=env, timeout=300, **{"cwd": ROOT, "text": True, "errors": "replace", **pipes})


def in_namespace(script, words):
    """A command after `script`, which mounts something that the command alone sees."""
    start = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*start, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here: runs as root, or where the system allows them")
    return [*start, "sh", "-c", f'{script} && exec "$@"', "sh", *words]


def one_line(done, *messages):
    """A failure as users see it."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in messages), done.stderr


@pytest.fixture(scope="module")
def plain(scenes, tmp_path_factory):
    """The losses of the run in good surroundings."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    done = run(line(scenes, folder))
    assert done.returncode == 0, done.stderr
    assert len(losses(folder)) == 20
    return losses(folder)


def same(done, work, plain):
    """A run that ended as one in good surroundings."""
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in (done.stdout or "") + (done.stderr or "")
    assert losses(work) == plain and read_checkpoint(newest_checkpoint(work))["step"] == 20 and not partials(work)


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_temporary_files_that_cannot_be_written_are_not_needed(scenes, plain, tmp_path, gpus):
    done = run(line(scenes, tmp_path / "run", "--gpus", gpus, num_workers=1), {"TMPDIR": "/proc/none"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    expected = plain if gpus == "1" else pytest.approx(plain, abs=1e-3)  # two processes round differently
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_a_home_that_cannot_be_written_is_not_needed(scenes, plain, tmp_path, home):
    environment = {**os.environ, **CPU, "XDG_CACHE_HOME": "/proc/none"}
    environment.pop("HOME", None)
    if home:
        environment["HOME"] = home
    done = subprocess.run(
        line(scenes, tmp_path / "run"), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    same(done, tmp_path / "run", plain)


def test_a_checkout_that_cannot_be_written_is_enough(scenes, plain, tmp_path):
    script = f"mount --bind '{ROOT}' '{ROOT}' && mount -o remount,bind,ro '{ROOT}' && cd '{tmp_path}'"
    words = line(scenes, tmp_path / "run")
    words[words.index(CONFIG)] = str(ROOT / CONFIG)
    same(run(in_namespace(script, words)), tmp_path / "run", plain)
    words = line(scenes, ROOT / "work_dirs/nowhere")
    words[words.index(CONFIG)] = str(ROOT / CONFIG)
    one_line(run(in_namespace(script, words)), "cannot write to the work folder", "--work-dir")


@pytest.mark.parametrize("how", ["ro", "size=4k"])
def test_without_shared_memory_one_line_says_to_use_no_workers(scenes, tmp_path, how):
    words = in_namespace(f"mount -t tmpfs -o {how} tmpfs /dev/shm", line(scenes, tmp_path / "run", num_workers=2))
    one_line(run(words), "/dev/shm", "num_workers=0")


@pytest.mark.parametrize("locale", ["C", "POSIX", "xx_YY.none"])
def test_a_locale_changes_nothing(scenes, plain, tmp_path, locale):
    done = run(line(scenes, tmp_path / "ünï"), {"LC_ALL": locale, "LANG": locale})
    same(done, tmp_path / "ünï", plain)


def test_an_output_in_ascii_loses_letters_and_no_lines(scenes, plain, tmp_path):
    done = run(line(scenes, tmp_path / "ünï"), {"PYTHONIOENCODING": "ascii"})
    same(done, tmp_path / "ünï", plain)
    assert "Logging error" not in done.stderr


def test_nobody_else_can_read_what_a_strict_umask_protects(scenes, plain, tmp_path):
    done = run(line(scenes, tmp_path / "run"), preexec_fn=lambda: os.umask(0o077))
    same(done, tmp_path / "run", plain)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert not [path for path in found if not path.is_symlink() and path.stat().st_mode & 0o077]


def test_any_name_may_stand_in_a_path(scenes, plain, tmp_path):
    work, data = tmp_path / ODD / "run", tmp_path / ODD / "data"
    shutil.copytree(scenes, data)
    same(run(line(data, work)), work, plain)
    done = run(line(data, work, "--resume"))
    assert done.returncode == 0 and losses(work) == plain, done.stderr


def test_the_longest_names_are_taken_and_longer_ones_refused_in_one_line(scenes, plain, tmp_path):
    same(run(line(scenes, tmp_path / ("x" * 255))), tmp_path / ("x" * 255), plain)
    one_line(run(line(scenes, tmp_path / ("x" * 256))), "File name too long")
    one_line(run(line(scenes, tmp_path / "/".join(["y" * 200] * 25))), "File name too long")


def test_a_path_that_is_no_utf_8_is_refused_in_one_line(scenes, tmp_path):
    one_line(run(line(scenes, os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))), "UTF-8")


# Outputs that nobody reads any more.


@pytest.mark.parametrize("where", ["pipe", "/dev/full"])
def test_a_reader_that_goes_away_ends_or_silences_a_run(scenes, tmp_path, where):
    if where == "pipe":
        reader = subprocess.Popen(["head", "-n", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        done = run(line(scenes, tmp_path / "run"), stdout=reader.stdin)
        reader.stdin.close()
        reader.wait(60)
    else:
        with open(where, "w") as full:
            done = run(line(scenes, tmp_path / "run"), stdout=full)
    assert done.returncode in (0, 141) and len(done.stderr.splitlines()) <= 1, done.stderr[:500]
    assert done.returncode == 141 or len(losses(tmp_path / "run")) == 20


def test_a_closed_output_is_no_reason_to_end(scenes, plain, tmp_path):
    same(run(["sh", "-c", 'exec "$@" >&-', "sh", *line(scenes, tmp_path / "run")]), tmp_path / "run", plain)


# Work folders.


def test_of_two_runs_in_one_folder_one_is_refused(scenes, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    env = {**os.environ, **CPU}
    # The first saves at its end only, so the second sees no checkpoint in the folder.
    options = {"train_cfg.max_epochs": 100, "default_hooks.checkpoint.interval": 1000}
    words = [line(scenes, tmp_path / "run", seed=seed, **options) for seed in (0, 1)]
    both = [subprocess.Popen(one, **pipes, env=env) for one in words]
    said = [process.communicate(timeout=300)[1] for process in both]
    statuses = [process.returncode for process in both]
    assert sorted(statuses) == [0, 2], (statuses, said)
    refused = statuses.index(2)
    assert len(said[refused].strip().splitlines()) == 1 and str(tmp_path / "run") in said[refused], said[refused]
    saved = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert (saved["step"], saved["config"]["seed"]) == (500, 1 - refused) and len(losses(tmp_path / "run")) == 500


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_work_folder_that_goes_away_ends_the_run_in_one_line(scenes, tmp_path, how):
    work, moved = tmp_path / "run", tmp_path / "moved"
    words = line(scenes, work, **{"train_cfg.max_epochs": 400})
    attempt = Attempt(words, work, tmp_path / "tmp")
    assert attempt.until(lambda it: it.count(SAVED) >= 4, 0)
    work.rename(moved)
    if how == "removed":
        shutil.rmtree(moved)
    assert attempt.wait() == 2 and not attempt.left, attempt.tail()
    (said,) = [row for row in attempt.rows if row.startswith("error: ")]
    assert str(work) in said and not any("Traceback" in row for row in attempt.rows), attempt.tail()
    assert how == "removed" or read_checkpoint(newest_checkpoint(moved))["step"] >= 20


# The clock.


def clock(folder, shift, jump):
    """An environment whose clock is wrong by `shift` seconds, and by `jump` more every other seven calls."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "CLOCK_SHIFT": str(shift), "CLOCK_JUMP": str(jump)}


def test_a_clock_that_was_put_back_loses_no_part_of_the_log(scenes, plain, tmp_path):
    attempt = Attempt(line(scenes, tmp_path / "run"), tmp_path / "run", tmp_path / "tmp")
    assert attempt.until(lambda it: it.count(SAVED) >= 2, 0)
    os.kill(attempt.process.pid, signal.SIGKILL)
    attempt.wait()
    environment = clock(tmp_path / "clock", shift=-86400, jump=0)
    done = run(line(scenes, tmp_path / "run", "--resume"), environment)
    assert done.returncode == 0 and attempt.count(STEP) < 20, done.stderr
    assert {row["iter"]: row["loss"] for row in read_scalars(tmp_path / "run")} == plain


def test_a_clock_that_jumps_changes_no_step(scenes, plain, tmp_path):
    done = run(line(scenes, tmp_path / "run"), clock(tmp_path / "clock", shift=0, jump=-3600))
    same(done, tmp_path / "run", plain)
    assert all(0 <= row["data_share"] <= 1 for row in read_scalars(tmp_path / "run"))


def test_what_was_tried_is_counted(request):
    """Counts of this file: each test of it that was chosen ran before this one, or beside it."""
    items = [item for item in request.session.items if Path(item.path) == Path(__file__)]
    record("surroundings", tried=len(items) - 1, platform=sys.platform)
    assert len(items) > 1
