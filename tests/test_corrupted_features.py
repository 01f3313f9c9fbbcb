"""The task on corrupted images: its figures against passes over each set alone, its refusals, and as users type it."""

import importlib.util

import numpy as np
import pytest
import torch
from commands import one_line, results, tool
from test_features import clusters

from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Frozen
from semaim.engine.features import fast_probe, knn_accuracy
from semaim.errors import UserError
from semaim.outcomes import read_outcomes
from semaim.tasks.corruptions import Corruptions, CorruptionsTask

CONFIG = "semaim/configs/corruptions/vit_tiny_scenes.py"
installed = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None,
    reason="imagecorruptions-imaug is not installed: runs after tools/setup.sh --extras corruptions",
)


def test_the_figures_are_those_of_each_set_alone():
    """The sets are features with rising noise here; every cell is measured by the functions of k-NN and the probe."""
    names, severities = ("fog", "snow"), (1, 4)
    train, val = clusters(9, width=8), clusters(5, width=8, seed=9)
    cells = {(name, level): clusters(5, width=8, noise=level, seed=9) for name in names for level in severities}
    more = {f"{name}_{level}": tuple(part.numpy() for part in rows) for (name, level), rows in cells.items()}
    sets = [tuple(part.numpy() for part in rows) for rows in (train, val)]
    evaluation = Corruptions(names, severities, k=5, epochs=4, batch=16)
    found = evaluation.run(Frozen(*sets, 6, torch.device("cpu"), lambda line: None, more=more))

    def measured(rows):
        return {
            "probe": fast_probe(*train, *rows, 6, epochs=4, batch=16).top1,
            "knn5": knn_accuracy(*train, *rows, 6, ks=[5])[5][0],
        }

    alone = {cell: measured(rows) for cell, rows in cells.items()}
    for kind, clean in measured(val).items():
        assert found.metrics[f"clean_{kind}_top1"] == pytest.approx(clean)
        mean = np.mean([values[kind] for values in alone.values()])
        assert found.metrics[f"corrupted_{kind}_top1"] == pytest.approx(mean)
        assert 100 * found.scores[f"corrupted_{kind}_top1"].mean() == pytest.approx(mean)
        for name in names:
            of_name = np.mean([alone[name, level][kind] for level in severities])
            assert found.metrics[f"{name}_{kind}_top1"] == pytest.approx(of_name)
        for level in severities:
            of_level = np.mean([alone[name, level][kind] for name in names])
            assert found.metrics[f"severity{level}_{kind}_top1"] == pytest.approx(of_level)


def test_only_the_means_are_in_the_table():
    names = ["corrupted_probe_top1", "corrupted_knn5_top1", "clean_probe_top1", "fog_probe_top1", "severity1_knn5_top1"]
    labels = {name: metric.label for name, metric in CorruptionsTask().reported(names).items()}
    assert labels == {"corrupted_probe_top1": "probe, mean top-1", "corrupted_knn5_top1": "k-NN, k = 5, mean top-1"}


@installed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("fogg",)}, "unknown corruption 'fogg': did you mean fog"),
        ({"names": "fogg", "severities": 3}, "unknown corruption 'fogg': did you mean fog"),
        ({"names": "fog", "severities": 6}, "severity 6 of fog: give a whole number from 1 to 5"),
        ({"severities": (0, 1)}, "severity 0 of gaussian_noise: give a whole number from 1 to 5"),
        ({"severities": ()}, "evaluation.names and evaluation.severities need one entry or more"),
        ({"k": 1.5}, "k-NN: k 1.5 of 40 training images"),
        ({"epochs": 0}, "a probe of 0 epochs in batches of 1024: give whole numbers from 1"),
        ({"k": 100}, "k-NN: k 100 of 40 training images, .*: give k from 1 to 40"),
        ({"held_out": 2}, "a share of 2 cannot be held out"),
    ],
)
def test_settings_that_cannot_work_are_refused(labelled, options, message):
    train, val = (LabelledImages(labelled, 32, split, "none") for split in ("train", "val"))
    with pytest.raises(UserError, match=message):
        Corruptions(**options).check(train, val, (16,))


@installed
def test_images_that_are_corrupted_already_are_refused(labelled):
    train = LabelledImages(labelled, 32, "train", "none")
    val = LabelledImages(labelled, 32, "val", corruption="fog", severity=1)
    with pytest.raises(UserError, match="dataset.corruption is set, so no image is clean: leave it out"):
        Corruptions().check(train, val, (16,))


@installed
def test_as_a_user_types_it(labelled, tmp_path):
    options = [
        "num_workers=0",
        "evaluation.names=[fog,jpeg_compression]",
        "evaluation.severities=[5]",
        "evaluation.k=5",
    ]
    line = [CONFIG, "random", "--data-root", labelled, "--work-dir", tmp_path / "run", "--cfg-options", *options]
    done = tool("test.py", *line)
    assert done.returncode == 0, done.stderr
    text, metrics = done.stdout + done.stderr, results(tmp_path / "run")["metrics"]
    assert "fog_5: 10 images in" in text and "mean of 2 corruptions at severities 5" in text
    for kind in ("probe", "knn5"):
        both = [metrics[f"{name}_{kind}_top1"] for name in ("fog", "jpeg_compression")]
        assert metrics[f"corrupted_{kind}_top1"] == pytest.approx(np.mean(both)) == metrics[f"severity5_{kind}_top1"]
    kept = read_outcomes(tmp_path / "run")
    assert len(kept.names) == 10 and set(kept.scores) == {"corrupted_probe_top1", "corrupted_knn5_top1"}

    again = tool("test.py", *line)
    assert "10 features read from" in again.stdout + again.stderr
    assert results(tmp_path / "run")["metrics"] == metrics


@installed
def test_stored_features_of_corrupted_images_are_of_one_seed(labelled):
    clean = [LabelledImages(labelled, 32, "val", seed=seed) for seed in (0, 1)]
    noisy = [images.corrupted("fog", 3) for images in clean]
    assert clean[0].preparation() == clean[1].preparation() != noisy[0].preparation()
    assert noisy[0].preparation() != noisy[1].preparation() and "fog, severity=3" in noisy[0].preparation()
    assert noisy[0].preparation() != clean[0].corrupted("fog", 4).preparation()


@installed
def test_an_unknown_corruption_is_one_line(labelled, tmp_path):
    options = ["--data-root", labelled, "--work-dir", tmp_path / "run", "--cfg-options", "evaluation.names=[fogg]"]
    one_line(tool("test.py", CONFIG, "random", *options), "unknown corruption 'fogg'")
