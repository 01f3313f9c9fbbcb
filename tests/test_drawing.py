"""Pictures of tools/visualize.py against the model's own numbers, and charts."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from commands import one_line, tool
from PIL import Image

from semaim.checkpoints.files import read_checkpoint
from semaim.data.folder import centre_crops
from semaim.drawing.curves import POINTS, Curve, draw_chart, thinned
from semaim.drawing.encoder import draw_network, draw_orders, draw_reconstruction, draw_similarity
from semaim.drawing.panels import map_panels
from semaim.engine.config import load_config
from semaim.engine.pretraining import Pretraining, model_from_checkpoint
from semaim.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def drawn(svg):
    """The lines of a chart: (colour, width, points) of each, in the order they are drawn."""
    paths = re.findall(r'<path d="([^"]+)" clip-path[^>]*style="([^"]*var\(--c(\d)\)[^"]*)"', svg)
    found = []
    for path, style, colour in paths:
        width = re.search(r"stroke-width: ([\d.]+)", style)
        points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
        found.append((int(colour), float(width[1]) if width else 1.0, points))
    return found


def test_a_chart_of_two_methods_of_two_seeds():
    one, two, other = [(1, 2.0), (2, 4.0), (3, 3.0)], [(1, 4.0), (2, 2.0), (3, math.inf)], [(1, 8.0), (3, 0.5)]
    curves = [Curve("a", tuple(one)), Curve("b", tuple(other)), Curve("a", tuple(two))]
    chart = draw_chart(curves, "epoch", places={"z": 0, "a": 1, "b": 8})
    first, second = chart.keys
    assert (first.series, first.curves, first.last, first.colour, first.dash) == (
        "a",
        2,
        3.0,
        1,
        0,
    )  # at 2, the last that both have
    assert (second.series, second.curves, second.last, second.colour, second.dash) == ("b", 1, 0.5, 2, 1)
    lines = drawn(chart.svg)
    assert [(colour, width) for colour, width, _ in lines] == [(1, 1.0), (1, 1.0), (1, 2.0), (2, 2.0)]
    (left, top), (right, bottom) = lines[3][2]  # 8 and 0.5, at the ends of x

    def value(point):
        return 8 - 7.5 * (point[1] - top) / (bottom - top)

    assert [value(point) for point in lines[0][2]] == pytest.approx([2, 4, 3], abs=0.02)
    assert [value(point) for point in lines[1][2]] == pytest.approx([4, 2], abs=0.02), "what is infinite is left out"
    assert [value(point) for point in lines[2][2]] == pytest.approx([3, 3], abs=0.02), "the mean, at the x of both"
    assert [point[0] for point in lines[0][2]] == pytest.approx([left, (left + right) / 2, right], abs=0.02)
    page = ElementTree.fromstring(chart.svg)
    words = [node.text for node in page.iter("text")]
    assert "epoch" in words and {"1", "2", "3"} <= set(words), "text stays text"
    assert "#" not in re.sub(r'(url\(|")#[^")]+', "", chart.svg), "all colours are the page's"


def test_charts_without_points_and_with_many():
    assert draw_chart([], "x") is None and draw_chart([Curve("a", ()), Curve("b", ((1, math.nan),))], "x") is None
    many = [(i, float(i % 7)) for i in range(1, 5002)]
    few = thinned(many)
    assert POINTS / 2 < len(few) <= POINTS and few[-1][0] == 5001
    step = few[-1][0] - few[-2][0]
    assert few[-1][1] == pytest.approx(sum(y for _, y in many[-step:]) / step)
    assert thinned(few) == few
    chart = draw_chart([Curve("a", tuple(many)), Curve("b", ((1, 2.0), (3, 1e300)))], "x", logarithms=True)
    assert chart.averaged and chart.keys[1].last == 2.0
    assert 50 < len(drawn(chart.svg)[0][2]) <= len(few), "matplotlib leaves out points that lie on the line"
    spread = draw_chart([Curve("a", ((1, 1000.0), (2, 1.0), (3, 10.0)))], "x", logarithms=True)
    heights = [y for _, y in drawn(spread.svg)[0][2]]
    assert (heights[1] - heights[2]) / (heights[1] - heights[0]) == pytest.approx(1 / 3, abs=0.01)


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


class Stranger(torch.nn.Module):
    """A method that drawing has never heard of: it predicts black, and says in its output what it holds."""

    patch_size, target = (16, 8), SimpleNamespace(norm_pix=False)

    def __init__(self, **fields):
        super().__init__()
        self.weight, self.fields = torch.nn.Parameter(torch.zeros(1)), fields

    def grid_of(self, size):
        return size[0] // 16, size[1] // 8

    def forward(self, images, draw):
        return SimpleNamespace(prediction=torch.full((len(images), draw.shape[1], 384), -9.0), **self.fields)


def stranger(**fields):
    """Its model."""
    return SimpleNamespace(
        network=Stranger(**fields),
        data_preprocessor=pretraining("SemAIM").data_preprocessor,
        autocast=lambda device: torch.autocast(device.type, enabled=False),
    )


def test_any_method_is_drawn_by_what_its_output_holds():
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1]])  # 2 x 4 patches of 16 x 8 pixels
    picture = draw_reconstruction(stranger(mask=mask), images)
    assert picture.width == 480
    for column, colour in ((1, 127.5), (2, 0)):
        square = cell(picture, column, 3)
        step = len(square) / 4
        seen = np.array([square[round((2 * y + 1) * step), round((x + 0.5) * step)] for y in (0, 1) for x in range(4)])
        expected = np.where(mask[0].numpy()[:, None] == 1, colour, 200)
        assert np.abs(seen - expected).max() < 2
    order = torch.arange(8).flip(0)[None]
    assert draw_reconstruction(stranger(order=order), images).width == 480, "image, order, prediction"
    assert draw_reconstruction(stranger(), images).width == 320, "image, prediction"
    drawn = draw_orders(stranger(order=order, similarity=None), images)
    part = np.asarray(drawn).astype(int)[60:, 160:320].sum(-1)  # below the column's name: a map of 4 x 2 squares
    rows, lines = (np.nonzero((part < 765).any(axis))[0] for axis in (1, 0))
    part = part[rows[0] : rows[-1] + 1, lines[0] : lines[-1] + 1]
    assert drawn.width == 480 and part[-3, -3] > part[-3, 3] > part[3, -3] > part[3, 3], "the last patch comes first"
    with pytest.raises(UserError, match="Stranger predicts in no order"):
        draw_orders(stranger(mask=mask), images)
    # A look of its own, given the images as they are, the normalised ones' statistics, and the same numbers every time.
    given = []

    def look(network, images, draw, normaliser):
        given.append(draw)
        torch.testing.assert_close(normaliser.denormalise(normaliser.normalise(images)), images / 255)
        assert not (torch.is_grad_enabled() or network.training)
        return {"one": map_panels(draw, network.grid_of(images.shape[-2:]))}

    model = stranger()
    assert draw_network(model, images, look=look) == draw_network(model, images, look=look)
    assert model.network.training and given[0].shape == (1, 8) and (given[0] == given[1]).all()


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

    from semaim.drawing.objects import colour_of, draw_classes
    from semaim.engine.dense import build, enter
    from semaim.engine.predicting import build_pipeline, predict

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
