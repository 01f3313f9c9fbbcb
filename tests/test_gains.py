"""Gains of one method over another: pairs, intervals and their coverage, verdicts."""

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from test_results import CATALOGUE, DETECTOR, NEIGHBOURS, WHOLE, write

from semaim.errors import UserError
from semaim.outcomes import read_outcomes, write_outcomes
from semaim.results.gains import baseline_in
from semaim.results.intervals import bootstrap, figure_of, seeds_interval
from semaim.results.table import gain_rows, make_table

WEIGHTS = "better, for these weights"  #: of one seed
MAE = {"method": "MAE", "pretrain_epochs": 1600, "pretrain_config": "mae_vit_base_1600e.py"}


def gains(folder, against=None):
    """All gains in a folder."""
    return make_table([folder], CATALOGUE, against=against).gains


def pair(folder, ours, theirs, content=WHOLE, key="top1", **changes):
    """Runs of two methods with seeds 0, 1, ...; the baseline is MAE."""
    for name, values, method in (("ours", ours, {}), ("mae", theirs, MAE)):
        for seed, value in enumerate(values):
            checkpoint = f"{name}/seed{seed}/latest.pth"
            settled = {"metrics": {key: value}, "seed": seed, "checkpoint": checkpoint, **changes, **method}
            write(folder / name / str(seed), content, **settled)


# Intervals


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-3, 3))
def test_the_interval_over_seeds_is_that_of_the_paired_t_test(noise, shift):
    ours = np.array(noise) + 50
    theirs = 50 + np.arange(len(noise)) * 0.37 - shift
    differences = (ours - theirs).tolist()
    if np.std(differences) < 1e-6:
        return
    known = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found, why = seeds_interval(differences)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-6, abs=1e-6) and not why
    assert found.side == (0 if known.low <= 0 <= known.high else 1 if known.low > 0 else -1)


@pytest.mark.parametrize(
    ("values", "why"),
    [([], ""), ([0.5], "one seed"), ([0.5, 0.5, 0.5], "all seeds give the same"), ([0.1, float("nan")], "not finite")],
)
def test_no_interval_over_seeds_says_why(values, why):
    found, words = seeds_interval(values)
    assert found is None and words.startswith(why) and bool(words) == bool(why)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_over_seeds(seeds):
    """Of 10,000 tables 95 % of the intervals hold the true gain; seeds shift both methods alike, as data order does."""
    random = np.random.default_rng(seeds)
    shared = random.normal(0, 2, (10_000, seeds))
    ours, theirs = (shared + random.normal(mean, 0.5, (10_000, seeds)) for mean in (84.1, 83.6))
    found = [seeds_interval(row.tolist())[0] for row in ours - theirs]
    assert 0.93 < np.mean([it.low <= 0.5 <= it.high for it in found]) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("images", [200, 2000])
def test_coverage_over_images(images):
    """Outcomes of two encoders that are right on the same images more often than by chance; 1,000 tables."""
    random = np.random.default_rng(images)
    held = 0
    for _ in range(1000):
        easy = random.random(images)
        ours = (easy + 0.3 * random.normal(size=images) > 0.45).astype(np.float32)
        theirs = (easy + 0.3 * random.normal(size=images) > 0.50).astype(np.float32)
        low, high = bootstrap(ours[None], theirs[None])
        held += low <= TRUE_GAIN <= high
    assert 930 < held < 970


def _true_share(threshold):
    """P(u + 0.3 z > threshold), u uniform and z normal: the integral of the normal's distribution over u."""
    u = np.linspace(0, 1, 200_001)
    return float(np.trapezoid(scipy.stats.norm.sf((threshold - u) / 0.3), u))


TRUE_GAIN = 100 * (_true_share(0.45) - _true_share(0.50))


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    """With many images both are the same, and pairing makes it narrower than independent samples."""
    random = np.random.default_rng(0)
    easy = random.random(20_000)
    ours, theirs = ((easy + 0.2 * random.normal(size=20_000) > edge).astype(np.float32) for edge in (0.3, 0.32))
    low, high = bootstrap(ours[None], theirs[None])
    spread = 196 * np.std(ours - theirs) / np.sqrt(20_000)
    mean = 100 * (ours - theirs).mean(dtype=np.float64)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.1 * spread)
    assert spread < 0.8 * 196 * np.sqrt((ours.var() + theirs.var()) / 20_000)
    assert bootstrap(ours[None], theirs[None]) == (low, high)  # the same every time
    low, high = bootstrap(ours[None], ours[None])
    assert -0.02 < low < 0 < high < 0.02  # the same on all of 20,000 images


