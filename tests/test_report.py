"""The report as a browser reads it, and the pictures of tools/visualize.py against the model's own numbers."""

import base64
import importlib.util
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import losses, one_line, tool
from PIL import Image

from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops
from semaim.drawing.pictures import draw_orders, draw_reconstruction, draw_similarity, read_lines, read_scalars
from semaim.engine.config import load_config
from semaim.engine.pretraining import Pretraining, model_from_checkpoint
from semaim.engine.results import write_results
from semaim.engine.training import train
from semaim.errors import UserError, run
from semaim.results import load_published
from semaim.results.charts import BOTTOM, HEIGHT, TOP, charts_of, make_chart, ticks
from semaim.results.report import find_runs, pictures_of, read_part, write_report
from semaim.results.table import in_words, make_table

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "img", "br", "hr", "input", "link"}
LOADING = ("src", "href", "srcset", "data", "poster", "action", "background", "xlink:href")


class Page(HTMLParser):
    """A page's tags, checked to close in the order they open, its links, and its text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.styles = [], [], [], "", ""
        self.polylines, self.ids = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        assert len(given) == len(attributes) and not [name for name in given if name.startswith("on")], attributes
        self.links += [given[name] for name in LOADING if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.polylines += [given["points"]] if tag == "polyline" else []
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
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for link in page.links:
        assert link.startswith("data:image/") or link[0] == "#" and link[1:] in page.ids, link[:80]
    assert "url(" not in page.styles and "@import" not in page.styles and "http" not in page.styles
    assert "prefers-color-scheme: dark" in page.styles
    return page


@pytest.fixture
def here(monkeypatch, capsys):
    """A tool in this process, which saves the seconds of imports."""

    def start(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"tools_{name[:-3]}", ROOT / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = run(module.main)
        done = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=done.out, stderr=done.err)

    return start


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

    table = in_words(make_table([tmp_path / "works"], load_published()))
    ours = [row for row in table.rows if row[7]]
    assert len(ours) == 4
    for row in ours:
        assert all(cell in page.text for cell in row), row
    assert all(text in page.text for text in (*table.notes, *table.origins.values()))
    for figure in ("61.5", "33.25", "12.375", "40.5"):
        assert figure in page.text

    (config,) = work.glob("*.py")
    assert config.read_text() in page.text and page.tags.count("details") >= 2
    steps = losses(work)
    assert len(steps) == 20 and f"loss {steps[20]:.4g}" in page.text
    points = [tuple(map(float, point.split(","))) for point in page.polylines[0].split()]
    assert len(points) == 20
    heights = np.array([y for _, y in points])
    assert np.corrcoef(heights, list(steps.values()))[0, 1] < -0.999, "of an SVG the y axis points down"
    assert TOP <= heights.min() and heights.max() <= HEIGHT - BOTTOM
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
    put(works / "started", {"1/vis_data/config.py": "model = dict(type='Pretraining')", "1/1.log": ""})
    put(works / "odd", {"1/vis_data/scalars.json": '{"loss": NaN, "iter": 1}\n[3]\n{"loss": 1.0, "it'})
    (works / "odd/orders").mkdir()
    (works / "odd/orders/epoch_0001.png").write_bytes(b"no picture")
    write_report([works], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert not page.pictures and not page.polylines
    assert "Curves" not in page.text and "Orders" not in page.text and "Images/s:" in page.text
    assert read_part(works / "started", "x", load_published()).stage == "pretraining"
    # Nothing measured: no table at all.
    write_report([works / "started", works / "odd"], tmp_path / "r.html")
    assert "results" not in checked(tmp_path / "r.html").ids
    # Measured, but nothing the table has: listed all the same.
    put(works / "other", {"results.json": {"metrics": {"something": 7.25}}})
    write_report([works / "other"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert "results" not in page.ids and "something 7.25" in page.text


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
    assert [table.title.split(" of ")[0] for table in part.classes] == ["IoU, Acc", "box AP", "mask AP"]
    assert part.classes[0].rows == [["sky", "82.35", "99.73"], ["car", "15.05", "78.66"]], "the last logged"
    assert part.classes[1].rows[0][1] == "0.412" and part.classes[2].rows == [["dog", "0.311", "nan"]]
    assert part.facts == {
        "logged up to": "iteration 3",
        "time": "0:12:20",  # twice 3:04:05 to 3:10:15
        "images/s": "20.0",
        "memory": "903 MB",
        "device": "4 x NVIDIA H200",
    }
    write_report([tmp_path / "run"], tmp_path / "r.html")
    page = checked(tmp_path / "r.html")
    assert "99.73" in page.text and "0.311" in page.text and "903 MB" in page.text and "11.11" not in page.text


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
    charts = {chart.title: chart for chart in charts_of(read_lines(tmp_path / "run"))}
    assert list(charts) == ["training loss", "learning rate", "validation: segmentation, %"]
    assert charts["validation: segmentation, %"].lines[0].name == "mIoU 7"


def test_charts():
    assert ticks(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1] and ticks(3.0, 3.0)[0] < 3 < ticks(3.0, 3.0)[-1]
    for low, high in ((-1.0, 3e5), (0.301, 0.3012), (0.0, 0.0), (-5.0, -5.0)):
        found = ticks(low, high)
        assert found[0] <= low and high <= found[-1] and 2 <= len(found) <= 8
    assert make_chart("x", "y", {"nothing": [], "nan": [(1, float("nan"))]}) is None
    many = make_chart("x", "y", {"line": [(i, float(i % 7)) for i in range(5001)]})
    points = many.lines[0].points.split()
    assert 200 < len(points) <= 400 and not many.lines[0].dots and many.lines[0].name == f"line {5000 % 7}"
    few = make_chart("x", "y", {"line": [(1, 2.0), (2, float("inf")), (3, 4.0)]})
    (left, low), (right, high) = few.lines[0].dots
    assert left < right and low > high


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


# Pictures of tools/visualize.py


def cell(picture, column, columns):
    """The drawn square of a column of a picture of one image."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    side = pixels.shape[1] // columns
    part = pixels[:, column * side : (column + 1) * side]
    drawn = (part < 255).any(-1)
    rows, lines = np.nonzero(drawn.mean(1) > 0.6)[0], np.nonzero(drawn.mean(0) > 0.5)[0]
    return part[rows[0] : rows[-1] + 1, lines[0] : lines[-1] + 1]


