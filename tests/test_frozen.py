"""One pass over the images for several tasks, through the tools: what it writes, reuses and refuses."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import flags, one_line, results, tool
from PIL import Image

from semaim.data.contents import digest_of_files, state_of
from semaim.data.labelled import LabelledImages
from semaim.engine.config import load_config
from semaim.engine.testing import prepare_test
from semaim.errors import UserError
from semaim.outcomes import read_outcomes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "semaim/configs/knn/vit_tiny_scenes.py"
FAST = "semaim/configs/linear/vit_tiny_scenes_fast.py"
NETWORK = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2}
SMALL = {**{f"model.network.{key}": value for key, value in NETWORK.items()}, "num_workers": 0, "images_per_gpu": 4}
SHORT = {
    "evaluation.ks": "[3,10]", "evaluations.fast_probe.epochs": 2, "evaluations.fast_probe.batch": 8,
    "evaluations.fast_attentive.epochs": 2, "evaluations.fast_attentive.batch": 8,
}  # fmt: skip
TASKS = "knn,fast_probe,fast_attentive"


@pytest.fixture
def images(labelled, tmp_path):
    """A copy of the scenes that a test may change."""
    return Path(shutil.copytree(labelled, tmp_path / "images"))


def measure(source, data, folder, *more, tasks=TASKS, config=CONFIG, options=None):
    """All tasks in one pass."""
    options = SMALL | SHORT if options is None else options
    others = set(TASKS.split(",")) - set(tasks.split(","))
    changed = flags({key: value for key, value in options.items() if not others.intersection(key.split("."))})
    line = [config, source, *more, "--tasks", tasks, "--data-root", data, "--work-dir", folder, *changed]
    done = tool("test.py", *line)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def times(folder):
    """When each file of stored features was written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("features/*/*"))}


def test_a_pass_serves_all_tasks_and_knows_which_images_it_has_seen(pretrained, images, tmp_path):
    run = tmp_path / "run"
    done = measure(pretrained, images, run)
    assert done.stdout.count("features written to") == 2, "training and validation images, once each"
    assert sorted(path.name for path in (run / "features/val").iterdir()) == [
        "done.json", "features.npy", "labels.npy", "tokens.npy",
    ]  # fmt: skip
    names, made = LabelledImages(str(images), split="val").names(), times(run)
    for task, title, key in (
        ("knn", "k-NN", "knn3_top1"),
        ("fast_probe", "fast linear probe", "probe_top1"),
        ("fast_attentive", "fast attentive probe", "attentive_top1"),
    ):
        found, outcomes = results(run / task), read_outcomes(run / task)
        assert found["task"] == title and (found["train_images"], found["val_images"]) == (40, 10)
        assert outcomes.names.tolist() == names and names[0].startswith("val/")
        assert 100 * outcomes.scores[key].mean() == pytest.approx(found["metrics"][key])
    assert not (run / "results.json").exists()
    assert results(run / "knn")["cfg_options"]["evaluation.ks"] == [3, 10]
    options = results(run / "fast_probe")["cfg_options"]
    assert (options["evaluation.epochs"], "evaluation.ks" in options) == (2, False)

    # An image of the same name and size, changed in place.
    path = next(path for path in sorted(images.rglob("*.jpg")) if "train" in path.parts)
    content = bytearray(path.read_bytes())
    pixels, state = np.array(Image.open(path)), path.stat()
    path.unlink()
    quality = next(q for q in range(1, 96) if small_enough(255 - pixels, path, q, len(content)))
    path.write_bytes(path.read_bytes() + b"\0" * (len(content) - path.stat().st_size))
    assert quality and path.stat().st_size == state.st_size and path.stat().st_mtime_ns != state.st_mtime_ns
    before = np.load(run / "features/train/features.npy")
    done = measure(pretrained, images, run, tasks="knn")
    assert "features/train are extracted anew: files changed" in done.stdout
    assert "10 features read from" in done.stdout and "40 features written to" in done.stdout
    after = np.load(run / "features/train/features.npy")
    assert (before != after).any(axis=1).sum() == 1
    assert {str(name) for name, time in made.items() if times(run).get(name) == time} == {
        f"features/val/{name}" for name in ("done.json", "features.npy", "labels.npy", "tokens.npy")
    }


def small_enough(pixels, path, quality, most):
    """Write a JPEG file; whether it has at most so many bytes."""
    Image.fromarray(pixels).save(path, quality=96 - quality)
    return path.stat().st_size <= most


