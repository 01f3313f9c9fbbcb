"""Further test sets by folder: classes by name or number, restricted predictions, refusals, and as users type it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import one_line, results, tool
from test_features import clusters

from semaim.data.labelled import LabelledImages
from semaim.data.test_sets import describe_test_set, open_test_set, open_test_sets, predicted_among
from semaim.engine.classifiers import Classifiers, Settings
from semaim.engine.evaluation import Frozen
from semaim.engine.features import knn_hits
from semaim.errors import UserError

CONFIG = "semaim/configs/knn/vit_tiny_scenes.py"


@pytest.fixture
def val(labelled):
    return LabelledImages(labelled, 32, "val")


def copied(val, root, names):
    """The validation images of the classes `names` (own name -> name in the new folder) in a new folder."""
    for own, name in names.items():
        shutil.copytree(f"{val.root}/val/{own}", root / name)
    return root


def test_a_part_of_the_classes_by_name(val, tmp_path):
    some = [val.classes[3], val.classes[1]]
    images = open_test_set(val, copied(val, tmp_path / "a", dict(zip(some, some, strict=True))))
    assert images.labels.tolist() == [1, 1, 3, 3] and images.classes == val.classes
    assert predicted_among(images.labels, 5) == [1, 3]
    first = [index for index, label in enumerate(val.labels) if label == 1][0]
    assert torch.equal(images[0]["image"], val[first]["image"]), "the same transform"
    assert describe_test_set("a", images) == (
        f"a: 4 images of 2 of 5 classes in {tmp_path}/a; only these are predicted"
    )
    assert len(val) == 10 and val.labels.tolist() == sorted(list(range(5)) * 2), "the validation images are as before"


def test_all_classes_are_not_restricted_and_a_folder_val_is_taken(val, tmp_path):
    copied(val, tmp_path / "val", {name: name for name in val.classes})
    (tmp_path / "train" / val.classes[0]).mkdir(parents=True)
    images = open_test_set(val, tmp_path)
    assert images.labels.tolist() == val.labels.tolist() and predicted_among(images.labels, 5) is None
    assert describe_test_set("all", images) == f"all: 10 images of 5 of 5 classes in {tmp_path}/val"


def test_numbers_are_the_classes_in_sorted_order(tmp_path, scenes):
    """Of twelve classes, so that 10 comes after 9 and not after 1."""
    names = [f"class_{chr(97 + place)}" for place in range(12)]
    image = next(scenes.rglob("*.jpg"))
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            shutil.copy(image, tmp_path / "data" / split / name)
    for number in range(12):
        (tmp_path / "v2" / str(number)).mkdir(parents=True)
        shutil.copy(image, tmp_path / "v2" / str(number) / f"{number}.jpg")
    val = LabelledImages(tmp_path / "data", 32, "val")
    images = open_test_set(val, tmp_path / "v2")
    found = {path.decode().split("/")[-2]: label for path, label in zip(images.paths, images.labels, strict=True)}
    assert found == {str(number): number for number in range(12)}
    assert describe_test_set("v2", images).endswith("; its folders 0 to 11 are the classes in sorted order")
    shutil.rmtree(tmp_path / "v2/11")  # no longer the numbers of all classes
    with pytest.raises(UserError, match="v2/0 is no class of .*data: a further test set has a part of its classes$"):
        open_test_set(val, tmp_path / "v2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder: .*other"),
        (lambda root: root.mkdir(), "no class folders in .*other: images belong in"),
        (lambda root: (root / "zebra").mkdir(parents=True), "other/zebra is no class of .*: a further test set has"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(val, tmp_path, make, message):
    make(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        open_test_set(val, tmp_path / "other")


def test_a_name_that_cannot_begin_a_metric_is_refused(val):
    with pytest.raises(UserError, match="test set 'a/b': give a name of letters"):
        open_test_sets(val, {"a/b": "."})


@pytest.mark.parametrize("among", [None, [1, 4, 5], [2]])
def test_restricted_predictions_equal_an_explicit_loop(among):
    train, (queries, labels) = clusters(9, width=8), clusters(5, width=8, seed=9)
    keep = torch.isin(labels, torch.tensor(range(6) if among is None else among))
    queries, labels = queries[keep], labels[keep]
    settings = Settings(k=7, epochs=3, batch=16)
    sets = [(features.numpy(), own.numpy()) for features, own in (train, (queries, labels))]
    classifiers = Classifiers(Frozen(*sets, 6, torch.device("cpu"), lambda line: None), settings)
    found = classifiers.hits(sets[1], among)
    heads = classifiers.probe.heads
    bank = torch.nn.functional.normalize(train[0], dim=1)
    for row, (query, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        cosine = bank @ torch.nn.functional.normalize(query, dim=0)
        votes = dict.fromkeys(range(6), 0.0)
        for place in cosine.argsort(descending=True)[:7].tolist():
            votes[int(train[1][place])] += float(((cosine[place] - cosine.max()) / 0.07).exp())
        logits = dict(enumerate((((query - heads.mean) * heads.scale) @ heads.weight[0] + heads.bias[0]).tolist()))
        for kind, scores in (("knn7", votes), ("probe", logits)):
            ranking = sorted(range(6) if among is None else among, key=lambda c, scores=scores: (-scores[c], c))
            assert found[kind][row].tolist() == [ranking[0] == label, label in ranking[:5]], (kind, row)


def test_restriction_forgets_the_votes_of_other_classes():
    bank, queries = torch.eye(3), torch.tensor([[1.0, 0.9, 0.1]])
    labels, truth = torch.tensor([0, 1, 2]), torch.tensor([1])
    for among, right in ((None, False), ([1, 2], True)):
        assert bool(knn_hits(bank, labels, queries, truth, 3, [3], among=among)[3][0, 0]) is right


def test_frozen_features_as_a_user_types_it(val, labelled, tmp_path):
    some = copied(val, tmp_path / "some", {name: name for name in val.classes[:2]})
    options = ["--data-root", labelled, "--cfg-options", "num_workers=0"]
    line = [CONFIG, "random", *options, "evaluations.test_sets.k=5", "evaluations.test_sets.epochs=2"]
    more = ["--tasks", "knn,test_sets", "--test-root", f"some={some}", "--test-root", f"again={labelled}/val"]
    done = tool("test.py", *line, "evaluations.knn.ks=[5]", "--work-dir", tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    knn, found = (results(tmp_path / "run" / name)["metrics"] for name in ("knn", "test_sets"))
    assert found["test_again_knn5_top1"] == knn["knn5_top1"], "the validation images themselves"
    assert (found["test_some_images"], found["test_some_classes"], found["test_again_classes"]) == (4, 2, 5)
    assert 0 <= found["test_some_probe_top1"] <= 100 and found["test_some_probe_top5"] == 100, "of two classes"
    assert "only these are predicted" in done.stdout + done.stderr
    reported = results(tmp_path / "run" / "test_sets")["reported"]
    assert reported["test_some_knn5_top1"]["label"] == "some, k-NN, k = 5"


def test_stored_features_of_a_set_follow_the_numbers_of_the_classes(val, labelled, tmp_path):
    some = copied(val, tmp_path / "some", {name: name for name in val.classes[:2]})
    more = Path(shutil.copytree(labelled, tmp_path / "more"))
    for split in ("train", "val"):  # a class before all others
        shutil.copytree(more / split / val.classes[4], more / split / "0")
    for data, expected in ((labelled, {0, 1}), (more, {1, 2})):
        options = ["--data-root", data, "--work-dir", tmp_path / "run", "--test-root", f"some={some}"]
        options += ["--tasks", "test_sets", "--cfg-options", "num_workers=0", "evaluations.test_sets.k=5"]
        done = tool("test.py", CONFIG, "random", *options, "evaluations.test_sets.epochs=2")
        assert done.returncode == 0, done.stderr
        assert set(np.load(tmp_path / "run/features/test_some/labels.npy").tolist()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "test_sets"], "test_sets: name one or more, --test-root NAME=DIR"),
        (["--tasks", "test_sets", "--test-root", "somewhere"], "--test-root somewhere: give NAME=DIR"),
        (["--tasks", "test_sets", "--test-root", "a=b", "--test-root", "a=c"], "--test-root a is given twice"),
        (["--tasks", "test_sets", "--test-root", "a=nowhere"], "no such folder: nowhere"),
        (["--test-root", "a=nowhere"], "no task here reads further test sets: add test_sets to --tasks"),
    ],
)
def test_refused_before_anything_is_extracted(labelled, tmp_path, arguments, message):
    options = ["--data-root", labelled, "--work-dir", tmp_path / "run", "--cfg-options", "evaluations.test_sets.k=5"]
    one_line(tool("test.py", CONFIG, "random", *options, *arguments), message)
    assert not (tmp_path / "run" / "features").exists()


def test_a_classifier_has_no_further_test_sets(labelled):
    config = "semaim/configs/finetune/vit_tiny_scenes.py"
    done = tool("test.py", config, "x.pth", "--data-root", labelled, "--test-root", f"a={labelled}")
    one_line(done, "--test-root is for frozen features: semaim/configs/test_sets, or --tasks test_sets")


def test_features_of_a_set_that_lacks_classes_have_their_labels():
    assert predicted_among(np.array([4, 1, 1]), 5) == [1, 4] and predicted_among(np.arange(5), 5) is None
