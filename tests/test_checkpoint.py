"""Checkpoints of every dialect: read, loaded with a report, converted."""

import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from dialect_files import DIALECTS, HEAD, SIZES, mmpretrain, prefixed, random_states, write

from semaim import checkpoints
from semaim.checkpoints.files import read_checkpoint
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def states():
    """Weights of our models, by what they are."""
    return random_states()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_and_loaded(dialect, states, tmp_path):
    path, expected = write(tmp_path, dialect, states)
    found = checkpoints.read(path)
    assert found.dialect == DIALECTS[dialect]
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    assert found.heads_guessed
    if dialect == "mmpretrain":  # what has no name of ours is told
        assert found.skipped == ["neck.other", "backbone.layers.0.attn.q_bias"]
    assert found.sizes == {
        "embed_dim": 32, "depth": 2, "num_heads": 1, "patch_size": (8, 8), "img_size": (32, 32), "mlp_ratio": 4,
    }  # fmt: skip
    if dialect in ("semaim", "official", "mae", "mmpretrain", "mae tuned"):
        assert found.epoch == 3
    model = VisionTransformer(**SIZES)
    tuned = dialect in ("semaim tuned", "mae tuned")  # they pool the patches: no final norm
    told = r"backbone.layers.\*.attn.q_bias" if dialect == "mmpretrain" else tuned and "it lacks norm.weight, norm.bias"
    if told:
        with pytest.raises(UserError, match=told):
            checkpoints.load(model, path)
    report = checkpoints.load(model, path, partial=bool(told))
    assert report.whole == (not told)
    assert report.missing == (["norm.weight", "norm.bias"] if tuned else [])
    assert len(report.matched) == (28 if tuned else 30) and not report.resized
    for name, tensor in model.state_dict().items():
        assert tuned and name.startswith("norm.") or torch.equal(tensor, expected[name]), name
    assert ("MISSING" in str(report)) == tuned
    if dialect == "semaim":
        assert "left in the file: query_blocks (" in str(report) and "ema (" in str(report)


@pytest.mark.parametrize("kind", ["tuned", "tuned_cls", "probe"])
def test_a_classifier_comes_back_whole_and_a_new_one_is_told(kind, states, tmp_path):
    torch.save({"format": "semaim", "model": states[kind], "config": None}, tmp_path / "x.pth")
    options = {"pool": "avg" if kind == "tuned" else "cls", "probe": kind == "probe", **SIZES}
    model = Classifier(5, **options)
    report = checkpoints.load(model, tmp_path / "x.pth")
    assert not report.missing and not report.new and not report.unexpected
    assert all(torch.equal(tensor, states[kind][name]) for name, tensor in model.state_dict().items())
    # Another number of classes: the head stays in the file, and the new one is expected or missing.
    last = "head.1" if kind == "probe" else "head"
    wider = Classifier(7, **options)
    report = checkpoints.load(wider, tmp_path / "x.pth", HEAD)
    assert report.new == [f"{last}.weight", f"{last}.bias"] and report.unexpected == report.new and not report.missing
    assert checkpoints.load(wider, tmp_path / "x.pth").missing == report.new


@pytest.mark.parametrize("to", checkpoints.DIALECTS)
@pytest.mark.parametrize("kind", ["encoder", "semaim", "mae", "tuned", "tuned_cls", "probe"])
def test_round_trips_are_bit_equal(kind, to, states, tmp_path):
    start, there, back = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pth"
    torch.save({"format": "semaim", "model": states[kind], "config": None, "epoch": 7}, start)
    left = checkpoints.convert(start, there, to)
    checkpoints.convert(there, back, "semaim")
    final = read_checkpoint(back)["model"]
    decoder = {"semaim": ("query_blocks", "prediction_head"), "mae": ("decoder_", "mask_token")}.get(kind, ())
    kept = to == "semaim" or (to in ("mae", "mmpretrain") and kind == "mae")
    expected = {
        name: tensor
        for name, tensor in states[kind].items()
        if not name.startswith("ema.") and (kept or not name.startswith(decoder) or not decoder)
    }
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in expected.items())
    assert set(left) == states[kind].keys() - expected.keys()
    assert checkpoints.read(there).dialect == to
    if to in ("semaim", "mmpretrain"):
        assert checkpoints.read(there).epoch == 7


@pytest.mark.parametrize("to", checkpoints.DIALECTS)
@pytest.mark.parametrize("start", ["mmpretrain mae", "mmpretrain tuned bare", "mae", "mae tuned", "timm", "dino"])
def test_foreign_files_come_back_under_their_own_names(start, to, states, tmp_path):
    path, weights = write(tmp_path, start, states)
    own = DIALECTS[start]
    checkpoints.convert(path, tmp_path / "there.pth", to)
    checkpoints.convert(tmp_path / "there.pth", tmp_path / "back.pth", own)
    holds = {"mmpretrain": "state_dict", "mae": "model"}.get(own)
    back, first = (torch.load(p, weights_only=p.name == "back.pth") for p in (tmp_path / "back.pth", path))
    back, first = (content[holds] if holds and holds in content else content for content in (back, first))
    if own == "mmpretrain":  # a file of the encoder alone comes back as one of the whole model
        first = {n if n.startswith(("backbone.", "head.", "neck.")) else f"backbone.{n}": t for n, t in first.items()}
    if to == "timm":
        first = {n: t for n, t in first.items() if not n.startswith(("neck.", "decoder_", "mask_token"))}
    assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in first)