@pytest.mark.parametrize("images", [20, 100, 1000])
def test_few_images_decide_only_if_an_exact_test_says_so(images):
    """Images that only one of the two has right, all of one: by the sign test 5 are chance in 1 of 16 tables."""
    for count in range(1, 7):
        ours = np.zeros((1, images), np.float32)
        ours[:, :count] = 1
        low, _ = bootstrap(ours, np.zeros_like(ours))
        assert (low > 0) == (2 * 0.5**count < 0.05), count


def test_ratios_of_sums_are_resampled_by_image():
    """Mean IoU over classes from intersections and unions of each image, against a slow loop."""
    random = np.random.default_rng(1)
    union = random.integers(0, 50, (2, 40, 3)).astype(np.float32)
    union[:, :, 2] = 0  # a class that is nowhere has no IoU
    scores = np.stack([np.floor(union * random.random((2, 40, 3))), union], axis=-1).astype(np.float32)
    chosen = random.integers(0, 40, 40)
    slow = []
    for run in range(2):
        ious = []
        for kind in range(2):
            above = sum(scores[run, image, kind, 0] for image in chosen)
            ious.append(above / sum(scores[run, image, kind, 1] for image in chosen))
        slow.append(100 * np.mean(ious))
    assert figure_of(scores, chosen) == pytest.approx(np.mean(slow))
    low, high = bootstrap(scores, scores * np.array([0.5, 1], np.float32))
    assert 0 < low < figure_of(scores, np.arange(40)) / 2 < high


# What is paired with what


def test_runs_are_paired_by_seed(tmp_path):
    pair(tmp_path, [84.0, 84.3, 84.15], [83.5, 83.6, 83.55])
    (gain,) = gains(tmp_path)
    assert gain.points == pytest.approx(0.6) and gain.seeds == 3 and gain.verdict == "better"
    known = scipy.stats.ttest_rel([84.0, 84.3, 84.15], [83.5, 83.6, 83.55]).confidence_interval(0.95)
    assert (gain.over_seeds.low, gain.over_seeds.high) == pytest.approx((known.low, known.high))
    assert gain.published.value == 0.5 and gain.difference == pytest.approx(0.1)
    assert gain.over_images.over == "50,000 images, unpaired"  # no outcomes kept: wider, never narrower
    assert gain.remarks == ("pretrained differently: 800 against 1,600 epochs",)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([84.0, 84.3, 83.0], [83.5, 83.6, 83.55], "cannot tell"),  # over seeds
        ([83.65, 83.76, 83.71], [83.5, 83.6, 83.55], "cannot tell"),  # over images: 0.15 of 50,000
        ([80.0, 80.1, 80.2], [83.5, 83.7, 83.55], "worse"),
        ([90.0], [83.5], WEIGHTS),  # one seed: over images alone
        ([83.7], [83.5], "cannot tell"),
    ],
)
def test_every_interval_has_to_exclude_0(tmp_path, ours, theirs, verdict):
    pair(tmp_path, ours, theirs)
    (gain,) = gains(tmp_path)
    assert gain.verdict == verdict and (gain.over_seeds is None) == (len(ours) == 1)


def test_boxes_have_no_interval_over_images(tmp_path):
    detector = {**WHOLE, **{key: DETECTOR[key] for key in ("config", "iterations")}, "task": "detection"}
    detector |= {"config": "semaim_mask_rcnn.py", "iterations": 184375, "train_images": 117266, "val_images": 5000}
    detector = {key: value for key, value in detector.items() if key != "epochs"}
    pair(tmp_path, [0.511, 0.514], [0.500, 0.505], detector, "coco/bbox_mAP")
    for folder in (tmp_path / "mae").iterdir():  # their configs differ by name, and follow one recipe
        content = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**content, "config": "mae_mask_rcnn.py"}))
    (gain,) = gains(tmp_path)
    assert gain.points == pytest.approx(1.0) and gain.published.value == 1.0 and gain.verdict == "cannot tell"
    assert gain.over_images is None and "no outcomes of single images are kept" in "; ".join(gain.remarks)


