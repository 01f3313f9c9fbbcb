"""The report as a browser reads it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import losses, one_line, tool
from PIL import Image

from semaim.drawing.curves import HEIGHT, WIDTH
from semaim.engine.results import write_results
from semaim.engine.training import train
from semaim.errors import UserError
from semaim.results import load_published
from semaim.results.logs import read_lines, read_scalars
from semaim.results.overlays import overlays_of
from semaim.results.parts import read_part
from semaim.results.pictures import pictures_of
from semaim.results.report import find_runs, write_report
from semaim.results.table import make_table, print_form

VOID = {"meta", "img", "br", "wbr", "hr", "input", "link"}
LOADING = ("src", "href", "srcset", "data", "poster", "action", "background", "xlink:href")


class Page(HTMLParser):
    """A page's tags, checked to close in the order they open, its links, and its text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.styles = [], [], [], "", ""
        self.lines, self.ids, self.alternatives = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        assert len(given) == len(attributes) and not [name for name in given if name.startswith("on")], attributes
        self.links += [given[name] for name in LOADING if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.lines += [given["d"]] if {"d", "clip-path"} <= set(given) and "var(--c" in given.get("style", "") else []
        self.alternatives += [given.get("alt")] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    @property
    def pictures(self):
        """The embedded pictures."""
        coded = [link.split(",", 1)[1] for link in self.links if link.startswith("data:image/")]
        return [Image.open(io.BytesIO(base64.b64decode(code))) for code in coded]


def checked(path):
    """The page, which loads nothing."""
    page = Page(path)
    assert len(set(page.ids)) == len(page.ids) and all(page.alternatives)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for link in page.links:
        assert link.startswith("data:image/") or link[0] == "#" and link[1:] in page.ids, link[:80]
    assert "url(" not in page.styles and "@import" not in page.styles and "http" not in page.styles
    assert "prefers-color-scheme: dark" in page.styles
    return page


def put(folder, files):
    """A run's folder with these files, by their path in it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


MEASURED = {"metrics": {"top1": 81.25, "top5": 96.5}, "config": "vit_base_100e.py", "checkpoint": "a/semaim/latest.pth"}
MEASURED |= {"data": "data/few", "train_images": 40, "val_images": 10, "seed": 3, "epochs": 2}


def test_report_of_real_runs(tiny_config, tmp_path):
    cfg = tiny_config("works/semaim", **{"default_hooks.pictures.interval": 1, "train_cfg.max_epochs": 4})
    train(cfg)
    work = Path(cfg.work_dir)
    other = tiny_config("works/deep/er/probe")
    write_results(other, {"top1": 61.5, "knn20_top1": 33.25, "loss": 0.5}, 40, 10, str(work / "latest.pth"))
    write_results(tiny_config("works/segments"), {"mIoU": 12.375, "aAcc": 40.5}, 40, 10, None, iterations=7)
    out = tmp_path / "new" / "report.html"
    done = tool("report.py", tmp_path / "works", "--out", out)
    assert done.returncode == 0 and f"wrote {out}" in done.stdout, done.stderr
    page = checked(out)
    for name in ("works/semaim", "works/deep/er/probe", "works/segments"):
        assert page.text.count(name) >= 2, "in the list, and over its own section"

    table = print_form(make_table([tmp_path / "works"], load_published()))
    ours = [row for row in table.rows if row[7]]
    assert len(ours) == 4
    for row in ours:
        assert all(cell in page.text for cell in row), row
    assert all(text in page.text for text in (*table.notes, *table.origins.values()))
    for figure in ("61.50 %", "33.25 %", "12.38 %", "40.50 %"):
        assert figure in page.text

    (config,) = work.glob("*.py")
    assert config.read_text() in page.text and page.tags.count("details") >= 2
    steps = losses(work)
    assert len(steps) == 20 and f"SemAIM: last {steps[20]:.4g}" in page.text
    points = np.array([list(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", page.lines[0])])
    assert len(points) == 20
    assert np.corrcoef(points[:, 1], list(steps.values()))[0, 1] < -0.999, "of an SVG the y axis points down"
    assert 0 <= points.min() and points[:, 0].max() <= WIDTH and points[:, 1].max() <= HEIGHT
    assert "iteration 20, epoch 4" in page.text and re.search(r"[\d,]+ MB", page.text)

    assert len(list((work / "orders").iterdir())) == 5
    names = ("epoch_0000", "epoch_0002", "epoch_0004")
    assert [name for name in (f"epoch_{n:04d}" for n in range(5)) if name in page.text] == list(names)
    for shown, name in zip(page.pictures, names, strict=True):
        original = Image.open(work / "orders" / f"{name}.png")
        assert shown.size == original.size
        assert np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(original, int)).mean() < 6


def test_hostile_names_and_contents_are_only_text(tmp_path):
    name = """<img src=x onerror=alert(1)>&"'{{ 7 * 7 }}"""
    text = "a = '</pre></details><script>alert(2)</script>'"
    content = {**MEASURED, "device": "<b>card</b>", "metrics": {"top1": 1.5, "<i>x</i>": 2.0}, "data": "</table><h1>"}
    folder = put(tmp_path / "works" / name, {"results.json": content, "config.py": text})
    Image.new("RGB", (30, 20)).save(folder / "<svg onload=alert(3)>.png")
    write_report([tmp_path / "works"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert page.tags.count("img") == 1 and page.tags.count("h1") == 1 and "b" not in page.tags and "i" not in page.tags
    for words in (name, text, "<b>card</b>", "<i>x</i>", "</table><h1>", "<svg onload=alert(3)>"):
        assert words in page.text, words
    assert "49" not in page.text.split("works/", 1)[1].split("alert(3)")[0].replace(name, "")


def test_missing_parts_are_left_out(tmp_path):
    works = tmp_path / "works"
    put(works / "measured", {"results.json": MEASURED})
    put(
        works / "started",
        {"1/vis_data/config.py": "task = 'pretrain'\nmodel = dict(type='Pretraining')", "1/1.log": ""},
    )
    put(works / "odd", {"1/vis_data/scalars.json": '{"loss": NaN, "iter": 1}\n[3]\n{"loss": 1.0, "it'})
    (works / "odd/orders").mkdir()
    (works / "odd/orders/epoch_0001.png").write_bytes(b"no picture")
    write_report([works], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert not page.pictures and not page.lines
    assert "svg" not in page.tags and "Orders" not in page.text and "Images/s:" not in page.text
    assert read_part(works / "started", "x", load_published()).stage == "pretraining"
    # Nothing measured: no table at all.
    write_report([works / "started", works / "odd"], tmp_path / "r.html")
    assert "results" not in checked(tmp_path / "r.html").ids
    # Measured, but nothing the table has: listed all the same.
    put(works / "other", {"results.json": {"metrics": {"something": 7.25}}})
    write_report([works / "other"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert "results" not in page.ids and "something" in page.text and "7.25" in page.text


def test_errors_are_one_line(here, tmp_path):
    out = ["--out", tmp_path / "r.html"]
    one_line(tool("report.py", tmp_path / "none", *out), "no such folder")
    (tmp_path / "empty").mkdir()
    one_line(here("report.py", tmp_path / "empty", *out), f"no run in {tmp_path / 'empty'}")
    put(tmp_path / "run", {"results.json": MEASURED})
    one_line(here("report.py", tmp_path / "run", "--out", tmp_path / "r.pdf"), "name a .html file")
    one_line(here("report.py", tmp_path / "run", "--out", tmp_path / "run/results.json/r.html"), "cannot write")
    put(tmp_path / "run", {"results.json": "{"})
    one_line(here("report.py", tmp_path / "run", *out), "results.json is broken")
    assert not (tmp_path / "r.html").exists()


def test_runs_are_found_and_told_apart(tmp_path, monkeypatch):
    for place in ("a/x", "b/a/x"):
        put(tmp_path / place, {"results.json": MEASURED})
    put(tmp_path / "a", {"2/vis_data/scalars.json": ""})
    assert list(find_runs([tmp_path / "a"]).values()) == ["a", "a/x"]
    both = find_runs([tmp_path / "a", tmp_path / "b/a", tmp_path / "a/x"])
    assert list(both) == [tmp_path / "a", tmp_path / "a/x", tmp_path / "b/a/x"] and len(set(both.values())) == 3
    monkeypatch.chdir(tmp_path / "a")
    assert list(find_runs([Path(".")]).values()) == ["a", "a/x"]
    with pytest.raises(UserError, match="no run in"):  # inside one
        find_runs([tmp_path / "a/2"])


LOG = """2026/01/02 03:04:05 - mmengine - INFO - torch 2.14.1 on 4 x NVIDIA H200; seed 0
2026/01/02 03:09:05 - mmengine - INFO - per class results:
2026/01/02 03:09:05 - mmengine - INFO -
+-------+-------+-------+
| Class |  IoU  |  Acc  |
+-------+-------+-------+
|  sky  | 82.35 | {sky} |
|  car  | 15.05 | 78.66 |
+-------+-------+-------+
2026/01/02 03:10:15 - mmengine - INFO - Evaluating bbox...
2026/01/02 03:10:15 - mmengine - INFO -
+----------+-------+--------+
| category | mAP   | mAP_50 |
+----------+-------+--------+
| dog      | 0.412 | 0.7    |
+----------+-------+--------+
2026/01/02 03:10:15 - mmengine - INFO - Evaluating segm...
2026/01/02 03:10:15 - mmengine - INFO -
+----------+-------+--------+
| category | mAP   | mAP_50 |
+----------+-------+--------+
| dog      | 0.311 | nan    |
+----------+-------+--------+
"""


def test_classes_time_and_memory_are_as_logged(tmp_path):
    lines = [{"loss": 3 - i, "iter": i, "images_per_second": 10.0 * i, "memory": 900 + i} for i in (1, 2, 3)]
    scalars = "\n".join(map(json.dumps, lines))
    put(tmp_path / "run", {"1/vis_data/scalars.json": scalars, "1/1.log": LOG.format(sky="11.11")})
    put(tmp_path / "run", {"2/2.log": LOG.format(sky="99.73"), "2/vis_data/scalars.json": ""})
    part = read_part(tmp_path / "run", "run", load_published())
    areas, boxes, masks = part.classes
    assert areas.title == "IoU, Acc of each class" and areas.head == ["class", "IoU, %", "Acc, %"]
    assert areas.rows == [["sky", "82.35", "99.73"], ["car", "15.05", "78.66"]], "the last logged"
    # mmdet logs shares of 1: in percent, as everywhere.
    assert boxes.title == "AP box of each class" and boxes.head == ["class", "AP box, %", "AP50 box, %"]
    assert boxes.rows == [["dog", "41.20", "70.00"]] and masks.rows == [["dog", "31.10", "–"]]
    assert part.facts == {
        "logged up to": "iteration 3",
        "time": "0:12:20",  # twice 3:04:05 to 3:10:15
        "images/s": "20.0",
        "memory": "903 MB",
        "device": "4 x NVIDIA H200",
    }
    write_report([tmp_path / "run"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert "99.73" in page.text and "31.10" in page.text and "903 MB" in page.text and "11.11" not in page.text


def test_lines_of_a_resumed_and_running_run(tmp_path):
    first = [{"loss": 9.0, "iter": i, "lr": 0.1} for i in (10, 20, 30)]
    first.insert(2, {"mIoU": 5.0, "step": 1})
    first.append({"mIoU": 6.0, "step": 2})
    second = [{"loss": 2.0, "iter": i, "lr": 0.1} for i in (30, 40)] + [{"mIoU": 7.0, "loss": 1.0, "step": 2}]
    for name, lines in (("1", first), ("2", second)):
        text = "\n".join(map(json.dumps, lines)) + ('\n{"loss": 8.0, "it' if name == "2" else "\n")
        put(tmp_path / "run", {f"{name}/vis_data/scalars.json": text})
    assert [(line["iter"], line["loss"]) for line in read_scalars(tmp_path / "run")] == [
        *((10, 9.0), (20, 9.0)),
        *((30, 2.0), (40, 2.0)),
    ]
    validations = [line for line in read_lines(tmp_path / "run") if "validation" in line]
    assert [(line["iter"], line["mIoU"]) for line in validations] == [(20, 5.0), (40, 7.0)]
    part = read_part(tmp_path / "run", "run", load_published())
    loss, rate, iou = overlays_of([part], "a", {})
    assert [chart.title for chart in (loss, rate, iou)] == ["Training loss", "Learning rate", "mIoU in validation, %"]
    assert iou.label.endswith("not recorded 7.00") and iou.below == "iteration", "its lines count no epochs"


def test_few_pictures_of_a_sane_size(tmp_path):
    folder = tmp_path / "run"
    (folder / "orders").mkdir(parents=True)
    (folder / "preds").mkdir()
    for i in (0, 5, 10, 20, 100):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"orders/epoch_{i}.png")
    for i in range(30):
        Image.new("RGB", (8, 8)).save(folder / f"preds/{i}.png")
    noise = np.random.default_rng(0).integers(0, 255, (300, 1700, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(folder / "wide.png")
    (folder / "preds/predictions.json").write_text("[]")
    (folder / "other").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "other/left_out.png")
    found = pictures_of(folder)
    names = {words: [picture.name for picture in pictures] for words, pictures in found.items()}
    assert names["Orders over training"] == ["epoch_0", "epoch_10", "epoch_100"]
    assert len(names["Predictions (preds)"]) == 6 and {"0", "29"} <= set(names["Predictions (preds)"])
    (wide,) = found["Pictures"]
    assert (wide.width, wide.height) == (1000, 176) and wide.source.startswith("data:image/jpeg")
    assert len(found) == 3