def test_what_a_dialect_has_no_name_for_is_told(states, tmp_path):
    torch.save({**states["encoder"], "blocks.0.attn.rel_pos_h": torch.zeros(7, 16)}, tmp_path / "x.pth")
    left = checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain", partial=True)
    assert left == ["blocks.0.attn.rel_pos_h"]
    report = checkpoints.load(VisionTransformer(**SIZES), tmp_path / "x.pth", partial=True)
    assert "NOT LOADED, though the encoder of the file computes with them: blocks.*.attn.rel_pos_h" in str(report)
    torch.save(states["encoder"], tmp_path / "x.pth")
    assert "NOT LOADED" not in str(checkpoints.load(VisionTransformer(**SIZES), tmp_path / "x.pth"))


def test_the_encoder_is_taken_and_not_its_average(states, tmp_path):
    average = prefixed("ema.", {name: tensor + 1 for name, tensor in states["encoder"].items()})
    torch.save({"state_dict": {**average, **prefixed("module.", states["encoder"])}}, tmp_path / "x.pth")
    found = checkpoints.read(tmp_path / "x.pth")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in states["encoder"].items())
    assert set(found.skipped) == set(average)


def test_the_number_of_heads(states, tmp_path):
    weights = {"patch_embed.proj.weight": torch.zeros(1280, 3, 16, 16), "blocks.0.mlp.fc1.weight": torch.zeros(5120, 1)}
    heads = lambda network, depth=4: checkpoints.sizes_of(  # noqa: E731
        {**weights, f"blocks.{depth - 1}.norm1.bias": torch.zeros(1)}, network
    )["num_heads"]
    assert heads({"size": "huge", "depth": 4}) == 16  # of the config's model
    assert heads({"size": "huge", "num_heads": 8}) == 8  # named
    assert heads(None, 32) == 16  # of the published model
    assert heads(None) == 20  # 64 channels each
    config = {"model": {"network": SIZES}}
    torch.save({"format": "semaim", "model": states["encoder"], "config": config}, tmp_path / "x")
    assert not checkpoints.read(tmp_path / "x").heads_guessed and "guess" not in checkpoints.inspect(tmp_path / "x")
    torch.save(states["encoder"], tmp_path / "x")
    assert checkpoints.read(tmp_path / "x").heads_guessed and "guess" in checkpoints.inspect(tmp_path / "x")


def test_mmpretrain_names_are_theirs(states, tmp_path):
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
    written, expected = torch.load(tmp_path / "y.pth", weights_only=True)["state_dict"], mmpretrain(states["encoder"])
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in expected)
    heads = {"tuned": "head.fc", "tuned_cls": "head.layers.head", "probe": "head.layers.head"}
    for kind, head in heads.items():
        torch.save(states[kind], tmp_path / "x.pth")
        checkpoints.convert(tmp_path / "x.pth", tmp_path / "y.pth", "mmpretrain")
        written = torch.load(tmp_path / "y.pth", weights_only=True)["state_dict"]
        ours = "head.1.weight" if kind == "probe" else "head.weight"
        assert torch.equal(written[f"{head}.weight"], states[kind][ours])
        assert ("neck.bn.running_mean" in written) == (kind == "probe") and ("backbone.ln2.bias" in written) == (
            kind == "tuned"
        )


# What does not fit.


def test_tables_are_fitted(states, tmp_path):
    table = states["encoder"]["pos_embed"]
    torch.save({**states["encoder"], "pos_embed": table[:, 1:]}, tmp_path / "x.pth")
    model = VisionTransformer(**{**SIZES, "img_size": (48, 32)})
    model.pos_embed.data.normal_()
    checkpoints.load(model, tmp_path / "x.pth")
    assert not model.pos_embed[:, :1].any()  # the file has no row for the class token, which is added to nothing
    image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (6, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    # A table without a row for the class token, as a detector has it.
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 16, 32))
    model.grid = (4, 4)
    torch.save(states["encoder"], tmp_path / "x.pth")
    checkpoints.load(model, tmp_path / "x.pth")
    torch.testing.assert_close(model.pos_embed.data, table[:, 1:])
    # Relative positions: linear along their length.
    model.blocks[0].attn.register_parameter("rel_pos_h", torch.nn.Parameter(torch.zeros(5, 3)))
    tall = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    torch.save({**states["encoder"], "blocks.0.attn.rel_pos_h": tall}, tmp_path / "x.pth")
    report = checkpoints.load(model, tmp_path / "x.pth")
    assert any("rel_pos_h (9, 3) -> (5, 3)" in line for line in report.resized)
    torch.testing.assert_close(model.blocks[0].attn.rel_pos_h[2], tall[4])