@pytest.mark.parametrize(
    "change",
    [
        {"config": "vit_base_100e_mae.py"},
        {"epochs": 50},
        {"val_images": 100},
        {"train_images": 1000},
        {"data": "elsewhere", "train_images": 7},
        {"cfg_options": {"model.mixup": 0}},
        {"backbone": "ViT-L"},
        {"partly_loaded": "without 1 tensor"},
        {"features": "mean of the patches"},
    ],
    ids=str,
)
def test_other_recipes_and_data_give_no_gain(tmp_path, change):
    write(tmp_path / "ours", WHOLE)
    write(tmp_path / "mae", WHOLE, **MAE)
    assert len(gains(tmp_path)) == 2  # top-1 and top-5
    write(tmp_path / "other/mae", WHOLE, **{**MAE, **change})
    (tmp_path / "mae/results.json").unlink()
    assert not gains(tmp_path)


def test_what_a_reader_has_to_know_is_said(tmp_path):
    pair(tmp_path / "a", [84.0, 84.5, 84.7], [83.0, 83.1])
    (gain,) = gains(tmp_path / "a")
    assert gain.seeds == 2 and "left out, as only one of the two has it: seed 2" in gain.remarks
    pair(tmp_path / "b", [84.0, 84.2], [83.0, 83.1], checkpoint="one.pth")
    (gain,) = gains(tmp_path / "b")
    assert {f"all seeds of {name} are of one pretraining" for name in ("SemAIM", "MAE")} <= set(gain.remarks)
    assert gain.over_seeds.side == 1 and gain.verdict == WEIGHTS
    write(tmp_path / "c/ours", WHOLE, seed=1, metrics={"top1": 90.0})
    write(tmp_path / "c/mae", WHOLE, seed=2, metrics={"top1": 80.0}, **MAE)
    (gain,) = gains(tmp_path / "c")
    assert gain.seeds == 0 and "no seed in common: not paired" in gain.remarks and gain.points == 10
    write(tmp_path / "d/a", WHOLE, metrics={"top1": 90.0})
    write(tmp_path / "d/b", WHOLE, metrics={"top1": 91.0})
    write(tmp_path / "d/mae", WHOLE, metrics={"top1": 80.0}, **MAE)
    assert not gains(tmp_path / "d")  # one seed twice: something unrecorded differs


@pytest.mark.parametrize("seed", [0, None])
def test_several_weights_of_one_seed_are_all_counted(tmp_path, seed):
    """As k-NN of three pretrainings with the default seed: no pair is known, and none is left out."""
    pair(tmp_path, [84.0, 85.0, 86.0], [83.0, 83.1, 83.2], seed=seed)
    (gain,) = gains(tmp_path)
    assert gain.points == pytest.approx(1.9) == gain.ours.mean - gain.baseline.mean
    assert (gain.seeds, gain.over_seeds, gain.verdict) == (0, None, WEIGHTS)
    assert "seeds of SemAIM and of MAE are not recorded, or repeat: not paired, no interval over seeds" in gain.remarks


@pytest.mark.parametrize(
    ("change", "beside"),
    [
        ({}, True),
        ({"cfg_options": {"model.mixup": 0}}, False),
        ({"epochs": 10}, False),
        ({"pretrain_images": 1000}, False),
        ({"partly_loaded": "without 1 tensor"}, False),
    ],
    ids=str,
)
def test_a_published_gain_is_beside_one_that_was_measured_so(tmp_path, change, beside):
    pair(tmp_path, [84.0], [83.5], **change)
    (gain,) = gains(tmp_path)
    assert (gain.published is not None) == beside == (gain.difference is not None)


