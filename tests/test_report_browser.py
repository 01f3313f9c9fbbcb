"""The report in a real browser: nothing fails, overflows or leads nowhere, at three widths, light and dark."""

import json
import re

import numpy as np
import pytest
from browser import MISSING, browser, find_browser
from PIL import Image
from test_opening import KNN, PRETRAINED, SCRATCH
from test_report import LOG, put

from semaim.results.report import write_report

#: Elements that reach beyond the page, but not inside a box that scrolls.
BEYOND = """[...document.querySelectorAll("body *")].filter(it => {
    const box = it.getBoundingClientRect();
    return box.width && (box.right > document.documentElement.clientWidth + 1 || box.left < -1)
        && !it.closest(".scroll, pre") && it.checkVisibility();
}).map(it => it.tagName + " " + it.textContent.slice(0, 40))"""
#: Texts of the charts that stick out of them, or lie on each other.
CLIPPED = """[...document.querySelectorAll(".plot svg")].flatMap(svg => {
    const outer = svg.getBoundingClientRect(), boxes = [...svg.querySelectorAll("text")].map(it =>
        [it.textContent, it.getBoundingClientRect()]);
    return boxes.filter(([words, box], i) => box.left < outer.left - 1 || box.right > outer.right + 1
        || box.top < outer.top - 1 || box.bottom > outer.bottom + 1 || boxes.slice(i + 1).some(([, it]) =>
            box.left < it.right && it.left < box.right && box.top < it.bottom - 1 && it.top < box.bottom - 1)
    ).map(([words]) => words);
})"""
LOST = """[...document.querySelectorAll('a[href^="#"]')].filter(it =>
    !document.getElementById(it.getAttribute("href").slice(1))).map(it => it.outerHTML)"""
NAMELESS = """[...document.querySelectorAll("img, [role=img]")].filter(it =>
    !(it.getAttribute("alt") || it.getAttribute("aria-label"))).length"""
#: Contrast of all visible text to the page's ground, as WCAG 2 defines it: the smallest.
CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(it => it / 255)
            .map(it => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const found = [...document.querySelectorAll("body *")].filter(it => it.checkVisibility()
        && [...it.childNodes].some(node => node.nodeType == 3 && node.textContent.trim())).map(it => {
        const style = getComputedStyle(it), text = light(it instanceof SVGElement ? style.fill : style.color);
        return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    });
    return Math.min(...found);
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything that a report can show, some of it too long for a line."""
    works = tmp_path_factory.mktemp("works")
    long = "a_run_with_a_name_that_has_no_space_and_is_longer_than_a_phone_is_wide_" * 2
    ap = {"coco/bbox_mAP": 0.006, "coco/bbox_mAP_50": 0.02, "coco/bbox_mAP_s": -1.0, "coco/segm_mAP": 0.004}
    for seed, (name, origin) in enumerate([("s", PRETRAINED), ("m", PRETRAINED | {"method": "MAE"}), ("r", SCRATCH)]):
        tuned = {**KNN, "task": "detection", "config": "d.py", "stage": None, "iterations": 40, "metrics": ap} | origin
        put(works / name / "knn", {"results.json": {**KNN, "metrics": {"knn20_top1": 50.0 + seed}, **origin}})
        lines = [{"loss": 3 / (i + seed + 1), "iter": i, "lr": 1e-4 * i} for i in range(1, 41)]
        lines.insert(20, {**ap, "step": 0})
        scalars = "\n".join(map(json.dumps, [*lines, {**ap, "step": 1}]))
        files = {"results.json": tuned, "1/vis_data/scalars.json": scalars, "1/1.log": LOG.format(sky="99.73")}
        put(works / name / "detection", {**files, "config.py": "model = dict(" + "a=1, " * 200 + ")"})
        Image.new("RGB", (1400, 500), "teal").save(works / name / "detection/predictions.png")
    put(works / long, {"results.json": {**KNN, "metrics": {"knn20_top1": 5.0}, "data": "/data/" + 20 * "long"}})
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report([works], out, "A lead.")
    return out


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A tab of a browser that all tests share."""
    if find_browser() is None:
        pytest.skip(MISSING)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_in_a_browser(page, window, tmp_path):
    window.open(page)
    grounds = []
    for width in (400, 800, 1280):
        for dark in (False, True):
            window.look(width, dark)
            where = f"{width} px, {'dark' if dark else 'light'}"
            assert window.run("document.documentElement.scrollWidth <= innerWidth"), where
            assert window.run(BEYOND) == [] and window.run(CLIPPED) == [], where
            grounds.append(window.run("getComputedStyle(document.body).backgroundColor"))
            assert window.run(CONTRAST) >= 4.5, where
        assert window.run("document.querySelectorAll('.charts svg').length") >= 4
    assert len(set(grounds)) == 2
    assert window.run(LOST) == [] and window.run(NAMELESS) == 0
    assert window.run("document.querySelectorAll('nav a').length") >= 10
    # The contents lead to each run, also where its entry is folded away, and a wide table scrolls in its box.
    assert window.run(
        "[...document.querySelectorAll('article')].every(it => document.querySelector(`nav a[href='#${it.id}']`))"
    )
    window.look(800)
    assert window.run("[...document.querySelectorAll('.scroll')].some(it => it.scrollWidth > it.clientWidth)")
    # Printed, nothing is folded away or hangs over.
    window.look(700, media="print")
    assert window.run("[...document.querySelectorAll('article pre, article dl')].every(it => it.offsetHeight > 0)")
    assert window.run(BEYOND) == []
    window.look(400)
    picture = tmp_path / "page.png"
    window.shoot(picture, whole=False)
    assert np.asarray(Image.open(picture).convert("L")).std() > 5, "something is drawn"
    assert window.complaints == []


def test_the_checks_see_what_is_wrong(window, tmp_path):
    broken = tmp_path / "broken.html"
    script = "<script>console.error('told'); missing();</script><img src='http://localhost:1/none.png'>"
    chart = (
        "<div class=plot><svg viewBox='0 0 9 9'><text x=3 y=5>ab</text><text x=4 y=5 fill='#eee'>c</text></svg></div>"
    )
    broken.write_text(f"<!doctype html>{script}<p style='width: 2000px'>wide</p><a href='#nowhere'>x</a>{chart}")
    window.open(broken)
    window.look(400)
    told = "\n".join(window.complaints)
    assert "told" in told and "missing is not defined" in told and "loads http://localhost:1/none.png" in told
    assert window.run(BEYOND) and len(window.run(LOST)) == 1 and window.run(NAMELESS) == 1
    assert window.run(CLIPPED) and window.run(CONTRAST) < 1.3
    assert not window.run("document.documentElement.scrollWidth <= innerWidth")


def test_sections_are_in_the_order_of_the_pipeline(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(?:<[^>]*>)?([^<]+?) *<a", text)
    assert headings == ["In short", "Results", "k-NN", "Detection"]
    assert text.count('<svg viewBox="0 0 360 220"') == 4, "one for all runs of the stage, for each quantity"
    captions = text.count("<figcaption>")
    assert captions == text.count("<figure") and text.count("<table") == text.count("<caption>")
    assert "0.60 %" in text and "0.006" not in text.replace("&#34;", '"'), "percent, in every table"
    assert set(re.findall(r"AP box, small objects</dt><dd>([^<]*)", text)) == {"–"}, "COCO's -1"
    assert "nothing to measure, such as no object" in text
