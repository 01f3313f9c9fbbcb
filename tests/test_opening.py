"""What a report opens with: differences with their intervals, from results.json files written by hand."""

import json
import math
from fractions import Fraction

import pytest
from PIL import Image
from test_report import checked, put

from semaim.results import load_published
from semaim.results.difference import difference
from semaim.results.opening import make_opening
from semaim.results.report import write_report

KNN = {"task": "k-NN", "config": "k.py", "data": "d/classes", "val_images": 300, "train_images": 1200, "seed": 0}
KNN |= {"stage": "NearestNeighbours", "cfg_options": {}}
PRETRAINED = {"method": "SemAIM", "pretrain_epochs": 30, "pretrain_images": 900, "checkpoint": "w/s/pretrain/e.pth"}
SCRATCH = {"method": None, "checkpoint": None}


# The interval.


def test_a_published_example():
    # 7 of 34 and 1 of 34 (Perondi et al. 2004): 8/36 - 2/36 = 1/6, variance (8 x 28 + 2 x 34) / 36^3.
    found = difference(100 * 7 / 34, 34, 100 * 1 / 34, 34)
    half = 1.959963984540054 * math.sqrt((8 * 28 + 2 * 34) / 36**3)
    assert found.points == pytest.approx(100 * 6 / 34)
    assert (found.low, found.high) == pytest.approx((100 * (1 / 6 - half), 100 * (1 / 6 + half)))
    assert (round(found.low, 1), round(found.high, 1), found.side) == (1.2, 32.2, 1)
    other = difference(100 * 1 / 34, 34, 100 * 7 / 34, 34)
    assert (other.low, other.high, other.side) == (pytest.approx(-found.high), pytest.approx(-found.low), -1)
    assert difference(50, 34, 50, 34).side == 0 and difference(100, 10, 100, 10).high > 5
    for wrong in ((101, 5, 1, 5), (1, 0, 1, 5), (math.nan, 5, 1, 5)):
        with pytest.raises(ValueError, match="give 0 to 100"):
            difference(*wrong)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Every outcome of two binomials, weighed by its exact probability."""

    def chances(images, share):
        share = Fraction(share)
        return [float(math.comb(images, k) * share**k * (1 - share) ** (images - k)) for k in range(images + 1)]

    for first, second in (("9/10", "7/10"), ("1/2", "1/2"), ("99/100", "9/10")):
        truth, held = 100 * float(Fraction(first) - Fraction(second)), 0.0
        for i, p in enumerate(chances(40, first)):
            for j, q in enumerate(chances(30, second)):
                found = difference(100 * i / 40, 40, 100 * j / 30, 30)
                held += p * q * (found.low <= truth <= found.high)
        assert 0.94 < held < 0.99, (first, second, held)


# The opening.


def opened(tmp_path, files):
    """The opening of these results.json by folder, and the page."""
    for name, content in files.items():
        put(tmp_path / "w" / name, {"results.json": content})
    write_report([tmp_path / "w"], tmp_path / "r.html", "A lead with <b>signs</b>.")
    page = checked(tmp_path / "r.html")
    opening = make_opening(sorted((tmp_path / "w").rglob("results.json")), load_published())
    assert ("short" in page.ids) == (opening is not None) and "A lead with <b>signs</b>." in page.text
    if opening:
        for line in opening.lines:
            words = [line.measure, *line.figures, *(it.words for it in line.differences)]
            assert all(text in page.text for text in words), words
        assert all(text in page.text for text in (*opening.verdicts, *opening.centres))
        assert page.text.index("In short") < page.text.index("Results")
    return opening, page


def knn(right, **more):
    """A results.json of k-NN with so many of 300 images right."""
    return {**KNN, "metrics": {"knn10_top1": 1.0, "knn20_top1": 100 * right / 300}, **more}


def test_what_is_sure_and_what_is_not(tmp_path):
    tuned = {**KNN, "task": "fine-tuning", "config": "f.py", "stage": None, "epochs": 5}
    detector = {**tuned, "task": "detection", "config": "d.py", "epochs": None, "iterations": 400}
    ap = {"coco/bbox_mAP": 0.2, "coco/bbox_mAP_50": 0.456, "coco/segm_mAP": 0.1, "coco/segm_mAP_50": -1.0}
    opening, page = opened(
        tmp_path,
        {
            "s/knn": knn(240, **PRETRAINED),
            "r/knn": knn(120, **SCRATCH),
            "s/tune": {**tuned, "metrics": {"top1": 70.0, "top5": 99.0}, **PRETRAINED},
            "r/tune": {**tuned, "metrics": {"top1": 68.0, "top5": 9.0}, **SCRATCH},
            "s/det": {**detector, "metrics": ap, **PRETRAINED},
            "r/det": {**detector, "metrics": ap | {"coco/bbox_mAP_50": 0.4}, **SCRATCH},
        },
    )
    assert opening.encoders == ["SemAIM", "random weights"]
    rows = {line.measure: (line.figures, *line.differences) for line in opening.lines}
    assert list(rows) == ["k-NN, k = 20", "fine-tuning, top-1", "box AP", "box AP50", "mask AP"]
    # 241/302 - 121/302 = 0.397351; half width 1.96 sqrt((241 x 61 + 121 x 181) / 302^3) = 0.071459
    figures, judged = rows["k-NN, k = 20"]
    assert figures == ["80.0", "40.0"] and (judged.words, judged.side) == (
        "+40.0 (95 %: +32.6 to +46.9 over 300 images, unpaired)",
        1,
    )
    # 211/302 - 205/302 = 0.019868; half width 1.96 sqrt((211 x 91 + 205 x 97) / 302^3) = 0.073764
    figures, judged = rows["fine-tuning, top-1"]
    assert (judged.words, judged.side) == ("+2.0 (95 %: -5.4 to +9.4 over 300 images, unpaired): cannot tell", 0)
    assert rows["box AP50"][0] == ["45.6", "40.0"] and rows["box AP50"][1].words == "+5.6 (no interval)"
    wrong = {name: {**KNN, **origin, "metrics": {"knn20_top1": 400.0}} for name, origin in
             (("x/s", PRETRAINED), ("x/r", SCRATCH))}  # fmt: skip
    assert opened(tmp_path / "wrong", wrong)[0].lines[0].differences[0].words == "+0.0 (no interval)"
    (told,) = opening.verdicts
    assert told.endswith("above random weights in k-NN (for these weights); cannot tell in fine-tuning.")


def test_no_opening_without_random_weights_of_the_same(tmp_path):
    files = {"s/knn": knn(240, **PRETRAINED), "m/knn": knn(200, **PRETRAINED | {"method": "MAE"})}
    assert opened(tmp_path, files)[0] is None
    # Of other data, another config, other options, fewer images or another k.
    other = knn(120, **SCRATCH)
    files |= {"r1/knn": {**other, "data": "e/classes"}, "r2/knn": {**other, "config": "other.py"}}
    files |= {"r3/knn": {**other, "cfg_options": {"evaluation.k": [5]}}, "r4/knn": {**other, "val_images": 200}}
    files |= {"r5/knn": {**other, "metrics": {"knn10_top1": 50.0}}, "r6/knn": {**other, "partly_loaded": "3 left"}}
    assert opened(tmp_path, files)[0] is None
    opening, _ = opened(tmp_path, files | {"r/knn": {**other, "cfg_options": {"seed": 0, "num_workers": 0}}})
    assert opening.encoders == ["MAE", "SemAIM", "random weights"] and len(opening.lines) == 1
    assert opening.headings == ["Difference of MAE", "Difference of SemAIM"]
    assert [it.words[:5] for it in opening.lines[0].differences] == ["+26.7", "+40.0"]
    # Two data sets are two lines, which are told apart.
    files |= {"t/knn": knn(150, **PRETRAINED, data="e/few"), "r7/knn": knn(150, **SCRATCH, data="e/few")}
    opening, _ = opened(tmp_path, files)
    assert sorted(line.measure for line in opening.lines) == [
        "k-NN, k = 20 (classes, k.py)",
        "k-NN, k = 20 (few, k.py)",
    ]
    assert opening.verdicts[1].endswith(
        "weights in k-NN (classes, k.py) (for these weights); cannot tell in k-NN (few, k.py)."
    )


def test_several_seeds_are_a_mean_with_the_images_of_one(tmp_path):
    files = {}
    for seed, right in ((0, 237), (1, 243)):
        checkpoint = f"w/s/{seed}/pretrain/e.pth"
        files[f"s{seed}/knn"] = knn(right, **PRETRAINED | {"seed": seed, "checkpoint": checkpoint})
        files[f"r{seed}/knn"] = knn(120, **SCRATCH, seed=seed)
        segmented = {**KNN, "task": "segmentation", "config": "s.py", "stage": None, "iterations": 9}
        files[f"s{seed}/seg"] = {**segmented, "metrics": {"mIoU": 30.0 + seed}, **PRETRAINED, "seed": seed}
        files[f"r{seed}/seg"] = {**segmented, "metrics": {"mIoU": 20.0}, **SCRATCH, "seed": seed}
    opening, _ = opened(tmp_path, files)
    first, second = opening.lines
    # 79 and 81 %: standard deviation sqrt(2); the interval is that of 240 of 300 against 120 of 300, as above.
    assert first.figures == ["80.0 ± 1.4 (2 seeds)", "40.0 ± 0.0 (2 seeds)"]
    # Over two seeds the differences are 39 and 41: 40 ± 12.706 x sqrt(2) / sqrt(2).
    seeds = "+27.3 to +52.7 over 2 seeds"
    assert first.differences[0].words == f"+40.0 (95 %: {seeds}; +32.6 to +46.9 over 300 images, unpaired)"
    assert second.differences[0].words == "+10.5 (95 %: +4.1 to +16.9 over 2 seeds)"
    # The same seed again is no further run.
    again = {"again/knn": knn(120, **SCRATCH)}
    opening, _ = opened(tmp_path, files | again)
    assert opening.lines[0].differences[0].words == "not averaged: one seed more than once"


def test_smallest_k_where_the_usual_is_missing(tmp_path):
    metrics = {"knn10_top1": 60.0, "knn5_top1": 50.0}
    files = {"s/knn": {**KNN, **PRETRAINED, "metrics": metrics}, "r/knn": {**KNN, **SCRATCH, "metrics": metrics}}
    opening, _ = opened(tmp_path, files)
    assert [line.measure for line in opening.lines] == ["k-NN, k = 5"] and opening.lines[0].figures == ["50.0"] * 2


def test_pictures_and_the_centres_place(tmp_path):
    row = {"checkpoint": "e.pth", "used": True, "on_object": 0.84, "chance": 0.29, "best_fixed": 0.6, "images": 400}
    rows = [{**row, "checkpoint": None, "on_object": 0.3}, {**row, "used": False}, row]
    detector = {**KNN, "task": "detection", "config": "d.py", "stage": None, "iterations": 400, "metrics": {}}
    files = {"s/knn": knn(240, **PRETRAINED), "r/knn": knn(120, **SCRATCH)}
    for name, origin in (("s/det", PRETRAINED), ("r/det", SCRATCH)):
        files[name] = {**detector, **origin, "metrics": {"coco/bbox_mAP": 0.2}}
        (tmp_path / "w" / name).mkdir(parents=True)
    pretraining = tmp_path / "w/s/pretrain"  # as the checkpoint's path ends: all was moved
    put(pretraining, {"centres.json": {"rows": rows}})
    for path, colour in ((pretraining / "orders.png", "red"), (tmp_path / "w/s/det/predictions.png", "lime")):
        Image.new("RGB", (1200, 300), colour).save(path)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "w/r/det/predictions.png")
    opening, page = opened(tmp_path, files)
    words = "the centre lies on an object in 84 % of 400 validation scenes (chance 29 %, best fixed place 60 %)."
    assert opening.centres == [f"SemAIM: {words}"]
    red, lime = page.pictures[:2]
    assert red.size == lime.size == (1000, 250)
    assert [max(range(3), key=picture.convert("RGB").getpixel((5, 5)).__getitem__) for picture in (red, lime)] == [0, 1]
    # 84 % and 79 % of 400 are 337/402 and 317/402: 5.0 - 1.96 x 2.74 is below 0.
    for fixed, end in ((0.79, "; cannot tell it from that place)."), (0.95, "; that place does better).")):
        put(pretraining, {"centres.json": {"rows": [{**row, "best_fixed": fixed}]}})
        assert opened(tmp_path, files)[0].centres[0].endswith(end)
    (pretraining / "centres.json").write_text(json.dumps({"rows": [3]}))
    assert opened(tmp_path, files)[0].centres == []
