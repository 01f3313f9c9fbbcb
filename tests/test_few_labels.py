"""Few labels: nested seeded draws, lists of names, logistic regression, and the task as users type it."""

import shutil

import numpy as np
import pytest
import torch
from commands import one_line, results, tool
from scipy.optimize import minimize
from scipy.special import logsumexp
from test_features import clusters, random

from semaim.data.few import check_every_class, draw_ranks, read_list, share_of_each
from semaim.data.labelled import LabelledImages
from semaim.engine.evaluation import Frozen
from semaim.engine.logistic import fit_logistic, unit
from semaim.errors import UserError
from semaim.outcomes import read_outcomes
from semaim.tasks.few_labels import FewLabels, FewLabelsTask

CONFIG = "semaim/configs/few_labels/vit_tiny_scenes.py"


def labels_of(*counts):
    """Labels of classes with these numbers of images, interleaved."""
    rows = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]


def test_draws_are_nested_seeded_and_balanced():
    labels = labels_of(9, 5, 7)
    ranks = [draw_ranks(labels, 0, draw) for draw in range(3)]
    for rank in ranks:
        chosen = [set((rank < k).nonzero().flatten().tolist()) for k in range(6)]
        for k in range(1, 6):
            assert labels[list(chosen[k])].bincount().tolist() == [k] * 3 and chosen[k - 1] < chosen[k]
    assert torch.equal(draw_ranks(labels, 0, 1), ranks[1])
    assert not torch.equal(ranks[0], ranks[1]) and not torch.equal(draw_ranks(labels, 1, 0), ranks[0])
    assert share_of_each(labels, ranks[0], 0.5).tolist() == [
        row for row in range(21) if ranks[0][row] < {9: 4, 5: 2, 7: 4}[(9, 5, 7)[labels[row]]]
    ]
    assert labels[share_of_each(labels, ranks[0], 0.01)].bincount().tolist() == [1, 1, 1], "one at least"


def test_a_class_is_drawn_alike_whatever_the_others_are():
    labels = labels_of(6, 6)
    more = torch.cat([labels, torch.full((4,), 2)])
    assert torch.equal(draw_ranks(more, 0, 0)[:12], draw_ranks(labels, 0, 0))


def test_every_image_is_drawn_first_equally_often():
    firsts = torch.stack([draw_ranks(torch.zeros(5, dtype=torch.int64), 0, draw) for draw in range(400)]) == 0
    assert firsts.sum().item() == 400 and all(50 < count < 110 for count in firsts.sum(dim=0).tolist())


@pytest.fixture
def images(labelled):
    return LabelledImages(labelled, 32, "train", "none")


