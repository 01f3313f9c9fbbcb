"""The results table as Markdown, CSV, LaTeX and HTML, and the command that prints it."""

import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import one_line, tool
from test_results import CATALOGUE, DETECTOR, NEIGHBOURS, WARNING, WHOLE, cells, only, works, write  # noqa: F401

from semaim.errors import UserError
from semaim.results.formats import FORMATS
from semaim.results.runs import find_results, reported
from semaim.results.table import HEADER, at_a_glance, make_table


def md_table(text):
    """Markdown's rows by column, unescaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert set(rows[1]) == {"---"} and {len(row) for row in rows} == {len(HEADER)}
    return [dict(zip(rows[0], [re.sub(r"\\(.)", r"\1", cell) for cell in row], strict=True)) for row in rows[2:]]


def latex_table(text):
    """LaTeX's rows by column, unescaped; nothing special is left unescaped."""
    body = text[text.index(r"\midrule") + 8 : text.index(r"\bottomrule")]
    columns = re.search(r"\\begin\{tabular\}\{(.*)\}", text)[1]
    assert len(re.sub(r"p\{\w+\}", "p", columns)) == len(HEADER)
    rows = []
    for line in body.strip().splitlines():
        assert line.endswith(r" \\")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)&", line[:-3])]
        plain = [re.sub(r"\\text\w+\{\}|\\[&%$#_{}]|\{[\[*]\}|\$\\pm\$", "", cell) for cell in cells]
        assert not re.search(r"[&%$#_{}~^\\<>|]", "".join(plain)), line
        words = {r"$\pm$": "±", r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", "{*}": "*", "{[}": "["}
        for code, sign in words.items():
            cells = [cell.replace(code, sign) for cell in cells]
        rows.append([re.sub(r"\\([&%$#_{}])", r"\1", cell) for cell in cells])
    assert {len(row) for row in rows} == {len(HEADER)}
    return [dict(zip(HEADER, row, strict=True)) for row in rows]


class TableParser(HTMLParser):
    """Rows of cells, items of the list, and whether all is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.items = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "li":
            self.items[-1] += data


def html_table(text):
    """HTML's rows by column."""
    parser = TableParser()
    parser.feed(text)
    assert not parser.open and parser.rows[0] == list(HEADER)
    return [dict(zip(HEADER, row, strict=True)) for row in parser.rows[1:]]


def csv_table(text):
    """CSV's rows by column, none of which is there twice."""
    names = next(csv.reader(io.StringIO(text)))
    assert len(set(names)) == len(names)
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


table_of = {"md": md_table, "latex": latex_table, "html": html_table, "csv": csv_table}


def expected_of(row):
    """A row's cells as they are to be printed, by column, from the files alone."""
    words = {"Published": "", "Ours": "", "Difference": ""}
    if row.published:
        f = row.published
        mark = {"derived": " (derived)", "remembered": " (from memory)"}.get(f.status, "")
        upto = f" to {f.value_to}" if f.value_to else ""
        words["Published"] = "unknown" if f.value is None else f"{f.value}{upto}{mark}"
        words |= {"Method": f.method, "Backbone": f.backbone, "Metric": f.metric, "Task": f"{f.task}, {f.data}"}
    if row.cell:
        files = [json.loads((Path(run.folder) / "results.json").read_text()) for run in row.cell.runs]
        known = reported(files[0]["metrics"])
        name, factor = next((n, metric.factor) for n, (_, metric) in known.items() if metric.label == row.section[1])
        values = [file["metrics"][name] * factor for file in files]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        words["Ours"] = f"{statistics.mean(values):.2f}{spread} (n = {len(values)})"
        if row.published:
            words["Difference"] = f"{statistics.mean(values) - row.published.value:+.2f}"
    return words


@pytest.mark.parametrize("name", ["md", "latex", "html"])
def test_formats_are_read_back(works, name):
    table = make_table([works], CATALOGUE)
    text = FORMATS[name](table)
    read = table_of[name](text)
    assert len(read) == len(table.rows) > 60
    for line, row in zip(read, table.rows, strict=True):
        assert {key: line[key] for key in expected_of(row)} == expected_of(row)
    (line,) = [line for line in read if line["Task"].startswith("k-NN")]
    assert line["Task"] == "k-NN, 50%_of|cifar<b>" and line["Remark"] == "reduced: 50,000 images, validated on 10,000"
    (line,) = [line for line in read if line["Difference"]]
    assert line["Ours"] == "84.25 ± 0.18 (n = 3)" and line["Difference"] == "+0.15" and line["Published"] == "84.1"
    marks = re.findall(r"[PR]\d+", line["Origin"])
    assert [mark[0] for mark in marks] == ["R", "P"]
    assert all(re.search(rf"(?<!\w){mark}: ", text) for mark in marks)
    assert text.endswith("\n") and "8 x NVIDIA H200" in text and "2026-01-02T03:04:05" in text and "0123abc" in text


def test_csv_holds_everything(works):
    table = make_table([works], CATALOGUE)
    read = csv_table(FORMATS["csv"](table))
    for line, row in zip(read, table.rows, strict=True):
        if row.published:
            value = row.published.value
            assert line["published"] == ("" if value is None else str(value))
            assert line["status"] == row.published.status and line["source"] == row.published.source
        if row.cell:
            assert float(line["ours"]) == pytest.approx(row.cell.mean) and line["n"] == str(len(row.cell.runs))
    (line,) = [line for line in read if line["difference"]]
    values = [84.3, 84.05, 84.4]
    assert float(line["std"]) == pytest.approx(statistics.stdev(values))
    assert float(line["difference"]) == pytest.approx(statistics.mean(values) - 84.1)
    assert (line["commit"], line["config"], line["checkpoint"]) == ("0123abc", WHOLE["config"], WHOLE["checkpoint"])
    assert (line["hardware"], line["date"], line["seed"]) == (WHOLE["device"], WHOLE["date"], "0, 1, 2")
    assert (line["training_images"], line["validation_images"]) == ("1281167", "50000")
    (line,) = [line for line in read if line["task"] == "k-NN"]
    assert (line["data_folder"], line["checkpoint"], line["commit"]) == (NEIGHBOURS["data"], "none", "unknown")


def test_the_warning_stands_below_the_figures_it_is_about(works):
    table = make_table([works], CATALOGUE)
    for name in ("md", "latex", "html"):
        text = FORMATS[name](table)
        (place,) = [match.start() for match in re.finditer(WARNING, text)]
        assert place > text.rindex("AP mask, gain over MAE")
        number = re.search(rf"Note (\d+): [^\n]*{WARNING}", text)[1]
        (line,) = [line for line in table_of[name](text) if line["Published"] == "51.3"]
        assert f"note {number}" in line["Remark"]
    (line,) = [line for line in csv_table(FORMATS["csv"](table)) if line["published"] == "51.3"]
    assert WARNING in line["notes"]


def test_only_tasks_that_were_measured_are_shown(works):
    tasks = {row.section[0] for row in make_table([works / "finetune"], CATALOGUE).rows}
    assert tasks == {"fine-tuning"}
    ours = make_table([works], CATALOGUE, published=False)
    assert len(ours.rows) == 5 and not ours.notes and all(row.published is None for row in ours.rows)


def command(*arguments):
    """The tool's whole run."""
    return tool("results_table.py", *arguments)


def test_command_prints_and_writes(works, tmp_path):
    done = command(works / "finetune", works / "detector")
    assert done.returncode == 0 and not done.stderr and "84.25 ± 0.18 (n = 3)" in done.stdout and WARNING in done.stdout
    for name, read in table_of.items():
        done = command(works, works / "detector", "--format", name, "--out", tmp_path / "table", "--no-published")
        assert done.returncode == 0 and not done.stdout, done.stderr
        text = (tmp_path / "table").read_text(encoding="utf-8")
        assert len(read(text)) == 5 and WARNING not in text and "84.1" not in text


def test_at_a_glance_each_encoder_has_a_line_with_all_its_figures(works):
    table = make_table([works], CATALOGUE)
    header, *lines = at_a_glance(table)
    by_method = {tuple(line[:3]): dict(zip(header, line, strict=True)) for line in lines}
    assert header[:3] == ["Method", "Backbone", "Pretraining epochs"] and len(lines) == len(by_method)
    ours = [row for row in csv_table(FORMATS["csv"](table)) if row["ours"]]
    seen = 0
    for row in ours:
        line = by_method[row["method"], row["backbone"], row["pretraining_epochs"]]
        figure = f"{float(row['ours']):.2f}" + (f" ± {float(row['std']):.2f}" if row["std"] else "")
        assert line[f"{row['task']}, {row['data']}: {row['metric']}"] == figure
        seen += 1
    assert seen == sum(bool(cell) for line in lines for cell in line[3:]) == 5
    printed = command(works, "--glance")
    assert printed.returncode == 0 and len(printed.stdout.splitlines()) == len(lines) + 2
    assert "84.25 ± 0.18" in printed.stdout and "84.1 " not in printed.stdout
    assert at_a_glance(make_table([works / "detector"], CATALOGUE)) == []
    one_line(command(works / "detector", "--glance"), "--glance compares encoders")


def test_at_a_glance_what_else_differs_is_told(works):
    write(works / "other", WHOLE, pretrain_options={"model.network.order": "raster"}, metrics={"top1": 80.0})
    write(works / "short", WHOLE, epochs=50, metrics={"top1": 81.0})
    header, *lines = at_a_glance(make_table([works / "finetune", works / "other", works / "short"], CATALOGUE))
    assert header == ["Changed", "fine-tuning, ImageNet-1k: top-1", "fine-tuning, ImageNet-1k: top-5"]
    assert sorted(lines) == [["", "84.25 ± 0.18; 81.00", "96.50 ± 0.00"], ["model.network.order=raster", "80.00", ""]]


def test_command_refuses_with_one_line(works, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/results.json").write_text('{"metrics": {"top1": 8')
    write(tmp_path / "other", {"loss": 1})
    write(tmp_path / "words", WHOLE, metrics={"top1": "84"})
    write(tmp_path / "list", WHOLE, train_images=[1])
    write(tmp_path / "nothing", WHOLE, metrics={"loss": 1.0})
    for arguments, message in (
        (["nowhere"], "no such folder: nowhere"),
        ([tmp_path / "empty"], f"no results.json in {tmp_path / 'empty'}"),
        ([tmp_path / "half"], f"no result can be read: {tmp_path / 'half/results.json'} is broken"),
        ([tmp_path / "other"], f"{tmp_path / 'other/results.json'} is none of our results"),
        ([tmp_path / "words"], "metrics.top1 is '84'"),
        ([tmp_path / "list"], "train_images is [1]"),
        ([tmp_path / "nothing"], "hold no figure"),
        ([works / "detector", "--out", tmp_path / "no/table"], f"cannot write {tmp_path / 'no/table'}"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and not done.stdout, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert command(works, "--format", "doc").returncode == 2 and command().returncode == 2


def test_overlapping_folders_count_once(works):
    assert len(find_results([works, works / "deep/../finetune", works / "finetune/0"])) == 5
    with pytest.raises(UserError, match="no such folder"):
        find_results([works / "detector/results.json"])


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"train_images": 500, "epochs": 30}, "reduced: 500 images, 30 epochs"),
        ({"train_images": 500}, "reduced: 500 images, 100 epochs"),
        ({"epochs": 99}, "reduced: 1,281,167 images, 99 epochs"),
        ({"val_images": 1000}, "reduced: 1,281,167 images, 100 epochs, validated on 1,000"),
        ({"pretrain_images": 900}, "reduced: 1,281,167 images, 100 epochs, pretrained on 900 images"),
        ({"epochs": 200}, "other than published: 1,281,167 images, 200 epochs"),
        ({"cfg_options": {"base_lr": 0.1, "num_workers": 2}}, "changed: base_lr=0.1"),
        ({"pretrain_options": {"base_lr": 0.1, "work_dir": "x"}}, "changed: pretraining's base_lr=0.1"),
        (
            {"pretrain_images": 14_000_000},
            "other than published: 1,281,167 images, 100 epochs, pretrained on 14,000,000 images",
        ),
        ({"cfg_options": {"train_cfg.max_epochs": 9}}, "changed: schedule"),
        ({"cfg_options": {"param_scheduler.warmup": 0.2}}, "changed: param_scheduler.warmup=0.2"),
        ({"overrides": {"base_lr": [0.1, 0.2]}}, "changed: base_lr overridden in mid-run"),
        ({"pretrain_epochs": 400}, "pretraining not ended: 400 of 800 epochs"),
        ({"config": "mine.py"}, "its config follows no published recipe"),
        ({"config": "mine/vit_base_100e.py"}, "changed: config mine/vit_base_100e.py"),
        ({"pretrain_config": "mine/lr.py"}, "changed: pretraining's config mine/lr.py"),
        ({"pretrain_config": None}, "not recorded: pretrain config"),
        ({"cfg_options": None, "method": None}, "not recorded: cfg options, method"),
        ({"pretrain_epochs": None, "pretrain_images": None}, "not recorded: pretrain epochs, pretrain images"),
        ({"train_images": None, "epochs": None}, "not recorded: train images, length of training"),
        (
            {"pretrain_epochs": 200, "pretrain_config": "of_200e.py"},
            "not compared with 83.8: pretraining epochs 200, published 400",
        ),
        ({"backbone": "ViT-S"}, "backbone ViT-S: published of SemAIM are ViT-B, ViT-L"),
    ],
    ids=str,
)
def test_nothing_is_compared_that_was_not_measured_alike(tmp_path, change, remark):
    """The row says why, in every format, and stands alone."""
    write(tmp_path / "a", WHOLE, **change)
    row = only(tmp_path)
    assert row.published is None and row.difference is None and remark in row.remarks
    table = make_table([tmp_path], CATALOGUE)
    assert remark in [line for line in table_of["csv"](FORMATS["csv"](table)) if line["ours"]][0]["remark"]
    for name in ("md", "latex", "html"):
        (line,) = [line for line in table_of[name](FORMATS[name](table)) if "84.30" in line["Ours"]]
        assert remark in line["Remark"] and line["Published"] == "" and line["Difference"] == ""