def patches(square, grid=4):
    """The colour of each patch, beside the cross in its middle: (L, 3)."""
    step = len(square) / grid
    starts = [round((place + 0.2) * step) for place in range(grid)]
    return np.array([square[row, column] for row in starts for column in starts])


def brightest(square):
    """The patch of the highest sum of channels, which both colour maps rise in."""
    return int(patches(square).sum(-1).argmax())


@pytest.fixture
def looked(pretrained, scenes, tmp_path):
    """The pretrained network, an image as it sees it, and a function that runs a kind of picture on it."""
    model = model_from_checkpoint(read_checkpoint(pretrained))
    path = sorted((scenes / "val").rglob("*.jpg"))[3]
    image = centre_crops([str(path)], 32)

    def draw(kind, *options):
        out = tmp_path / "new" / f"{kind}.png"
        done = tool("visualize.py", kind, pretrained, path, *options, "--out", out)
        assert done.returncode == 0 and f"wrote {out}" in done.stdout, done.stderr
        return Image.open(out)

    return SimpleNamespace(
        network=model.network, image=image, seen=model.data_preprocessor.normalise(image), draw=draw, path=path
    )


def whole(network, seen):
    """Tokens of the whole image, and the input of the last attention, by the blocks alone."""
    tokens = network.embed(seen)
    for block in network.blocks[:-1]:
        tokens = block(tokens)
    last = network.blocks[-1]
    return network.norm(last(tokens)), last.norm1(tokens)