def test_a_list_is_read_by_name_or_by_folder_and_name(images, tmp_path):
    names = images.names()
    file = tmp_path / "list.txt"
    file.write_text("\n".join([names[7].split("/")[-1], "", "/".join(names[2].split("/")[1:]), names[30]]) + "\n")
    assert read_list(file, images).tolist() == [2, 7, 30]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_list(file, images).tolist() == [2, 7, 30], "a mark of the encoding, and Windows' line ends"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.jpg\nnor-there.jpg", "list.txt names nowhere.jpg, which is no image in .*/train$"),
        ("{0}\n.", "list.txt names ., which is no image in .*/train$"),
        ("{0}\n{1}\n{0}", "list.txt names .*{0} twice$"),
        ("\n\n", "the list .*list.txt is empty$"),
        (None, "cannot read the list .*list.txt: No such file or directory$"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line(images, tmp_path, text, message):
    names = [name.split("/")[-1] for name in images.names()[:2]]
    if text is not None:
        (tmp_path / "list.txt").write_text(text.format(*names))
    with pytest.raises(UserError, match=message.format(*names)):
        read_list(tmp_path / "list.txt", images)


def test_an_ambiguous_name_and_a_class_without_labels_are_refused(labelled, tmp_path):
    for name in "ab":
        shutil.copytree(
            labelled / "train" / sorted(p.name for p in (labelled / "train").iterdir())[0], tmp_path / "train" / name
        )
    images = LabelledImages(tmp_path, 32, "train", "none")
    alike = images.names()[0].split("/")[-1]
    (tmp_path / "list.txt").write_text(alike)
    with pytest.raises(UserError, match=f"names {alike}, which are 2 images, such as train/b/{alike}: add folders$"):
        read_list(tmp_path / "list.txt", images)
    (tmp_path / "list.txt").write_text(f"a/{alike}")
    rows = read_list(tmp_path / "list.txt", images)
    with pytest.raises(UserError, match="^the list has no image of class b$"):
        check_every_class(rows, images.labels, images.classes, "the list")


@pytest.mark.parametrize("penalty", [0.00025, 0.1, 3.0])
def test_logistic_regression_is_the_minimum(penalty):
    """Against scipy's L-BFGS in double precision, on the loss written once more."""
    features, labels = clusters(4, classes=5, width=16, noise=0.7)
    rows, truth = unit(features).double().numpy(), labels.numpy()

    def loss(flat):
        weight = flat.reshape(16, 5)
        logits = rows @ weight
        total = logsumexp(logits, axis=1).sum() - logits[np.arange(20), truth].sum()
        slope = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        slope[np.arange(20), truth] -= 1
        return total + penalty / 2 * (flat**2).sum(), (rows.T @ slope + penalty * weight).ravel()

    best = minimize(
        loss, np.zeros(80), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9}
    )
    found = fit_logistic(unit(features), labels, 5, penalty)
    assert loss(found.double().numpy().ravel())[0] == pytest.approx(best.fun, rel=1e-4)
    queries = unit(random(50, 16, seed=5))
    theirs = queries.double().numpy() @ best.x.reshape(16, 5)
    assert (theirs.argmax(axis=1) == (queries @ found).argmax(dim=1).numpy()).mean() >= 0.98


def test_unit_features_forget_level_and_scale():
    features = random(6, 16)
    changed = features * torch.linspace(0.5, 9, 6)[:, None] + torch.arange(6.0)[:, None]
    torch.testing.assert_close(unit(changed), unit(features), atol=1e-5, rtol=1e-5)
    assert unit(features).norm(dim=1).allclose(torch.ones(6)) and unit(features).mean(dim=1).abs().max() < 1e-6


def frozen(train, val, classes=6, seed=0, log=lambda line: None):
    sets = ([part.numpy() for part in rows] for rows in (train, val))
    return Frozen(*map(tuple, sets), classes, torch.device("cpu"), log, seed)


def test_the_figures_are_means_and_deviations_over_the_draws():
    train, val = clusters(9, width=16), clusters(5, width=16, seed=9)
    lines = []
    found = FewLabels(shots=(1, 4, 99), shares=(0.5,), draws=3, penalty=0.01).run(frozen(train, val, log=lines.append))
    assert any("99 per class left out, a class has 9 training images" in line for line in lines)
    for key, choose in (("few_shots4", lambda rank: rank < 4), ("few_percent50", lambda rank: rank < 4)):
        accuracies, hits = [], []
        for draw in range(3):
            rows = choose(draw_ranks(train[1], 0, draw))
            weight = fit_logistic(unit(train[0][rows]), train[1][rows], 6, 0.01)
            hits.append(((unit(val[0]) @ weight).argmax(dim=1) == val[1]).double())
            accuracies.append(100 * hits[-1].mean().item())
        assert found.metrics[f"{key}_probe_top1"] == pytest.approx(np.mean(accuracies))
        assert found.metrics[f"{key}_probe_top1_std"] == pytest.approx(np.std(accuracies, ddof=1))
        np.testing.assert_allclose(found.scores[f"{key}_probe_top1"], torch.stack(hits).mean(dim=0))
        assert found.metrics[f"{key}_images"] == 24
    assert not any("99" in name for name in found.metrics)
    again = FewLabels(shots=(1,), draws=3, penalty=0.01).run(frozen(train, val))
    other = FewLabels(shots=(1,), draws=3, penalty=0.01).run(frozen(train, val, seed=1))
    assert all(found.metrics[name] == value for name, value in again.metrics.items())
    assert again.metrics != other.metrics


