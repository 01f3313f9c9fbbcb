"""Fine-tuning, linear probing, k-NN and the fast probe, through the command-line tools on the built-in scenes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import flags, losses, one_line, results, tool

from semaim.checkpoints.files import read_checkpoint, write_checkpoint
from semaim.data.labelled import LabelledImages
from semaim.engine.config import load_config
from semaim.engine.testing import prepare_test
from semaim.engine.testing import test as evaluate
from semaim.engine.training import prepare_training
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.outcomes import read_outcomes

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2}
ONE_EPOCH = {"train_cfg.max_epochs": 1, "param_scheduler.warmup": 0}
CONFIG = "semaim/configs/{}/vit_tiny_scenes.py"


def options(**more):
    """--cfg-options that make a stage small."""
    changed = {
        **{f"model.network.{key}": value for key, value in NETWORK.items()},
        "num_workers": 0,
        "images_per_gpu": 4,
        **more,
    }
    return flags(changed)


def training(**more):
    """The same, for a stage that trains."""
    small = {
        "total_batch_size": 8,
        "images_per_gpu": 8,
        "train_cfg.max_epochs": 2,
        "default_hooks.checkpoint.interval": 1,
        "default_hooks.logger.interval": 1,
        "log_processor.window_size": 1,
    }
    return options(**{**small, **more})


@pytest.mark.parametrize("stage", ["finetune", "linear", "attentive"])
@pytest.mark.slow
def test_a_stage_trains_validates_resumes_and_is_measured(stage, labelled, pretrained, tmp_path):
    config = CONFIG.format(stage)
    mixes = {
        "model.mixup": 0.8,
        "model.cutmix": 1.0,
        "dataset.augment": "randaugment",
        "model.network.drop_path_rate": 0.2,
    }
    if stage != "finetune":
        mixes = {}
    whole = tmp_path / "whole"
    places = ["--data-root", labelled, "--pretrained", pretrained]
    done = tool("train.py", config, *places, "--work-dir", whole, *training(**mixes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"top1: \d", done.stdout) and "32 x 32" not in done.stderr
    trained = read_checkpoint(whole / "epoch_2.pth")
    assert trained["classes"] == sorted(path.name for path in (labelled / "train").iterdir())
    start = read_checkpoint(pretrained)["model"]
    same = all(torch.equal(trained["model"][name], start[name]) for name in start if name.startswith("blocks."))
    assert same == (stage != "finetune"), "a probe leaves the encoder as it is, fine-tuning does not"

    # Resumed after the first epoch: the same losses to the last bit, and the same accuracy.
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copy(whole / "epoch_1.pth", parts)
    (parts / "latest.pth").symlink_to("epoch_1.pth")
    done = tool("train.py", config, *places, "--work-dir", parts, "--resume", *training(**mixes))
    assert done.returncode == 0, done.stderr
    again = losses(parts)
    assert again and again == {step: loss for step, loss in losses(whole).items() if step in again}
    assert max(again) == max(losses(whole)) and min(again) > 1
    assert results(parts)["metrics"] == results(whole)["metrics"]
    # Cut in its last validation, it does that.
    (parts / "results.json").unlink()
    done = tool("train.py", config, *places, "--work-dir", parts, "--resume", *training(**mixes))
    assert done.returncode == 0, done.stderr
    assert results(parts)["metrics"] == results(whole)["metrics"] and losses(parts) == again

    # Measured by the other tool, on one process and on two (of 10 images: both have their own).
    for processes in (1, 2):
        out = tmp_path / f"test{processes}"
        arguments = [config, whole / "latest.pth", processes, "--data-root", labelled, "--work-dir", out]
        done = tool("dist_test.sh", *arguments, *options())
        assert done.returncode == 0, done.stdout + done.stderr
        assert results(out)["metrics"] == pytest.approx(results(whole)["metrics"], rel=1e-5)
        assert results(out)["val_images"] == 10
        found, expected = read_outcomes(out), read_outcomes(whole)
        assert found.names.tolist() == expected.names.tolist() == LabelledImages(str(labelled), split="val").names()
        assert found.scores["top1"].tolist() == expected.scores["top1"].tolist()
        assert 100 * found.scores["top1"].mean() == pytest.approx(results(out)["metrics"]["top1"])


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_and_count_odd_numbers_once(labelled, pretrained, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(labelled, odd)
    spare = next(folder for folder in sorted((odd / "val").iterdir()) if len(list(folder.glob("*"))) > 1)
    next(iter(sorted(spare.glob("*")))).unlink()
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = ["--pretrained", pretrained, "--data-root", odd, "--work-dir", out]
        small = training(images_per_gpu=8 // processes, **ONE_EPOCH)
        done = tool("dist_train.sh", CONFIG.format("finetune"), processes, *arguments, *small)
        assert done.returncode == 0, done.stdout + done.stderr
        found[processes] = losses(out), results(out)
    first, second = found[1][0], found[2][0]
    assert first.keys() == second.keys() and len(first) == 5
    for step in first:
        assert first[step] == pytest.approx(second[step], abs=2e-4)
    assert found[1][1]["val_images"] == found[2][1]["val_images"] == 9
    assert found[2][1]["metrics"]["loss"] == pytest.approx(found[1][1]["metrics"]["loss"], abs=2e-3)


@pytest.mark.slow
def test_batch_normalisation_of_a_probe_is_the_same_in_all_processes(labelled, pretrained, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    arguments = ["--pretrained", pretrained, "--data-root", labelled, "--work-dir", out]
    done = tool("dist_train.sh", CONFIG.format("linear"), 2, *arguments, *training(images_per_gpu=4))
    assert done.returncode == 0, done.stderr
    arguments = [CONFIG.format("linear"), out / "latest.pth", "--data-root", labelled, "--work-dir", again]
    assert tool("test.py", *arguments, *options()).returncode == 0
    # Were the second process to validate with its own statistics, the sums would differ.
    assert results(again)["metrics"] == pytest.approx(results(out)["metrics"], rel=1e-5)


@pytest.mark.slow
def test_knn_and_fast_probe(labelled, pretrained, tmp_path):
    arguments = ["--data-root", labelled, "--work-dir", tmp_path / "out"]
    knn = options(**{"evaluation.ks": "3,10"})
    done = tool("test.py", CONFIG.format("knn"), "--pretrained", pretrained, *arguments, *knn)
    assert done.returncode == 0, done.stdout + done.stderr
    first = results(tmp_path / "out")
    assert set(first["metrics"]) == {"knn3_top1", "knn3_top5", "knn10_top1", "knn10_top5"}
    assert first["checkpoint"] == str(pretrained) and first["train_images"] == 40 and first["val_images"] == 10
    assert "40 x" not in done.stderr and "k-NN, k =   3" in done.stdout and first["features"] == "class token"

    # Features of the same weights and images are read, not extracted again; two processes find the same.
    features = tmp_path / "out/features/train/features.npy"
    made = features.stat().st_mtime_ns
    done = tool("dist_test.sh", CONFIG.format("knn"), pretrained, 2, *arguments, *knn)
    assert done.returncode == 0, done.stdout + done.stderr
    assert features.stat().st_mtime_ns == made and results(tmp_path / "out")["metrics"] == first["metrics"]
    shutil.rmtree(tmp_path / "out")
    done = tool("dist_test.sh", CONFIG.format("knn"), pretrained, 2, *arguments, *knn)
    assert done.returncode == 0 and results(tmp_path / "out")["metrics"] == first["metrics"], done.stderr

    # Another pooling, other features; a k beyond the training images is left out, and one at least remains.
    made = features.stat().st_mtime_ns
    normed = {"model.network.pool": "avg", "model.network.fc_norm": True}
    few = options(**normed, **{"evaluation.ks": "10,41,200"})
    done = tool("test.py", CONFIG.format("knn"), pretrained, *arguments, *few)
    assert done.returncode == 0 and "k = 41, 200 left out, there are 40 training images" in done.stdout, done.stderr
    again = results(tmp_path / "out")
    assert set(again["metrics"]) == {"knn10_top1", "knn10_top5"} and features.stat().st_mtime_ns != made
    assert again["features"] == "mean of the patches, layer norm"
    none = options(**normed, **{"evaluation.ks": "50,41"})
    one_line(tool("test.py", CONFIG.format("knn"), pretrained, *arguments, *none), "k = 41 neighbours of 40")

    # Other weights, other features.
    made = features.stat().st_mtime_ns
    done = tool("test.py", CONFIG.format("knn"), "random", *arguments, *knn)
    assert done.returncode == 0 and features.stat().st_mtime_ns != made, done.stderr
    assert results(tmp_path / "out")["checkpoint"] is None

    probe = "semaim/configs/linear/vit_tiny_scenes_fast.py"
    done = tool("test.py", probe, pretrained, *arguments, *options(**{"evaluation.epochs": 2, "evaluation.batch": 8}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results(tmp_path / "out")["metrics"]) == {"probe_top1", "probe_top5", "probe_lr"}
    assert "held-out training images" in done.stdout


def test_from_scratch_and_with_few_labels_says_so(labelled, tmp_path):
    arguments = ["--data-root", labelled, "--work-dir", tmp_path / "out"]
    small = training(**ONE_EPOCH, **{"dataset.images_per_class": 2})
    done = tool("train.py", CONFIG.format("finetune"), *arguments, *small)
    assert done.returncode == 0 and "training starts from random weights" in done.stdout, done.stderr
    found = results(tmp_path / "out")
    assert found["checkpoint"] is None and (found["train_images"], found["val_images"]) == (10, 10)  # of five classes
    assert max(losses(tmp_path / "out")) == 1, "a step of 8 images; 2 wait for the next epoch"


@pytest.mark.slow
def test_mae_pretrains_resumes_and_is_fine_tuned(labelled, tmp_path):
    config = "semaim/configs/pretrain/mae_vit_tiny_scenes.py"
    out = tmp_path / "mae"
    small = training(**{"model.network.decoder_embed_dim": 32, "model.network.decoder_num_heads": 2,
                        "param_scheduler.warmup": 0.5})  # fmt: skip
    done = tool("pretrain.sh", config, 1, "--data-root", labelled, "--work-dir", out, *small)
    assert done.returncode == 0 and "MAE: mask ratio 0.75" in done.stdout, done.stdout + done.stderr
    before = losses(out)
    (out / "latest.pth").unlink()
    (out / "latest.pth").symlink_to("epoch_1.pth")
    done = tool("pretrain.sh", config, 2, "--data-root", labelled, "--work-dir", out, "--resume", *small)
    assert done.returncode == 0, done.stderr
    assert losses(out)[10] == pytest.approx(before[10], abs=1e-4)
    arguments = ["--data-root", labelled, "--work-dir", tmp_path / "knn", "--pretrained", out / "latest.pth"]
    done = tool("test.py", CONFIG.format("knn"), *arguments, *options(**{"evaluation.ks": "3,"}))
    assert done.returncode == 0 and "decoder_blocks" in done.stdout, done.stdout + done.stderr


def test_bad_input_is_one_line(labelled, pretrained, tmp_path):
    """What is wrong is said before anything starts; through the tool itself once for each kind of stage."""
    finetune = CONFIG.format("finetune")
    small = dict(pair.split("=") for pair in training()[1:])

    def fails(message, data=labelled, weights=pretrained, processes=2, **more):
        cfg = load_config(ROOT / finetune, {**{key: int(value) for key, value in small.items()}, **more})
        cfg.dataset.root, cfg.pretrained = str(data), str(weights)
        with pytest.raises(UserError, match=message) as error:
            prepare_training(cfg, processes)
        assert "\n" not in str(error.value)

    def data(name):
        shutil.copytree(labelled, tmp_path / name)
        return tmp_path / name

    gone = data("gone")
    lost = sorted((gone / "val").iterdir())[0]
    shutil.rmtree(lost)
    fails(f"gone/val lacks the class folder {lost.name}", data=gone)
    done = tool("train.py", finetune, "--data-root", gone, "--work-dir", tmp_path / "out", *training())
    one_line(done, f"gone/val lacks the class folder {lost.name}")
    assert not (tmp_path / "out").exists()
    lost.mkdir()
    fails(f"no images in {lost}", data=gone)
    empty = data("empty")
    shutil.rmtree(empty / "val")
    fails("no such folder: ", data=empty)
    (empty / "val").mkdir()
    fails("no class folders in ", data=empty)
    fails("30 x 30 pixels is no whole number of 8 x 8 patches", **{"model.network.img_size": 30})
    fails("classes, the config 3: set --cfg-options", **{"model.network.num_classes": 3})
    fails("width 32", **{"model.network.embed_dim": 64})
    fails("1 is odd: set an even images_per_gpu", **{"model.mixup": 0.8, "images_per_gpu": 1})
    fails("no.pth", weights=tmp_path / "no.pth")
    write_checkpoint({"model": {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    fails("no ViT encoder in", weights=tmp_path / "resnet.pth")

    def cannot_test(message, stage, weights, data=labelled):
        cfg = load_config(ROOT / CONFIG.format(stage), {f"model.network.{key}": v for key, v in NETWORK.items()})
        cfg.dataset.root, cfg.work_dir = str(data), str(tmp_path / "test")
        with pytest.raises(UserError, match=message) as error:
            prepare_test(cfg, weights)
            evaluate(cfg, weights)
        assert "\n" not in str(error.value)

    classifier = Classifier(5, "avg", patch_size=8, **NETWORK).state_dict()
    tuned = tmp_path / "tuned.pth"
    classes = sorted(path.name for path in (labelled / "train").iterdir())
    write_checkpoint({"format": "semaim", "model": classifier, "classes": classes, "config": None}, tuned)
    one_line(tool("test.py", finetune, "--data-root", labelled), "name a checkpoint: tools/test.py CONFIG FILE")
    cannot_test("has no classifier: fine-tune it first", "finetune", str(pretrained))
    with pytest.raises(UserError, match="this config pretrains"):
        prepare_test(load_config(ROOT / "semaim/configs/pretrain/mae_vit_tiny_scenes.py"), str(pretrained))
    cannot_test("evaluate it with the config of its training", "linear", str(tuned))
    fewer, renamed = data("fewer"), data("renamed")
    for split in ("train", "val"):
        shutil.rmtree(fewer / split / lost.name)
        (renamed / split / lost.name).rename(renamed / split / "another")
    cannot_test("knows 5 classes, .* has 4", "finetune", str(tuned), data=fewer)
    cannot_test(f"knows the class {lost.name}, which", "finetune", str(tuned), data=renamed)


def test_slurm_starts_one_task_per_gpu(tmp_path):
    """srun and scontrol are played by scripts that record, and run the task as Slurm would."""
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\necho "$@" > "$OUT/srun"\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        "export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_ID=7\n"
        "export SLURM_JOB_NODELIST=n\n"
        '"$@"\n'
    )
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\necho node0; echo node1\n")
    (tmp_path / "python3").write_text('#!/usr/bin/env bash\nenv > "$OUT/env"; echo "$@" > "$OUT/python"\n')
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(ROOT / "tools/slurm_train.sh", tools)
    for path in ("srun", "scontrol", "python3"):
        (tmp_path / path).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "GPUS": "4",
        "GPUS_PER_NODE": "2",
    }
    line = [tools / "slurm_train.sh", "gpu", "name", "config.py", "work", "--pretrained", "a b.pth"]
    done = subprocess.run([*map(str, line)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "srun").read_text()
    assert "--partition=gpu --job-name=name --gres=gpu:2 --ntasks=4 --ntasks-per-node=2" in asked
    started = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert (started["RANK"], started["LOCAL_RANK"], started["WORLD_SIZE"]) == ("3", "1", "4")
    assert (started["MASTER_ADDR"], started["MASTER_PORT"]) == ("node0", "20007")
    assert "tools/train.py config.py --work-dir work --pretrained a b.pth" in (tmp_path / "python").read_text()
    done = subprocess.run([str(line[0]), "gpu"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stdout
