"""One broken run among others: named and left out by every command that reads several; an error if none is left."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import one_line, tool
from PIL import Image
from test_report import checked
from test_results import CATALOGUE, WHOLE, write

from semaim.errors import UserError
from semaim.outcomes import read_outcomes, write_outcomes
from semaim.reading import read_json
from semaim.results import pipeline
from semaim.results.intervals import images_interval
from semaim.results.logs import read_lines
from semaim.results.report import write_report
from semaim.results.runs import read_runs
from semaim.results.stages import Stage
from semaim.results.sweeping import collect
from semaim.results.table import make_table

DEEP = "[" * 3000 + "]" * 3000
MAE = {"method": "MAE", "pretrain_config": "mae_vit_base_1600e.py", "pretrain_epochs": 1600, "metrics": {"top1": 83.6}}


def results(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


#: What stands in place of a results.json -> words of the reason.
BROKEN = {
    "truncated": (results('{"metrics": {"top1": 8'), "is broken: Expecting"),
    "text": (results(b"\xff\xfe{"), "is broken: 'utf-8' codec"),
    "nested": (results('{"metrics": {}, "x": ' + DEEP + "}"), "is broken: "),
    "list": (results("[1]"), "is broken: it holds no object but a list"),
    "huge": (results('{"metrics": {"top1": 1' + "0" * 400 + "}}"), "has a number above 1e+100"),
    "digits": (results('{"metrics": {"top1": 1' + "0" * 5000 + "}}"), "is broken: "),
    "infinite": (results('{"metrics": {"top1": 1}, "val_images": Infinity}'), "val_images is inf"),
    "surrogate": (results('{"metrics": {"top1": 1}, "data": "\\ud800"}'), r"has text with '\\ud800'"),
    "escape": (results('{"metrics": {"top1": 1}, "data": "\\u001b[2J"}'), r"has text with '\\x1b'"),
    "metric": (results('{"metrics": {"a": 1}, "task": "x", "reported": {"a": {"label": 3}}}'), "label is 3"),
    "no metric": (results('{"metrics": {"a": 1}, "task": "x", "reported": {"a": 3}}'), "reported is 3"),
    "folder": (lambda path: path.mkdir(), "is no regular file"),
    "fifo": (os.mkfifo, "is no regular file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "cannot read"),
    "loop": (lambda path: path.symlink_to("results.json"), "cannot read"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
}  # fmt: skip


@pytest.fixture
def works(tmp_path):
    """Two good runs and the folder of a third, without its results.json."""
    write(tmp_path / "w/ours", WHOLE)
    write(tmp_path / "w/mae", WHOLE, **MAE)
    (tmp_path / "w/bad").mkdir()
    return tmp_path / "w"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_result_is_left_out(kind, works):
    make, reason = BROKEN[kind]
    make(works / "bad/results.json")
    table = make_table([works], CATALOGUE)
    assert sorted(cell.mean for cell in {id(r.cell): r.cell for r in table.rows if r.cell}.values()) == [
        83.6,
        84.3,
        96.5,
    ]
    assert len(table.gains) == 1
    (line,) = table.skipped
    assert "bad/results.json" in line or reason == "reported" or kind == "metric", line
    assert reason.replace("\\\\", "\\") in line and line.isprintable()
    with pytest.raises(UserError, match="no result can be read: "):
        make_table([works / "bad"], CATALOGUE)


def test_commands_name_what_they_leave_out(works, tmp_path):
    os.mkfifo(works / "bad/results.json")
    line = f"skipped: {works / 'bad/results.json'} is no regular file\n"
    done = tool("results_table.py", works, "--against", "mae", "--glance")
    assert (done.returncode, done.stderr) == (0, line) and "84.30" in done.stdout and "+0.70" in done.stdout
    done = tool("report.py", works, "--out", tmp_path / "r.html")
    assert (done.returncode, done.stderr) == (0, line)
    page = checked(tmp_path / "r.html")
    assert "Left out" in page.text and "bad/results.json is no regular file" in page.text and "84.30 %" in page.text
    one_line(tool("results_table.py", works / "bad"), "bad/results.json is no regular file")
    with pytest.raises(UserError, match="no run can be read: .*bad/results.json is no regular file"):
        write_report([works / "bad"], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_other_files_of_a_run_are_left_out_alone(works):
    """Its figures stay; what cannot be read of it is named."""
    run = works / "bad"
    write(works / "x", WHOLE, seed=5, data="<script>alert(1)</script>")
    for file in (works / "x").iterdir():
        file.rename(run / file.name)
    (run / "1/vis_data").mkdir(parents=True)
    os.mkfifo(run / "1/vis_data/scalars.json")
    (run / "1/vis_data/config.py").write_text("x = " + "-" * 100_000 + "1")
    (run / "1/1.log").write_text("9999/99/99 99:99:99 - x\n| class | a | b |\n|\n")
    (run / "orders").mkdir()
    (run / "orders/epoch_1.png").write_bytes(b"\x89PNG no picture")
    Image.new("1", (8000, 8000)).save(run / "large.png")
    lines = write_report([works], works / "r.html")
    page = checked(works / "r.html")
    assert "large.png: no picture that can be read: it has more than 50,000,000 pixels" in page.text
    assert len(lines) == 3 and "epoch_1.png" in page.text and "scalars.json is no regular file" in page.text
    assert "<script>" not in (works / "r.html").read_text() and "w/bad" in page.text


def test_logged_lines_that_are_none_of_ours_are_left_out(tmp_path):
    (tmp_path / "1/vis_data").mkdir(parents=True)
    odd = (
        '{"loss": 1, "iter": "3"}',
        '{"loss": 1, "iter": 1e9}',
        '{"loss": 1, "iter": -1}',
        '{"loss": 1, "iter": 3, "epoch": []}',
    )
    good = '{"loss": 0.5, "iter": 4, "lr": NaN}'
    text = "\n".join([*odd, '{"loss": 1, "iter": 2' + "0" * 300 + "}", DEEP, "\xff", good])
    (tmp_path / "1/vis_data/scalars.json").write_text(text, encoding="latin1")
    assert [line["iter"] for line in read_lines(tmp_path)] == [4]


def test_outcomes_are_bounded(tmp_path):
    write_outcomes(tmp_path, ["a", "b"], {"top1": np.ones(2)})
    assert read_outcomes(tmp_path) is not None
    path = tmp_path / "outcomes.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    start = b"\x93NUMPY\x01\x00" + len(header % 10**15).to_bytes(2, "little") + header % 10**15

    def zipped(**members):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)

    for make, reason in (
        (lambda: zipped(names=start, top1=start), "is broken: "),
        (lambda: zipped(names=b"\0" * (2**29 + 1)), "unpacks to more than"),
        (lambda: np.savez(path, names=np.array(["a", None], dtype=object)), "allow_pickle"),
        (lambda: np.savez(path, names=np.array(3.0), top1=np.ones(1, np.float32)), "no list of names"),
        (lambda: np.savez(path, names=np.array(["a"]), top1=np.float32(1)), "do not fit"),
        (lambda: (path.unlink(), os.mkfifo(path)), "no regular file"),
        (lambda: (path.unlink(), path.symlink_to("nowhere")), "no regular file"),
    ):
        make()
        with pytest.raises(UserError, match=f"outcomes.npz is broken: .*{reason}|{reason}"):
            read_outcomes(tmp_path)


def test_numbers_of_images_that_are_none_give_no_interval(tmp_path):
    write(tmp_path / "a", WHOLE, val_images=-5)
    (run, *_) = read_runs(tmp_path / "a/results.json", CATALOGUE)
    assert images_interval([run], [run])[0] is None


def test_folders_of_odd_names_and_deep_ones_are_survived(works):
    (works / "odd\x1b[2J").mkdir()
    (works / os.fsdecode(b"latin\xe9")).mkdir()
    deep = works
    for _ in range(60):
        deep = deep / "d"
        deep.mkdir()
    write(deep / "run", WHOLE, seed=9)
    table = make_table([works], CATALOGUE)
    assert len(table.skipped) == 2 and all(
        "control characters" in line and line.isprintable() for line in table.skipped
    )
    assert any(row.cell and len(row.cell.runs) == 2 for row in table.rows)


# Sweeps and reproductions


def run_of_sweep(folder, lr, top1):
    write(folder, WHOLE, metrics={"top1": top1})
    record = {"base_lr": lr, "peak_lr": lr, "layer_decay": None, "settings": {"options": {}}}
    (folder / "sweep.json").write_text(json.dumps(record))


def test_a_sweeps_table_leaves_broken_runs_out(tmp_path):
    for number in range(4):
        run_of_sweep(tmp_path / f"lr{number}", 0.1 * (number + 1), 50.0 + number)
    (tmp_path / "lr1/sweep.json").write_text('{"base_lr": "x"}')
    (tmp_path / "lr2/results.json").write_text("[]")
    (tmp_path / "lr3/sweep.json").unlink()
    (tmp_path / "lr3/sweep.json").mkdir()
    done = tool("sweep.py", "c.py", "--table", "--work-dir", tmp_path)
    assert done.returncode == 0 and "| lr0 |" in done.stdout and "lr1" not in done.stdout, done.stderr
    lines = done.stderr.splitlines()
    assert [line.startswith("skipped: ") for line in lines] == [True] * 3 and "base_lr is None" not in done.stderr
    for name in ("lr0", "lr3"):
        (tmp_path / name / "results.json").write_text("[]")
    with pytest.raises(UserError, match="no run can be read: .*lr0/results.json is broken"):
        collect(tmp_path, None)


def test_a_reproduction_leaves_stages_of_broken_folders_out(tmp_path, capsys):
    def stage(method, name, needs=None):
        folder = tmp_path / method / name
        folder.mkdir(parents=True)
        return Stage(name, method, 0, "c.py", folder, needs=needs, unit="epochs", length=1)

    first, tuned = stage("a", "pretrain"), stage("a", "finetune", "a/seed0/pretrain")
    other = stage("b", "pretrain")
    (first.folder / "latest.pth").touch()
    for text in ("{", "[]", '{"settings": 3}', '{"settings": {"options": []}}'):
        (first.folder / "stage.json").write_text(text)
        assert pipeline.check([first, tuned, other], [first, tuned, other]) == [other]
        error = capsys.readouterr().err.splitlines()
        assert (
            len(error) == 2 and "a/pretrain/stage.json is broken" in error[0] and "starts from a/seed0/pre" in error[1]
        )
    with pytest.raises(UserError, match="no stage is left: .*stage.json is broken"):
        pipeline.check([first, tuned, other], [first, tuned])
    (first.folder / "stage.json").write_text(json.dumps({"settings": {**first.settings, "config": "other.py"}}))
    with pytest.raises(UserError, match="was run with config = other.py"):
        pipeline.check([first, tuned, other], [other])


@pytest.mark.parametrize("text", ["", "nul", "{" * 100_000, '{"a": ' + "[" * 40 + "]" * 40 + "}"])
def test_json_that_is_broken(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json is broken: ") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_json(Path(tmp_path / "b.json"))