@torch.no_grad()
def test_attention_picture(looked):
    picture = looked.draw("attention")
    assert picture.width == 480
    attention = looked.network.blocks[-1].attn
    query, key, _ = attention.qkv(whole(looked.network, looked.seen)[1]).view(17, 3, 2, 16).unbind(1)
    weights = torch.einsum("hd,nhd->hn", query[0], key).div(4).softmax(-1).mean(0)[1:]
    colours = patches(cell(picture, 1, 3))
    assert brightest(cell(picture, 1, 3)) == weights.argmax() and colours.sum(-1).argmin() == weights.argmin()
    assert np.corrcoef(colours.sum(-1), weights)[0, 1] > 0.8


@torch.no_grad()
def test_similarity_picture(looked):
    picture = looked.draw("similarity")
    assert picture.width == 640
    tokens = torch.nn.functional.normalize(whole(looked.network, looked.seen)[0][0], dim=-1)
    to_class = tokens[1:] @ tokens[0]
    centre = int(to_class.argmax())
    to_centre = tokens[1:] @ tokens[1 + centre]
    for column, expected in ((1, to_class), (2, to_centre)):
        square = cell(picture, column, 4)
        colours = patches(square).sum(-1)
        assert brightest(square) == centre and colours.argmin() == expected.argmin()
        row, line = (round((place + 0.5) * len(square) / 4) for place in divmod(centre, 4))
        assert square[row - 2 : row + 3, line - 2 : line + 3].min() < 60, "the cross on the centre"
    assert int(to_class.argmin()) != centre