@pytest.mark.slow
def test_each_task_finds_what_it_finds_alone_and_two_processes_find_the_same(pretrained, labelled, tmp_path):
    measure(pretrained, labelled, tmp_path / "one")
    measure(pretrained, labelled, tmp_path / "two", 2)
    alone = {
        "knn": (CONFIG, {"evaluation.ks": "[3,10]"}),
        "fast_probe": ("semaim/configs/linear/vit_tiny_scenes_fast.py", {}),
        "fast_attentive": ("semaim/configs/attentive/vit_tiny_scenes_fast.py", {}),
    }
    for task, (config, options) in alone.items():
        short = {} if options else {"evaluation.epochs": 2, "evaluation.batch": 8}
        line = [config, pretrained, "--data-root", labelled, "--work-dir", tmp_path / task]
        done = tool("test.py", *line, *flags(SMALL | options | short))
        assert done.returncode == 0, done.stderr
        expected, outcomes = results(tmp_path / task), read_outcomes(tmp_path / task)
        for folder in (tmp_path / "one" / task, tmp_path / "two" / task):
            found, scores = results(folder), read_outcomes(folder)
            for key in ("metrics", "reported", "task", "stage", "features", "images", "method", "load_report"):
                assert found[key] == expected[key], key
            assert scores.scores.keys() == outcomes.scores.keys() and (scores.names == outcomes.names).all()
            assert all(np.array_equal(rows, outcomes.scores[key]) for key, rows in scores.scores.items())
    one, two = (np.load(tmp_path / name / "features/train/tokens.npy") for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    done = tool("results_table.py", tmp_path / "one")
    assert all(title in done.stdout for title in ("k-NN", "fast linear probe", "fast attentive probe")), done.stdout


@pytest.mark.slow
def test_random_weights_and_encoders_of_timm(labelled, tmp_path):
    options = SMALL | SHORT
    measure("random", labelled, tmp_path / "random", options=options | {"evaluations.fast_attentive.pool": "ep_all"})
    assert results(tmp_path / "random/fast_attentive")["checkpoint"] is None
    plain = {"num_workers": 0, **SHORT, "evaluations.fast_attentive.pool": "aim", "evaluations.fast_attentive.heads": 3}
    line = ["random", labelled, tmp_path / "timm", "--arch", "vit_tiny_patch16_224"]
    measure(*line, config="semaim/configs/knn/plain_vit.py", options=plain | {"dataset.crop_pct": 0.9})
    assert results(tmp_path / "timm/fast_attentive")["backbone"] == "vit_tiny_patch16_224"
    assert np.load(tmp_path / "timm/features/val/tokens.npy", mmap_mode="r").shape == (10, 197, 192)


def test_what_cannot_work_is_refused_before_anything_is_extracted(pretrained, labelled, tmp_path):
    def refused(message, tasks=TASKS, config=CONFIG, **options):
        with pytest.raises(UserError, match=message) as error:
            cfg = load_config(ROOT / config, {**SMALL, **options})
            cfg.dataset.root, cfg.work_dir = str(labelled), str(tmp_path / "out")
            cfg.tasks = tasks.split(",")
            prepare_test(cfg, str(pretrained))
        assert "\n" not in str(error.value)

    refused("--tasks: task is 'knm': did you mean knn", tasks="knn,knm")
    refused("--tasks: finetune does not read frozen features: choose from knn, fast_probe", tasks="finetune")
    refused("--tasks is for configs of frozen features", config="semaim/configs/linear/vit_tiny_scenes.py")
    refused("evaluations.few_labels.draws: few_labels is not measured here", **{"evaluations.few_labels.draws": 2})
    refused("k = 50 neighbours of 40", **{"evaluation.ks": [50, 60]})
    refused("k-NN: ks .*10.5.*: give whole numbers from 1", **{"evaluation.ks": [3, 10.5]})
    for rates in ((0.0,), (0.1, float("nan")), ("1",)):
        refused("learning rates .*above 0", **{"evaluations.fast_probe.lrs": rates})
    for length in ({"epochs": 0}, {"epochs": 1.5}, {"batch": 0}):
        for task in ("fast_probe", "fast_attentive"):
            changed = {f"evaluations.{task}.{key}": value for key, value in length.items()}
            refused("a probe of .* epochs in batches of .*: give whole numbers from 1", **changed)
    refused("share of 2 cannot be held out", **{"evaluations.fast_attentive.held_out": 2})
    refused("7 queries and d_out 1 do not divide the 32", **{"evaluations.fast_attentive.queries": 7})
    refused("one image cannot be normalised: set batch to 2", **{"evaluations.fast_attentive.batch": 1})
    refused("unknown config key evaluations.fast_probe.epoch: did you mean", **{"evaluations.fast_probe.epoch": 2})
    refused("knn: evaluation .*unexpected keyword argument 'k'", tasks="knn", config=FAST, **{"evaluations.knn.k": 2})
    refused("evaluations: task is 'fastprobe': did you mean", **{"evaluations.fastprobe.epochs": 2})
    refused("pool 'ep' gives no vectors", **{"model.network.pool": "ep"})
    # 50 images of 17 tokens of 32 channels, two bytes each, are 54 kB.
    refused(
        r"fast_attentive: the tokens of 50 images, 17 x 32 values of fp16 each, take .* more than most_gb=5e-05: set"
        " --cfg-options most_gb=1, or train the probe on images, .*configs/attentive/vit_base_90e.py",
        **{"most_gb": 5e-5},
    )
    refused("most_gb is 0", **{"most_gb": 0})
    done = tool("test.py", CONFIG, pretrained, "--tasks", "knn,knm", "--data-root", labelled, *flags(SMALL))
    one_line(done, "--tasks: task is 'knm': did you mean knn?")
    assert not (tmp_path / "out").exists()


def test_another_network_of_the_same_weights_has_other_features(labelled, tmp_path):
    kept = []
    for heads in (2, 4):
        options = SMALL | {"evaluation.ks": "[3]", "model.network.num_heads": heads}
        done = measure("random", labelled, tmp_path, tasks="knn", options=options)
        kept.append(np.array(np.load(tmp_path / "features/val/features.npy")))
    assert "features/val are extracted anew: network changed" in done.stdout
    assert np.abs(kept[0] - kept[1]).max() > 0.01


def test_files_are_known_by_path_size_time_and_some_bytes(tmp_path):
    paths = [tmp_path / f"val/a/{name}.jpg" for name in range(2000)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        path.write_text("12")

    def digest(root=tmp_path, rows=paths):
        return digest_of_files([os.fsencode(path) for path in rows], root)

    first = digest()
    assert first == digest(f"{tmp_path}/.//") != digest(rows=paths[:-1])
    moved = tmp_path.parent / f"{tmp_path.name}_moved"
    tmp_path.rename(moved)  # with its files' times
    try:
        assert digest(moved, [moved / path.relative_to(tmp_path) for path in paths]) == first
    finally:
        moved.rename(tmp_path)
    state = paths[1500].stat()
    for text, time in (("12", state.st_mtime_ns + 1), ("123", state.st_mtime_ns), ("13", state.st_mtime_ns)):
        paths[1500].write_text(text)
        os.utime(paths[1500], ns=(state.st_atime_ns, time))
        assert digest() != first
    paths[1500].write_text("12")
    os.utime(paths[1500], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest() == first
    # Of a large file its start, middle and end; of an image in a shard the same of its own bytes.
    shard = tmp_path / "shard.tar"
    state, hashes = None, []
    for place in (None, 0, 4095, 50_000, 99_999, 5000):
        content = bytearray(100_000)
        if place is not None:
            content[place] = 1
        shard.write_bytes(content)
        state = state or shard.stat()
        os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
        size, time, whole = state_of(os.fsencode(shard))
        assert (size, time) == (100_000, state.st_mtime_ns)
        hashes.append((whole, state_of(os.fsencode(f"{shard}?4000+200=a.jpg"))[2]))
    assert len({whole for whole, _ in hashes}) == 5 and hashes[0][0] == hashes[5][0], "byte 5000 is in no sample"
    assert [part != hashes[0][1] for _, part in hashes] == [False, False, True, False, False, False]
    paths[3].unlink()
    with pytest.raises(UserError, match="cannot read image .*3.jpg: No such file"):
        digest()


def test_what_stands_in_done_json(pretrained, labelled, tmp_path):
    measure(pretrained, labelled, tmp_path / "run", tasks="knn")
    done = json.loads((tmp_path / "run/features/train/done.json").read_text())
    assert set(done["key"]) == {"weights", "network", "pooling", "precision", "files", "labels", "transform"}
    assert (done["length"], done["shapes"]) == (40, {"features": [32]}) and done["key"]["precision"] == "fp32"