def test_one_neighbour_of_one_image_per_class():
    train, val = clusters(9, width=16), clusters(5, width=16, seed=9)
    found = FewLabels(shots=(1,), draws=1).run(frozen(train, val))
    rows = (draw_ranks(train[1], 0, 0) == 0).nonzero().flatten()
    cosine = torch.nn.functional.cosine_similarity(val[0][:, None], train[0][rows][None], dim=2)
    right = (train[1][rows][cosine.argmax(dim=1)] == val[1]).double().mean().item()
    assert found.metrics["few_shots1_knn_top1"] == pytest.approx(100 * right)
    assert "few_shots1_knn_top1_std" not in found.metrics, "one draw has none"


def test_the_table_has_the_probe_at_some_numbers():
    names = [
        f"few_{key}_{kind}_top1"
        for key in ("shots1", "shots2", "shots16", "percent1", "list_1percent")
        for kind in ("probe", "knn")
    ]
    shown = FewLabelsTask().reported([*names, "few_shots1_probe_top1_std", "few_shots1_images"])
    assert {name: metric.label for name, metric in shown.items()} == {
        "few_shots1_probe_top1": "probe, 1 per class",
        "few_shots16_probe_top1": "probe, 16 per class",
        "few_percent1_probe_top1": "probe, 1 % of the labels",
        "few_list_1percent_probe_top1": "probe, 1percent",
    }
    assert list(FewLabelsTask().reported(["few_shots2_probe_top1"])) == ["few_shots2_probe_top1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (0, 1)}, "give whole numbers from 1"),
        ({"shares": (1.0,)}, "shares between 0 and 1"),
        ({"shares": ("1%",)}, "shares between 0 and 1"),
        ({"draws": 0}, "draws, penalty and temperature have to be above 0"),
        ({"shots": (50,)}, "a class has 8 training images: give evaluation.shots of that or less"),
    ],
)
def test_settings_that_cannot_work_are_refused(images, options, message):
    with pytest.raises(UserError, match=message):
        FewLabels(**options).check(images, images, (16,))


def test_names_of_lists_have_to_differ_and_to_fit_in_a_metric(images, tmp_path):
    with pytest.raises(UserError, match="list my_list.txt: rename it"):
        FewLabels(lists=("my_list.txt",)).read(images)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("\n".join(images.names()))
    with pytest.raises(UserError, match="list .*b/one.txt: another has the name one too: rename one of them$"):
        FewLabels(lists=[tmp_path / "a/one.txt", tmp_path / "b/one.txt"]).read(images)


def test_as_a_user_types_it(labelled, tmp_path):
    names = LabelledImages(labelled, 32, "train", "none").names()
    (tmp_path / "eight.txt").write_text("\n".join(names[::5]))
    options = ["--data-root", labelled, "--work-dir", tmp_path / "run", "--cfg-options", "num_workers=0"]
    done = tool("test.py", CONFIG, "random", *options, f"evaluation.lists=[{tmp_path}/eight.txt]", "evaluation.draws=2")
    assert done.returncode == 0, done.stderr
    record = results(tmp_path / "run")
    metrics = record["metrics"]
    assert record["task"] == "few labels" and {"few_shots8_probe_top1_std", "few_shots8_knn_top1"} <= set(metrics)
    assert metrics["few_shots8_images"] == 40 and metrics["few_list_eight_images"] == 8
    assert "16 per class left out" in done.stdout + done.stderr
    two = ["2", *options[:2], "--work-dir", tmp_path / "two", *options[4:], f"evaluation.lists=[{tmp_path}/eight.txt]"]
    done = tool("test.py", CONFIG, "random", *two, "evaluation.draws=2")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "two")["metrics"] == metrics, "two processes find the same"
    outcomes = read_outcomes(tmp_path / "run")
    for key, rows in outcomes.scores.items():
        assert 100 * rows.mean() == pytest.approx(metrics[key], abs=1e-3)
    (tmp_path / "eight.txt").write_text("gone.jpg")
    done = tool("test.py", CONFIG, "random", *options, f"evaluation.lists=[{tmp_path}/eight.txt]")
    one_line(done, "names gone.jpg, which is no image in")