@torch.no_grad()
def test_orders_side_by_side(looked):
    picture = looked.draw("order", "--compare")
    assert picture.width == 800
    tokens = whole(looked.network, looked.seen)[0][0]
    similarity = torch.cosine_similarity(tokens[:1], tokens[1:])
    raster, stochastic, by_similarity, semantic = (patches(cell(picture, column, 5)).sum(-1) for column in range(1, 5))
    assert (np.diff(raster) < 0).all()
    assert not (np.diff(stochastic) < 0).all() and len(set(stochastic.tolist())) == 16
    assert by_similarity.argsort()[::-1].tolist() == similarity.argsort(descending=True).tolist()
    centre = int(similarity.argmax())
    distance = [(p // 4 - centre // 4) ** 2 + (p % 4 - centre % 4) ** 2 for p in range(16)]
    walked = np.array(distance)[semantic.argsort()[::-1]]
    assert (np.diff(walked) >= 0).all() and walked[0] == 0


@torch.no_grad()
def test_reconstruction_picture(looked):
    picture = looked.draw("reconstruction")
    assert picture.width == 480
    order = torch.tensor(patches(cell(picture, 1, 3)).sum(-1).argsort()[::-1].copy())[None]
    # (3, 4 rows, 8, 4 columns, 8) -> (16 patches, 8 x 8 x 3): each has its own mean and variance
    truth = looked.seen[0].view(3, 4, 8, 4, 8).permute(1, 3, 2, 4, 0).reshape(16, -1)
    expected = looked.network.predict(looked.seen, order)[0] * truth.var(-1, keepdim=True).sqrt() + truth.mean(-1, True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected.view(4, 4, 8, 8, 3) * std + mean).clamp(0, 1).permute(0, 2, 1, 3, 4).reshape(32, 32, 3) * 255
    square = cell(picture, 2, 3)
    middles = ((np.arange(32) + 0.5) * len(square) / 32).astype(int)
    wrong = np.abs(square[middles][:, middles] - expected.numpy())
    assert np.median(wrong) < 1.5 and wrong.mean() < 4 and expected.std() > 20


def pretraining(kind, **more):
    """A small network that was never trained."""
    target = more.pop("target", {"type": "PixelTarget", "blur_kernel": 0})
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "target": target}
    torch.manual_seed(0)
    return Pretraining({"type": kind, **size, **more})


def test_pictures_of_mae():
    model = pretraining("MAE", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).train()
    image = torch.randint(30, 220, (1, 3, 32, 32), dtype=torch.uint8)
    picture = draw_reconstruction(model, image)
    assert model.network.training and picture.width == 480
    original, masked, rebuilt = (cell(picture, column, 3) for column in range(3))
    side = min(map(len, (original, masked, rebuilt)))
    step = side / 4
    equal, grey = 0, 0
    for row in range(4):
        for column in range(4):
            inside = np.s_[round(row * step) + 2 : round((row + 1) * step) - 2, round(column * step) + 2 :]
            inside = (*inside[:1], slice(inside[1].start, round((column + 1) * step) - 2))
            is_grey = (np.abs(masked[inside] - 127.5) < 2).all()
            grey += is_grey
            same = np.abs(rebuilt[inside] - original[inside]).mean() < 2
            equal += same
            assert same != is_grey, "what it sees is left as it is, the rest is its own"
    assert (grey, equal) == (12, 4)
    assert draw_similarity(model, image).width == 640
    with pytest.raises(UserError, match="MAE predicts in no order"):
        draw_orders(model, image)
    features = pretraining("SemAIM", target={"type": "FeatureTarget"})
    with pytest.raises(UserError, match="predicts features, not pixels"):
        draw_reconstruction(features, image)


def test_a_checkpoint_of_mae_is_drawn(here, looked, tmp_path):
    more = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = {"type": "MAE", **size, **more, "target": {"type": "PixelTarget", "blur_kernel": 0}}
    content = {"format": "semaim", "epoch": 1, "config": {"model": {"type": "Pretraining", "network": network}}}
    torch.save({**content, "model": pretraining("MAE", **more).network.state_dict()}, tmp_path / "mae.pth")
    done = here("visualize.py", "reconstruction", tmp_path / "mae.pth", looked.path, "--out", tmp_path / "m.png")
    assert done.returncode == 0 and Image.open(tmp_path / "m.png").width == 480, done.stderr
    one_line(here("visualize.py", "order", tmp_path / "mae.pth", looked.path, "--out", tmp_path / "o.png"), "no order")


def test_visualize_errors(here, pretrained, looked, tmp_path):
    out = ["--out", tmp_path / "x.png"]
    one_line(here("visualize.py", "attention", pretrained, tmp_path / "no.jpg", *out), "no.jpg: no such file")
    one_line(here("visualize.py", "similarity", tmp_path / "no.pth", looked.path, *out), "no such checkpoint")
    one_line(here("visualize.py", "order", pretrained, looked.path, "--out", tmp_path / "x.txt"), "name a .png")
    one_line(here("visualize.py", "order", pretrained, looked.path, "--most", 0, *out), "give 1 or more")
    blocked = ["--out", looked.path / "x.png"]
    one_line(here("visualize.py", "attention", pretrained, looked.path, *blocked), "cannot write --out")
    config = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"
    arguments = ["predictions", pretrained, "--config", config]
    one_line(here("visualize.py", *arguments, *out), "is no detector's or segmentor's config")
    one_line(here("visualize.py", *arguments, *out, "--score-thr", 2), "give a number from 0 to 1")
    assert not (tmp_path / "x.png").exists()


SMALL = {"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "model.backbone.depth": 4}
CASES = {
    "coco": ("mmdet_configs/semaim_mask_rcnn_scenes.py", SMALL | {"model.neck.in_channels": 32}),
    "ade": (
        "mmseg_configs/semaim_upernet_scenes.py",
        SMALL
        | {
            "model.neck.embed_dim": 32,
            "model.decode_head.in_channels": [32] * 4,
            "model.auxiliary_head.in_channels": 32,
        },
    ),
}


@pytest.mark.parametrize("kind", ["coco", "ade"])
def test_predictions_picture(kind, here, scenes, tmp_path):
    pytest.importorskip(
        "mmdet" if kind == "coco" else "mmseg",
        reason="mmdet or mmsegmentation is not installed: runs after tools/setup.sh --extras all",
    )
    from mmengine.registry import MODELS

    from semaim.drawing.prediction import build_pipeline, colour_of, draw_classes, predict
    from semaim.engine.dense import build, enter

    data, (file, small) = scenes.parent / kind, CASES[kind]
    cfg = load_config(ROOT / file, small)
    enter(cfg)
    torch.manual_seed(0)
    model = build(cfg.model, MODELS, "model").eval()
    weights = tmp_path / "latest.pth"
    torch.save({"format": "semaim", "model": model.state_dict()}, weights)
    folder = data / ("val2017" if kind == "coco" else "images/validation")
    paths = sorted(folder.glob("*.jpg"))[:2]
    options = ["--config", ROOT / file, "--data-root", data, "--score-thr", 0.99]
    options += ["--cfg-options", *(f"{key}={value}".replace(" ", "") for key, value in small.items())]
    out = tmp_path / "p.png"
    start = tool if kind == "coco" else here
    done = start("visualize.py", "predictions", weights, *paths, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(out)).astype(int)
    tops = [27, 27 + 504]  # gaps of 6, lines of 24, images enlarged to 480
    if kind == "coco":
        assert picture.shape == (2 * 504 + 30, 2 * 480 + 18, 3)
        coco = json.loads((data / "annotations/instances_val2017.json").read_text())
        places = {category["id"]: place for place, category in enumerate(coco["categories"])}
        numbers = {image["file_name"]: image["id"] for image in coco["images"]}
        for path, top in zip(paths, tops, strict=True):
            plain = np.asarray(Image.open(path).convert("RGB").resize((480, 480), Image.Resampling.BICUBIC)).astype(int)
            assert (picture[top : top + 480, 492:972] == plain).all(), "nothing is found so surely"
            objects = [it for it in coco["annotations"] if it["image_id"] == numbers[path.name]]
            assert objects
            left = picture[top : top + 480, 6:486]
            for it in objects:
                x, y, width, height = (round(15 * side) for side in it["bbox"])
                edges = left[y + height - 1, x : x + width], left[y : y + height, x + width - 1]
                same = [(edge == colour_of(places[it["category_id"]])).all(-1).mean() for edge in edges]
                assert max(same) > 0.5, it["bbox"]
    else:
        for path, top in zip(paths, tops, strict=True):
            truth = np.asarray(Image.open(data / "annotations/validation" / f"{path.stem}.png")).astype(int) - 1
            truth[truth < 0] = 255
            image, sample = predict(model, build_pipeline(cfg), str(path))
            maps = truth, sample.pred_sem_seg.data[0].numpy()
            for left, classes in zip((6, 492), maps, strict=True):
                expected = np.asarray(draw_classes(image, classes, 21, 15.0)).astype(int)
                assert (picture[top : top + 480, left : left + 480] == expected).all()
        line = ["visualize.py", "predictions", weights, *paths, "--columns", 2, "--out", out, *options]
        assert here(*line).returncode == 0
        wide = np.asarray(Image.open(out)).astype(int)  # the second pair beside the first: 2 x 480 and three gaps on
        for place, top in enumerate(tops):
            assert (wide[27:507, 978 * place + 6 : 978 * (place + 1)] == picture[top : top + 480, 6:978]).all()
        one_line(here("visualize.py", "predictions", weights, "--columns", 0, "--out", out, *options), "--columns 0")
    stray = sorted(scenes.rglob("*.jpg"))[0]
    one_line(here("visualize.py", "predictions", weights, stray, "--out", out, *options), "is none of the 10 annotated")