def test_means_over_other_classes_and_other_configs_are_told(tmp_path):
    changes = {"task": "segmentation", "epochs": None, "iterations": 160000, "train_images": 20210, "val_images": 2000}
    for name, method, counted in (("semaim", {}, 149), ("mae", MAE, 150)):
        more = {"config": f"{name}_upernet.py", "metrics": {"mIoU": 48.0}, "classes_evaluated": counted, "classes": 150}
        write(tmp_path / name, WHOLE, **changes, **more, **method)
    (gain,) = gains(tmp_path)
    told = "configs semaim_upernet.py against mae_upernet.py; mean over 149 against 150 classes"
    assert told in gain.remarks


def test_what_both_deviate_in_and_sizes_of_images_are_told(tmp_path):
    """The recipe's name alone would be read as followed."""
    less = {"epochs": 1, "cfg_options": {"model.mixup": 0}, "metrics": {"top1": 50.0}}
    write(tmp_path / "ours", WHOLE, **less, images={"size": 518, "crop_pct": 1.0})
    write(tmp_path / "mae", WHOLE, **less, images={"size": 224, "crop_pct": 0.875}, **MAE)
    (gain,) = gains(tmp_path)
    assert gain.remarks[:2] == ("reduced: 1,281,167 images, 1 epochs", "changed: model.mixup=0")
    assert "images of size 518 crop_pct 1.0 against size 224 crop_pct 0.875" in gain.remarks


def test_changes_with_commas_stay_whole(tmp_path):
    for place, blocks in enumerate(([1, 2], [1, 3])):
        write(tmp_path / str(place), WHOLE, pretrain_options={"model.network.blocks": blocks}, metrics={"top1": 84.0})
    write(tmp_path / "mae", WHOLE, metrics={"top1": 83.0}, **MAE)
    names = [row[0] for row in gain_rows(make_table([tmp_path], CATALOGUE))]
    assert [name.partition("blocks=")[2] for name in names] == ["[1, 2]", "[1, 3]"]


def test_random_weights_are_the_baseline_without_mae(tmp_path):
    options = {"pretrain_options": {"train_cfg.max_epochs": 4}}
    ours = {"checkpoint": "a/latest.pth", "method": "SemAIM", "metrics": {"knn20_top1": 40.0}, **options}
    write(tmp_path / "ours", NEIGHBOURS, **ours)
    write(tmp_path / "random", NEIGHBOURS, metrics={"knn20_top1": 30.0})
    (gain,) = gains(tmp_path)
    assert gain.verdict == WEIGHTS and gain.baseline.runs[0].method == "random weights"
    assert not any("pretrained differently" in remark for remark in gain.remarks)
    assert not gains(tmp_path, "SemAIM")[0].side == 1


def test_a_baseline_that_nothing_can_be_compared_with_is_refused(tmp_path):
    write(tmp_path / "ours", WHOLE)
    write(tmp_path / "mae", WHOLE, **MAE, config="vit_base_100e_mae.py")
    assert not gains(tmp_path)
    with pytest.raises(UserError, match="--against mae: no other method was measured as MAE was: by the same recipe"):
        gains(tmp_path, "mae")


@pytest.mark.parametrize(
    ("methods", "asked", "found"),
    [
        (["SemAIM", "MAE", "random weights"], None, "MAE"),
        (["SemAIM", "random weights"], None, "random weights"),
        (["SemAIM", "SAIM"], None, None),
        (["MAE"], None, None),
        (["SemAIM", "MAE"], "semaim", "SemAIM"),
        (["SemAIM", "random weights"], "random", "random weights"),
        (["SemAIM", "random weights"], "scratch", "random weights"),
        (["SemAIM", "SemAIM*"], "semaim", "SemAIM"),
    ],
)
def test_the_baseline_is_the_asked_or_the_usual_one(methods, asked, found):
    assert baseline_in(methods, asked, CATALOGUE) == found
    with pytest.raises(UserError, match="--against dino"):
        baseline_in(methods, "dino", CATALOGUE)


# Outcomes of single images