def test_a_table_of_as_many_rows_on_another_grid(states, tmp_path):
    """4 x 4 patches told by the config go to 2 x 8; a bare table is taken as it is."""
    content = {"format": "semaim", "model": states["encoder"], "config": {"model": {"network": SIZES}}}
    wide = VisionTransformer(**{**SIZES, "img_size": (16, 64)})
    torch.save(content, tmp_path / "x.pth")
    assert len(checkpoints.load(wide, tmp_path / "x.pth").resized) == 1
    table = states["encoder"]["pos_embed"]
    image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (2, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(wide.pos_embed[:, 1:], expected)
    torch.save(states["encoder"], tmp_path / "x.pth")
    assert not checkpoints.load(wide, tmp_path / "x.pth").resized and torch.equal(wide.pos_embed, table)


def test_new_names_are_expected_by_any_part(states, tmp_path):
    torch.save(states["encoder"], tmp_path / "x.pth")
    model = VisionTransformer(**SIZES)
    model.blocks[1].attn.register_parameter("rel_pos_h", torch.nn.Parameter(torch.zeros(5, 3)))
    model.headless = torch.nn.Linear(2, 2)
    report = checkpoints.load(model, tmp_path / "x.pth", ("head", "rel_pos_h"))
    assert report.new == ["blocks.1.attn.rel_pos_h"] and report.missing == ["headless.weight", "headless.bias"]


def test_files_that_do_not_fit_say_so_in_one_line(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"format": "semaim", "model": states["encoder"], "config": {"model": {"network": SIZES}}}, path)

    def refuses(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            checkpoints.load(VisionTransformer(**{**SIZES, **changes}), path)
        assert "\n" not in str(error.value)

    refuses("x.pth is a ViT of width 32, depth 2, patch 8; the model a ViT of width 64", embed_dim=64)
    refuses("the model a ViT of width 32, depth 3, patch 8: choose a config", depth=3)
    refuses("depth 1, patch 8", depth=1)
    refuses("patch 16", patch_size=16)
    refuses("trained with 2 heads, the model has 4", num_heads=4)
    refuses("patch 8; the model a ViT of width 32, depth 2, patch 8, MLP ratio 2", mlp_ratio=2)
    with pytest.raises(UserError, match="SwinTransformer is no ViT of ours"), torch.device("meta"):
        checkpoints.load(timm.create_model("swin_tiny_patch4_window7_224"), path)
    with pytest.raises(UserError, match="Linear is no ViT of ours"):
        checkpoints.load(torch.nn.Linear(2, 2), path)

    def unreadable(message, name="x.pth"):
        with pytest.raises(UserError, match=message) as error:
            checkpoints.read(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300

    unreadable("no such checkpoint", "none.pth")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}}, path)
    unreadable("no ViT encoder in .*it holds conv1, fc")
    torch.save({0: torch.zeros(2), "state": {}}, path)
    unreadable("it holds 0, state")
    torch.save({"optimizer": {}, "lr": 1}, path)
    unreadable("it holds optimizer, lr")
    torch.save({n: t for n, t in states["encoder"].items() if "fc1" not in n}, path)
    unreadable("no plain ViT encoder in .*no blocks.0.mlp.fc1")
    torch.save({"meta": "x", "state_dict": states["encoder"], "epoch": "last"}, path)
    assert checkpoints.read(path).epoch is None
    unreadable("is a folder: name a file", ".")
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"model": {"names": np.array(["x"])}}))
    unreadable("no ViT encoder", "s.pkl")
    table = {**states["encoder"], "pos_embed": torch.zeros(1, 14, 32)}
    torch.save(table, path)
    with pytest.raises(UserError, match="x.pth: a position table of 14 rows"):
        checkpoints.load(VisionTransformer(**SIZES), path)
    torch.save([1, 2], path)
    unreadable("no ViT encoder in .*it holds nothing")
    torch.save({"patch_embed.proj.weight": torch.zeros(3, 3, 3, 3), "layers.0.blocks.0.x": torch.zeros(3)}, path)
    unreadable("no plain ViT encoder")
    for name in ("a.pth", "a.safetensors", "a.pkl"):
        (tmp_path / name).write_bytes(b"")
        unreadable("broken or no checkpoint", name)
        (tmp_path / name).write_text("hello, this is no checkpoint\n" * 20)
        unreadable("broken or no checkpoint", name)
    torch.save(states["encoder"], path)
    path.write_bytes(path.read_bytes()[:5000])
    unreadable("broken or no checkpoint")


def test_conversion_refuses_what_it_cannot_write(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(states["encoder"], path)
    before = path.read_bytes()
    for out, to, message in (
        (path, "timm", "is the checkpoint itself"),
        (tmp_path / "y.safetensors", "mae", "name a .pth"),
        (tmp_path / "y.pth", "timmm", "unknown dialect 'timmm': did you mean timm"),
        (tmp_path, "timm", "Is a directory: [^;]*$"),
        (path / "y.safetensors", "timm", "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.convert(path, out, to)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
