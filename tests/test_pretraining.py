"""Training runs: they learn, resume to the last bit, split over processes, and stop with one clear line."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from operations import Operations
from safetensors.torch import save_file

from semaim.checkpoints.files import newest_checkpoint, read_checkpoint
from semaim.engine.launcher import check_processes
from semaim.engine.runner import Resumable
from semaim.engine.saving import choose_checkpoint
from semaim.engine.teachers import build_teacher
from semaim.engine.training import prepare_training, train
from semaim.errors import UserError
from semaim.results.logs import read_scalars

ROOT = Path(__file__).resolve().parent.parent


def losses(cfg):
    """iteration -> loss, all digits."""
    return {line["iter"]: line["loss"] for line in read_scalars(cfg.work_dir)}


def flags(cfg):
    """The command line of a config of `tiny_config`: what it changes, as --cfg-options."""
    network = cfg.model.network
    options = {
        **{f"model.network.{key}": network[key] for key in ("img_size", "embed_dim", "num_heads", "depth", "order")},
        "total_batch_size": cfg.total_batch_size,
        "base_lr": cfg.base_lr,
        "num_workers": cfg.num_workers,
        "train_cfg.max_epochs": cfg.train_cfg.max_epochs,
        "param_scheduler.warmup": cfg.param_scheduler.warmup,
        "default_hooks.logger.interval": 1,
        "default_hooks.pictures.interval": cfg.default_hooks.pictures.interval,
        "default_hooks.checkpoint.interval": cfg.default_hooks.checkpoint.interval,
        "log_processor.window_size": 1,
    }
    places = ["--data-root", cfg.dataset.root, "--work-dir", cfg.work_dir]
    return [*places, "--cfg-options", *(f"{key}={value}" for key, value in options.items())]


def command(*arguments, **options):
    """tools/pretrain.sh, run for real."""
    line = [str(ROOT / "tools/pretrain.sh"), *map(str, arguments)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=env, **options)


SCENES = "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"


def test_a_run_learns_writes_and_logs(tiny_config):
    cfg = tiny_config(**{"default_hooks.pictures.interval": 1, "train_cfg.max_epochs": 4})
    train(cfg)
    curve = losses(cfg)
    assert len(curve) == 4 * 40 // 8
    assert curve[20] < curve[1] - 0.1
    names = {path.name for path in Path(cfg.work_dir).iterdir()}
    assert {"epoch_4.pth", "epoch_3.pth", "epoch_2.pth", "latest.pth", "orders"} <= names
    assert "epoch_1.pth" not in names, "keep=3"
    assert os.readlink(Path(cfg.work_dir) / "latest.pth") == "epoch_4.pth"
    assert {path.name for path in (Path(cfg.work_dir) / "orders").iterdir()} == {
        f"epoch_{epoch:04d}.png" for epoch in range(5)
    }
    line = read_scalars(cfg.work_dir)[-1]
    assert {"loss", "lr", "grad_norm", "images_per_second", "data_share", "epoch", "iter"} <= set(line)
    assert line["images_per_second"] > 0 and 0 <= line["data_share"] <= 1
    assert list(Path(cfg.work_dir).glob("*/vis_data/events.out.tfevents.*"))
    log = next(Path(cfg.work_dir).glob("*/*.log")).read_text()
    assert "batch 8 = 1 process x 8 images x 1 accumulated; learning rate 0.001 = 0.032 x 8 / 256" in log
    assert "images/s" in log and "ETA" in log and "data " in log


@pytest.mark.parametrize("guide", ["online", "ema"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tiny_config, guide):
    options = {"model.network.drop_path_rate": 0.3, "model.network.guide": guide, "train_cfg.max_epochs": 3}
    if guide == "ema":
        options["model.network.target"] = {"_delete_": True, "type": "FeatureTarget"}
    whole, parts = tiny_config("whole", **options), tiny_config("parts", **options)
    train(whole)
    os.makedirs(parts.work_dir)
    shutil.copy(Path(whole.work_dir) / "epoch_1.pth", parts.work_dir)
    train(parts, str(Path(parts.work_dir) / "epoch_1.pth"))
    expected = {i: loss for i, loss in losses(whole).items() if i > 5}
    assert losses(parts) == expected
    ours, theirs = (read_checkpoint(Path(cfg.work_dir) / "epoch_3.pth") for cfg in (parts, whole))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        for index, state in theirs["optimizer"]["state"].items():
            assert torch.equal(ours["optimizer"]["state"][index][key], state[key])
    assert ours["history"]["train/loss"][0].equal(theirs["history"]["train/loss"][0])
    moved = [name for name in theirs["model"] if name.startswith("ema.")]
    assert bool(moved) == (guide == "ema")
    if moved:
        start = read_checkpoint(Path(whole.work_dir) / "epoch_1.pth")["model"]
        assert any(not torch.equal(start[name], theirs["model"][name]) for name in moved)


@pytest.mark.slow
def test_two_processes_and_accumulation_train_as_one_process(tiny_config):
    one, two, accumulated = tiny_config("one"), tiny_config("two"), tiny_config("accumulated", images_per_gpu=4)
    train(one)
    done = command(SCENES, 2, *flags(two), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "batch 8 = 2 processes x 4 images x 1 accumulated" in done.stderr + done.stdout
    alone, together = losses(one), losses(two)
    assert len(alone) == len(together) == 10
    assert together[1] == pytest.approx(alone[1], abs=1e-6)
    assert all(together[i] == pytest.approx(alone[i], abs=1e-4) for i in alone)
    train(accumulated)
    halves = losses(accumulated)
    assert (halves[1] + halves[2]) / 2 == pytest.approx(alone[1], abs=1e-6)
    assert (halves[19] + halves[20]) / 2 == pytest.approx(alone[10], abs=1e-4)

    # What two processes saved, one goes on with, and with accumulated steps.
    again = tiny_config("two", images_per_gpu=2, **{"train_cfg.max_epochs": 3})
    runner = train(again, choose_checkpoint(again, "auto"))
    assert runner.iter == 3 * 5 * 4 and read_checkpoint(newest_checkpoint(again.work_dir))["step"] == 15


@pytest.mark.slow
def test_a_divided_run_is_the_whole_one_and_each_goes_on_as_the_other(tiny_config):
    options = {"model.network.guide": "ema", "default_hooks.pictures.interval": 1, "train_cfg.max_epochs": 1}
    options["param_scheduler.warmup"] = 0.4
    whole, divided = tiny_config("whole", **options), tiny_config("divided", **options)
    extra = ["model.network.guide=ema"]
    for cfg, fsdp in ((whole, False), (divided, True)):
        done = command(SCENES, 2, *flags(cfg), *extra, f"fsdp={fsdp}", cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-5) and len(losses(whole)) == 5
    one, other = (read_checkpoint(newest_checkpoint(cfg.work_dir)) for cfg in (whole, divided))
    assert one["model"].keys() == other["model"].keys()
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-3, atol=1e-5)
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(other["optimizer"]["state"][number][name], value, rtol=1e-3, atol=1e-5)
    pictures = [Path(cfg.work_dir) / "orders/epoch_0001.png" for cfg in (whole, divided)]
    assert all(path.stat().st_size > 1000 for path in pictures)

    # The divided run goes on in one process alone, the whole one divided.
    longer = {**options, "train_cfg.max_epochs": 2}
    alone, two = tiny_config("divided", **longer), tiny_config("whole", **longer)
    train(alone, choose_checkpoint(alone, "auto"))
    done = command(SCENES, 2, "--resume", "--override", *flags(two), *extra, "fsdp=True", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(two) == pytest.approx(losses(alone), rel=1e-3) and len(losses(two)) == 10


def test_a_process_holds_its_share_of_a_divided_model(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        "import os, torch\n"
        "from semaim.engine.launcher import join, leave\n"
        "from semaim.engine.sharding import is_sharded, shard\n"
        "from semaim.models import PixelTarget, SemAIM\n"
        "world = join()\n"
        "model = SemAIM(PixelTarget((8, 8)), img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)\n"
        "whole = sum(p.numel() for p in model.parameters())\n"
        "model = shard(model)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), fused=True)\n"
        "model(torch.randn(2, 3, 32, 32), torch.rand(2, 16)).loss.backward()\n"
        "optimizer.step()\n"
        "mine = sum(p.to_local().numel() for p in model.parameters())\n"
        "state = sum(s['exp_avg'].to_local().numel() for s in optimizer.state.values())\n"
        "line = f'{is_sharded(model)} {world} {mine / whole} {state / whole}\\n'\n"
        "os.write(1, line.encode())\n"  # whole: the other process writes to the same pipe
        "leave()\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    shares = [line.split() for line in done.stdout.splitlines()]
    assert len(shares) == 2
    for sharded, world, mine, state in shares:
        assert (sharded, world) == ("True", "2")
        assert 0.45 < float(mine) < 0.55 and 0.4 < float(state) < 0.55


def test_compile_is_of_the_blocks_and_not_of_the_step(tiny_config, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    monkeypatch.setattr("semaim.engine.compiling.obstacle", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("mmengine compiles the whole step"))
    train(tiny_config(compile=True))
    assert compiled and set(compiled) == {"Block"}


def test_every_block_is_compiled(tiny_config, monkeypatch):
    counters = torch._dynamo.utils.counters
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compile_it(module, backend="eager")
    )  # soon done
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    torch._dynamo.reset()
    counters.clear()
    deep = {"model.network.depth": 12, "model.network.decoder_depth": 12, "model.network.drop_path_rate": 0.1}
    train(tiny_config(compile=True, **deep))
    assert counters["frames"]["total"] == counters["frames"]["ok"] >= 12


def test_activation_checkpointing_trains_the_same(tiny_config):
    plain_run, recomputed = tiny_config("plain"), tiny_config("cp", **{"model.network.with_cp": True})
    train(plain_run)
    train(recomputed)
    expected = losses(plain_run)
    assert all(loss == pytest.approx(expected[i], abs=1e-6) for i, loss in losses(recomputed).items())


def test_a_run_may_look_in_fp32(tiny_config):
    """Without autocast, as on a CPU, it changes nothing."""
    fp32, same = tiny_config("fp32", **{"model.network.look_precision": "fp32"}), tiny_config("same")
    assert same.model.network.look_precision == "same"
    runner = train(fp32)
    train(same)
    assert runner.model.network.look_precision == "fp32" and losses(fp32) == losses(same)


def test_a_teacher_from_a_local_file_guides(tiny_config, tmp_path):
    name = "test_vit"
    torch.manual_seed(0)
    network = timm.create_model(name, dynamic_img_size=True)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    teacher = {"_delete_": True, "type": "Teacher", "name": name, "weights": str(tmp_path / "teacher.safetensors")}
    options = {"model.network.guide": teacher, "model.network.target": {"_delete_": True, "type": "FeatureTarget"}}
    cfg = tiny_config(**options, **{"train_cfg.max_epochs": 4})
    train(cfg)
    curve = losses(cfg)
    assert curve[20] < curve[1]
    saved = read_checkpoint(newest_checkpoint(cfg.work_dir))
    assert not any("teacher" in key or "guide" in key for key in saved["model"])
    assert saved["model"]["prediction_head.fc2.bias"].shape == (network.embed_dim,)


def test_a_teacher_out_of_reach_names_the_file_to_give(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"vit_base_patch16_224.dino.*model.safetensors of timm/.*weights=FILE"):
        build_teacher("vit_base_patch16_224.dino")
    with pytest.raises(UserError, match="no such file of teacher weights: nowhere.pth"):
        build_teacher("vit_base_patch16_224.dino", weights="nowhere.pth")
    with pytest.raises(UserError, match="cannot be a teacher"):
        build_teacher_without_weights("resnet18")


def build_teacher_without_weights(name):
    """`build_teacher` of a model that timm builds without fetching anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semaim.engine.teachers.create_model", lambda *_, **__: timm.create_model(name))
        return build_teacher(name)