def outcomes(folder, values, key="knn20_top1", names=None, metrics=None):
    """A run with outcomes of its images."""
    values = np.asarray(values, np.float32)
    metric = 100 * values.mean(dtype=np.float64) if metrics is None else metrics
    method = {} if "random" in str(folder) else {"method": "SemAIM", "checkpoint": "a/latest.pth"}
    write(folder, NEIGHBOURS, metrics={key: metric}, val_images=len(values), **method)
    write_outcomes(folder, names or [f"cat/{place:04}.png" for place in range(len(values))], {key: values})


def test_outcomes_pair_the_images(tmp_path):
    random = np.random.default_rng(2)
    theirs = random.random(2000) > 0.5
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:20]] = True  # never worse, on 20 images better: 1 point, sure only if paired
    outcomes(tmp_path / "ours", ours)
    outcomes(tmp_path / "random", theirs)
    (gain,) = gains(tmp_path)
    assert gain.points == pytest.approx(1.0) and gain.verdict == WEIGHTS and gain.over_images.over == "2,000 images"
    (tmp_path / "ours/outcomes.npz").unlink()
    (gain,) = gains(tmp_path)
    assert gain.verdict == "cannot tell" and gain.over_images.over == "2,000 images, unpaired"


def test_the_order_of_the_images_does_not_matter(tmp_path):
    random = np.random.default_rng(3)
    values, mixed = random.random(300) > 0.4, random.permutation(300)
    names = [f"{place:04}.png" for place in range(300)]
    outcomes(tmp_path / "ours", values, names=names)
    outcomes(tmp_path / "random", values[mixed], names=[names[place] for place in mixed])
    (gain,) = gains(tmp_path)
    assert -1 < gain.over_images.low < 0 < gain.over_images.high < 1 and gain.verdict == "cannot tell"


def test_outcomes_that_do_not_belong_are_not_used(tmp_path):
    values = np.arange(100) % 2
    outcomes(tmp_path / "a/ours", values, metrics=70.0)
    outcomes(tmp_path / "a/random", values)
    (gain,) = gains(tmp_path / "a")
    assert gain.over_images.over.endswith("unpaired")
    assert "outcomes.npz has 50.00, results.json 70.00" in gain.remarks
    outcomes(tmp_path / "b/ours", values)
    outcomes(tmp_path / "b/random", values, names=[f"dog/{place}.png" for place in range(100)])
    (gain,) = gains(tmp_path / "b")
    assert gain.over_images is None and "other validation images: no interval" in gain.remarks
    (tmp_path / "b/ours/outcomes.npz").write_bytes(b"PK" + b"\0" * 40)
    with pytest.raises(UserError, match="outcomes.npz is broken"):
        read_outcomes(tmp_path / "b/ours")
    assert gains(tmp_path / "b")[0].over_images.over.endswith("unpaired")


def test_seeds_that_were_measured_on_other_images_give_no_interval(tmp_path):
    pair(tmp_path, [50.04, 50.05, 50.04], [50.0, 50.0, 50.0], val_images=100)
    for folder in tmp_path.glob("*/*"):
        names = [f"{folder.parent.name}/{place}.png" for place in range(100)]
        write_outcomes(folder, names, {"top1": np.arange(100) % 2})
    (gain,) = gains(tmp_path)
    assert (gain.seeds, gain.over_seeds, gain.verdict) == (3, None, "no interval")


def test_runs_on_other_classes_of_the_same_own_data_are_not_compared_nor_averaged(tmp_path):
    own = {"root": "data/roads", "train": {"images": "images", "labels": "labels"}, "classes": ["road", "car"]}
    pair(tmp_path / "same", [50.0, 51.0], [49.0, 49.5], own_data=own)
    assert len(gains(tmp_path / "same")) == 1
    pair(tmp_path / "one", [50.0], [49.0], own_data=own)
    write(tmp_path / "one/other", WHOLE, **MAE, seed=1, own_data={**own, "classes": {"0": "road", "7": "car"}})
    (gain,) = gains(tmp_path / "one")
    assert len(gain.baseline.runs) == 1, "the other run is no second seed"
    write(tmp_path / "none/ours", WHOLE, own_data=own)
    write(tmp_path / "none/mae", WHOLE, **MAE, own_data={**own, "classes": ["road", "rest"]})
    assert not gains(tmp_path / "none")
