"""The model card: its head by the hub's own library, its text by a Markdown parser, its snippets run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import CPU, one_line, results
from dialect_files import SIZES, random_states
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load, model_index_to_eval_results
from markdown_it import MarkdownIt

from semaim import checkpoints
from semaim.checkpoints.files import read_checkpoint
from semaim.errors import UserError
from semaim.results import card as cards

ROOT = Path(__file__).resolve().parent.parent


def tables(text):
    """Every table of a card: rows of plain text, as a Markdown parser reads them."""
    found, rows, cells = [], [], None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline" and cells is not None:
            cells.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows, cells = [*rows, cells], None
        elif token.type == "table_close":
            found.append(rows)
    return found


def facts(text):
    """The rows of all tables with two columns, as a mapping."""
    return {row[0]: row[1] for table in tables(text) for row in table[1:] if len(row) == 2}


@pytest.fixture(scope="module")
def measured(labelled, pretrained, tmp_path_factory):
    """Work folders of k-NN on a checkpoint and on random weights, by the real command in this process."""
    from semaim.cli import test

    folder = tmp_path_factory.mktemp("measured")
    network = ["model.network.img_size=32", "model.network.embed_dim=32", "model.network.num_heads=2",
               "model.network.depth=2", "num_workers=0"]  # fmt: skip
    for name, weights in (("ours", pretrained), ("random", "random")):
        test.main(["semaim/configs/knn/vit_tiny_scenes.py", str(weights), "--data-root", str(labelled), "--work-dir",
                   str(folder / name), "--cfg-options", *network])  # fmt: skip
    return folder


def test_a_card_has_what_the_file_and_the_results_hold_and_nothing_else(here, pretrained, measured, tmp_path):
    line = ["checkpoint.py", "export", pretrained, tmp_path / "out", "--runs", measured, "--license", "cc-by-nc-4.0"]
    done = here(*line)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out/README.md"
    card = ModelCard.load(path)
    head = metadata_load(path)
    assert head["license"] == "cc-by-nc-4.0" and head["library_name"] == "timm"
    assert head["pipeline_tag"] == "image-feature-extraction" and "datasets" not in head
    metrics = results(measured / "ours")["metrics"]
    name, listed = model_index_to_eval_results(head["model-index"])
    assert name == "out"
    assert listed and {result.metric_value for result in listed} <= {round(value, 2) for value in metrics.values()}
    assert {result.task_type for result in listed} == {"image-classification"}
    assert {result.dataset_name for result in listed} == {Path(results(measured / "ours")["data"]).name}

    content, told = read_checkpoint(pretrained), facts(card.text)
    config = content["config"]
    assert told["method"] == "SemAIM" and told["config"] == "semaim_vit_tiny_scenes.py"
    assert (told["epochs"], told["optimizer steps"], told["images"]) == ("1", "5", "40")
    assert told["batch size"] == "8" and told["random seed"] == "0" and told["optimizer"] == "AdamW"
    assert float(told["learning rate per 256 images"]) == config["base_lr"]
    assert float(told["peak learning rate"]) == pytest.approx(config["base_lr"] * 8 / 256)
    assert told["commit of the code"] == (config["origin"]["commit"] or "not recorded")
    assert told["version of SemAIM"] == content["version"]
    assert told["version of PyTorch, hardware"] == "not recorded"
    assert "model.network.depth=2" in told["changes to the config"] and "root" not in told["changes to the config"]
    assert "| images | 32 x 32 pixels (height x width), RGB |" in card.text
    assert str(pretrained.parent) not in card.text and str(measured) not in card.text  # paths of this machine

    figures = [table for table in tables(card.text) if table[0][:3] == ["Task", "Data", "Metric"]]
    (gains,) = [table for table in tables(card.text) if table[0][0] == "Method"]
    assert len(figures[0]) > 1 and all("(n = 1)" in row[3] for row in figures[0][1:])
    rows = [dict(zip(gains[0], row, strict=True)) for row in gains[1:]]
    assert rows and {row["Baseline"] for row in rows} == {"random weights"}
    assert all(
        re.fullmatch(r"[+-]\d+\.\d\d to [+-]\d+\.\d\d \(\d+ images.*\)", row["95 % over images"]) for row in rows
    )

    # An unchanged card may be written again; one that was edited is kept.
    assert here(*line).returncode == 0
    path.write_text(path.read_text().replace("## Use", "## How to use it"))
    before = path.read_text()
    one_line(here(*line), "README.md is not as `semaim export` writes it: move it away")
    assert path.read_text() == before


def test_without_records_a_card_says_so(tmp_path):
    state = {name: tensor * 0.1 for name, tensor in random_states()["encoder"].items()}
    torch.save(state, tmp_path / "x.pth")
    checkpoints.export(tmp_path / "x.pth", tmp_path / "out")
    cards.write_card(tmp_path / "x.pth", tmp_path / "out", "local-dir:out", "vit", None, cards.Measured("x.pth"))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license is None and card.data.eval_results is None and card.data.datasets is None
    assert card.data.tags == ["timm", "vision-transformer"]
    told = facts(card.text)
    assert {told[name] for name in ("method", "epochs", "changes to the config")} == {"not recorded"}
    assert "batch size" not in told and "No licence of the weights was stated." in card.text
    assert "ImageNet's by assumption" in card.text and "a guess" in told["width, depth, heads"]


def test_changes_are_told_without_the_places_of_files():
    own = {"root": "/home/me/roads", "train": {"images": "a/b"}, "classes": ["road", "car"]}
    told = cards._changes({"dataset.skip": "/home/me/skip.txt", "own_data": own, "data_root": "/home/me", "seed": 1})
    assert (
        told
        == "dataset.skip=skip.txt, own_data={'root': 'roads', 'train': {'images': 'b'}, 'classes': ['road', 'car']}"
    )
    assert cards._changes({"work_dir": "/home/me"}) == "none" and cards._changes(None) is None


def test_names_in_a_file_are_text_and_never_markup(tmp_path):
    names = ["a|b", "# x", "<script>alert(1)</script>", "---\nlicense: mit\n---", "`x` **y** _z_", "[l](http://x)"]
    state = {name: tensor * 0.1 for name, tensor in random_states()["tuned_cls"].items()}
    state["head.weight"], state["head.bias"] = torch.zeros(6, 32), torch.zeros(6)
    weird = "| `a` <b>\n- [c](d)"
    flat = " ".join(weird.split())
    config = {
        "model": {"network": SIZES}, "task": "finetune", "seed": {"a": 1}, "total_batch_size": weird,
        "origin": {"method": weird, "config": weird, "commit": [weird, {}], "pretrain_options": {flat: weird}},
    }  # fmt: skip
    folder = tmp_path / "odd ``` ' \" |name"
    content = {"format": "semaim", "model": state, "config": config, "classes": names, "epoch": 3}
    torch.save(content, tmp_path / "x`|.pth")
    checkpoints.export(tmp_path / "x`|.pth", folder)
    source = f"local-dir:{folder}"
    cards.write_card(tmp_path / "x`|.pth", folder, source, "vit", None, cards.Measured("x"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None and card.data.pipeline_tag == "image-classification"
    told = facts(card.text)
    assert told["head"] == "6 classes: " + ", ".join(" ".join(name.split()) for name in names)
    assert told["method"] == told["config"] == told["batch size"] == flat
    assert told["random seed"] == told["commit of the code"] == "not recorded"
    assert f"{flat}={flat}" in [row[1] for table in tables(card.text) for row in table]
    parsed = MarkdownIt("commonmark").enable("table").parse(card.text)
    kinds = {child.type for token in parsed for child in token.children or ()}
    assert not kinds & {"html_inline", "link_open", "strong_open", "em_open", "image"}
    assert not any(token.type == "html_block" and "semaim export:" not in token.content for token in parsed)
    fences = [token.content for token in parsed if token.type == "fence"]
    assert len(fences) == 3 and repr(source) in fences[0] and repr(source) in fences[1]
    assert shlex.split(fences[2])[3] == source


def test_what_a_card_cannot_take_is_one_line(here, pretrained, measured, tmp_path):
    export = ["checkpoint.py", "export", pretrained, tmp_path / "out"]
    one_line(here(*export, "--private"), "--private is for --to hf-hub")
    one_line(here(*export, "--license", "MIT: yes"), "--license MIT: yes: give the hub's name of a licence")
    one_line(here(*export, "--runs", measured / "random"), f"--runs: no results.json there is of {pretrained}")
    one_line(here(*export, "--runs", tmp_path / "none"), "no such folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    one_line(here(*export), "out/config.json is there without a card: move it away")
    with pytest.raises(UserError, match="not as `semaim export` writes it"):
        (tmp_path / "README.md").write_bytes(b"\xff mine")
        cards.check_card(tmp_path)


def test_figures_of_a_run_are_not_those_of_its_earlier_checkpoints_nor_of_a_part(pretrained, measured, tmp_path):
    content = results(measured / "ours")
    for name in ("epoch_1.pth", "epoch_2.pth"):
        (tmp_path / name).write_bytes(pretrained.read_bytes())
    (tmp_path / "latest.pth").symlink_to("epoch_2.pth")
    (tmp_path / "results.json").write_text(json.dumps({**content, "checkpoint": "started_from.pth"}))
    assert cards.Measured(tmp_path / "epoch_2.pth", [tmp_path]).results()
    with pytest.raises(UserError, match="they are of started_from.pth"):
        cards.Measured(tmp_path / "epoch_1.pth", [tmp_path])
    (tmp_path / "results.json").write_text(json.dumps({**content, "partly_loaded": "1 tensor left out"}))
    partly = cards.Measured(tmp_path / "latest.pth", [tmp_path])
    assert not partly.results() and any("1 tensor left out" in line for line in partly.lines())


@pytest.mark.slow
def test_the_cards_own_snippets_run(here, pretrained, labelled, tmp_path):
    assert here("checkpoint.py", "export", pretrained, tmp_path / "my encoder").returncode == 0
    parsed = MarkdownIt().parse((tmp_path / "my encoder/README.md").read_text())
    fences = {token.info + str(n): token.content for n, token in enumerate(t for t in parsed if t.type == "fence")}
    env = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **CPU}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env, "timeout": 300}
    both = f"{fences['python0']}\nprint('---')\n{fences['python1']}"
    done = subprocess.run([sys.executable, "-c", both], **run)
    assert done.returncode == 0 and done.stdout.split() == "torch.Size([1, 17, 32]) --- torch.Size([1, 17, 32])".split()
    words = shlex.split(fences["bash2"].replace("DATA", str(labelled)))
    assert words[0] == "semaim"
    extra = ["--work-dir", str(tmp_path / "run"), "--cfg-options", "num_workers=0"]
    done = subprocess.run([sys.executable, "-m", "semaim.cli", *words[1:], *extra], **run | {"cwd": ROOT})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"]