# Bad input, as a user gives it.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["semaim_vit_base_800.py"], "no such config: semaim_vit_base_800.py: did you mean semaim/configs/"),
        ([], "no such folder: data/imagenet"),
        ([SCENES, "1000", "--data-root", "SCENES"], "1000 processes requested; this machine has no GPU and"),
        ([SCENES, "--data-root", "EMPTY"], "no images in"),
        ([SCENES, "--data-root", "SCENES", "--cfg-options", "model.network.order=semantc"], "did you mean semantic"),
        ([SCENES, "--data-root", "SCENES", "--cfg-options", "model.network.look_precision=16"], "choose same or fp32"),
        ([SCENES, "--data-root", "SCENES", "--cfg-options", "total_batch_size=4096"], "fewer than one batch of 4096"),
        ([SCENES, "--data-root", "SCENES", "--cfg-options", "model.network.img_size=60"], "60 x 60 pixels is no whole"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_no_run(scenes, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"SCENES": str(scenes), "EMPTY": str(tmp_path / "empty")}
    done = command(*(places.get(word, word) for word in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "work_dirs").exists()


def test_numbers_read_late_are_those_read_at_once(tiny_config, monkeypatch):
    waits = []
    run_iter = Resumable.run_iter

    def counted(*args):
        with Operations() as operations:
            run_iter(*args)
        waits.append(operations.counts["_local_scalar_dense"])

    monkeypatch.setattr(Resumable, "run_iter", counted)
    histories = []
    for late in (False, True):
        interval = {"default_hooks.logger.interval": 3}
        cfg = tiny_config(f"late_{late}", **interval, **{"default_hooks.runtime_info.late": late})
        train(cfg)
        histories.append(read_checkpoint(newest_checkpoint(cfg.work_dir))["history"])
    assert waits and not any(waits)  # no number is fetched one by one
    for name in ("train/loss", "train/grad_norm"):
        once, late = (history[name][0] for history in histories)
        assert torch.equal(once, late) and len(once) == len(waits) // 2


def test_a_used_work_folder_asks_for_resume(tiny_config):
    cfg = tiny_config(**{"train_cfg.max_epochs": 2})
    train(cfg)
    with pytest.raises(UserError, match="latest.pth is there already: continue with --resume"):
        choose_checkpoint(cfg, None)
    assert choose_checkpoint(cfg, "auto").endswith("latest.pth")
    other = tiny_config("other")
    assert choose_checkpoint(other, "auto") is None
    wider = tiny_config(**{"model.network.embed_dim": 48})
    with pytest.raises(UserError, match="does not fit this config.*resume with the config it was made by"):
        train(wider, choose_checkpoint(wider, "auto"))
    shallow = tiny_config(**{"model.network.decoder_depth": 1})  # as ViT-L's runs, which once had 24 query blocks
    with pytest.raises(UserError, match=r"does not fit this config.*query_blocks\.1\."):
        train(shallow, choose_checkpoint(shallow, "auto"))


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_processes("all") == 2
    with pytest.raises(UserError, match="8 GPUs requested, 2 visible"):
        check_processes(8)


def test_a_batch_that_cannot_be_split(tiny_config):
    with pytest.raises(UserError, match="a total batch of 8 images cannot be split evenly over 3 processes"):
        prepare_training(tiny_config(), 3)


# What a run shows.


def test_progress_bar_on_a_terminal(tiny_config):
    """Log lines scroll above the bar when standard output is a terminal."""
    import pty

    cfg = tiny_config()
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/train.py"), SCENES, *flags(cfg)],
        stderr=slave, stdout=slave, cwd=ROOT, env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while select.select([master], [], [], 120)[0]:
        try:
            seen += os.read(master, 65536)
        except OSError:  # the terminal is gone: the process has ended
            break
    else:
        process.kill()
    os.close(master)
    assert process.wait(30) == 0, seen.decode(errors="replace")[-2000:]
    text = seen.decode(errors="replace")
    assert "10/10" in text and "images/s" in text


def test_scalars_of_a_resumed_run_replace_what_they_repeat(tmp_path):
    for stamp, iterations in (("1", range(1, 6)), ("2", range(4, 8))):
        folder = tmp_path / stamp / "vis_data"
        folder.mkdir(parents=True)
        lines = [json.dumps({"iter": i, "loss": i + int(stamp) / 10, "lr": 0.1}) for i in iterations]
        (folder / "scalars.json").write_text("\n".join(lines))
    assert [line["loss"] for line in read_scalars(tmp_path)] == [1.1, 2.1, 3.1, 4.2, 5.2, 6.2, 7.2]
    with pytest.raises(UserError, match="no logged scalars"):
        read_scalars(tmp_path / "1" / "vis_data")
