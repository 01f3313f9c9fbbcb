"""The classifier: timm's logits for timm's weights, a probe that trains its head alone, losses, accuracy, groups."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from torch import nn

from semaim.engine.classification import ClassAccuracy, Classification
from semaim.engine.config import load_config
from semaim.engine.images import load_pretrained
from semaim.engine.optim import Lars, layer_depths
from semaim.errors import UserError
from semaim.models.classifier import Classifier
from semaim.models.vit import VisionTransformer
from semaim.registry import build_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}


def small(**changes):
    return {"type": "Classifier", "num_classes": 7, **SMALL, **changes}


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("size", [32, 48])
def test_logits_are_timms(pool, size):
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7, dynamic_img_size=True,
        global_pool={"cls": "token", "avg": "avg"}[pool],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    ours = Classifier(7, pool, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the very same names
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            ours.features(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        )


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_two_protocols_of_knn_are_timms_class_token_and_its_mean_under_a_fresh_norm(size, tmp_path):
    torch.manual_seed(0)
    trained = VisionTransformer(**SMALL)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    torch.save({"model": trained.state_dict()}, tmp_path / "encoder.pth")
    images, found = torch.randn(2, 3, 32, 32), {}
    for name, pool, words in (
        (f"knn/vit_{size}", "token", "class token"),
        (f"knn/vit_{size}_semaim", "avg", "mean of the patches, layer norm"),
    ):
        theirs = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, global_pool=pool
        )
        read = theirs.load_state_dict(trained.state_dict(), strict=False)  # a fresh norm has weight 1 and bias 0
        extra = {"fc_norm.weight", "fc_norm.bias"} if pool == "avg" else set()
        assert set(read.missing_keys) == extra
        cfg = load_config(ROOT / f"semaim/configs/{name}.py")
        assert cfg.model.network.size == size
        ours = build_model({**cfg.model, "network": {**cfg.model.network, **SMALL}}).network
        report = load_pretrained(ours, str(tmp_path / "encoder.pth"))
        assert set(report.missing) <= extra and ours.pooling == words
        with torch.no_grad():
            found[pool] = ours.eval().features(images)
            torch.testing.assert_close(found[pool], theirs.eval()(images), atol=1e-5, rtol=1e-5)
    assert (found["token"] - found["avg"]).abs().max() > 0.1


def test_a_probe_trains_its_head_alone():
    torch.manual_seed(0)
    model = Classifier(7, "cls", probe=True, head_init_std=0.01, drop_path_rate=0.9, **SMALL).train()
    images = torch.randn(8, 3, 32, 32)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    with torch.no_grad():
        plain = VisionTransformer(**SMALL)
        plain.load_state_dict(model.state_dict(), strict=False)
        tokens = plain.eval()(images)[:, 0]
    # Drop path is off although the model trains; the batch's own statistics normalise, without affine parameters.
    normed = (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(
        model(images), F.linear(normed, model.head[1].weight, model.head[1].bias), atol=1e-4, rtol=1e-4
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).zero_grad()
    model(images).square().sum().backward()
    assert all((p.grad is not None) == name.startswith("head") for name, p in model.named_parameters()), before.keys()
    assert not model.eval().head[0].training and model.train().head[0].training and not model.blocks[0].training


def test_fine_tuning_trains_everything_and_pools_what_it_says():
    torch.manual_seed(0)
    model = Classifier(7, "avg", head_init_std=2e-5, **SMALL)
    assert all(p.requires_grad for p in model.parameters())  # the position table too
    assert 1e-5 < model.head.weight.std() < 3e-5
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    names = set(dict(model.named_parameters()))
    assert "fc_norm.weight" in names and "norm.weight" not in names
    assert "norm.weight" in dict(Classifier(7, "cls", **SMALL).named_parameters())
    with pytest.raises(ValueError, match="unknown pool 'mean': choose from cls, avg"):
        Classifier(7, "mean", **SMALL)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0, 0), (0.8, 0), (0, 1.0)])
def test_training_loss_against_its_definition(mixup, cutmix):
    torch.manual_seed(0)
    model = Classification(small(head_init_std=1.0), mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 6])
    seen = []
    model.network.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.detach())))
    import numpy as np

    np.random.seed(3)
    loss = model(images.clone(), labels, torch.arange(6))["loss"]
    given, logits = seen[0]
    smooth = torch.full((6, 7), 0.1 / 7)
    smooth[torch.arange(6), labels] += 0.9
    if mixup:
        # The mixed image is share * image + (1 - share) * its mirror in the batch: recover the share from a pixel.
        apart = images - images.flip(0)
        pixel = apart.abs().argmax()
        share = ((given - images.flip(0)).flatten()[pixel] / apart.flatten()[pixel]).item()
        assert 0.1 < share < 0.9
        torch.testing.assert_close(given, share * images + (1 - share) * images.flip(0))
        smooth = share * smooth + (1 - share) * smooth.flip(0)
    elif cutmix:
        own = (given == images).all(dim=1).float().mean().item()
        smooth = own * smooth + (1 - own) * smooth.flip(0)
    else:
        assert torch.equal(given, images)
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-4)


def test_accuracy_counts_every_image_once():
    model = Classification(small(head_init_std=1.0)).eval()
    images, labels = torch.randn(11, 3, 32, 32), torch.randint(0, 7, (11,))
    metric = ClassAccuracy()
    with torch.no_grad():
        logits = model.network(images)
        for part in torch.arange(11).split(4):
            metric.process({}, model(images[part], labels[part], part, mode="predict"))
    found = metric.evaluate(11)
    ranked = logits.argsort(descending=True)
    assert found["top1"] == pytest.approx(100 * sum(r[0] == y for r, y in zip(ranked, labels, strict=True)).item() / 11)
    assert found["top5"] == pytest.approx(100 * sum(y in r[:5] for r, y in zip(ranked, labels, strict=True)) / 11)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    right = logits.argmax(dim=1) == labels
    assert metric.hits["top1"].tolist() == right.tolist() and 100 * metric.hits["top5"].mean() == found["top5"]
    metric.process({}, model(images[:4], labels[:4], torch.arange(4), mode="predict"))
    with pytest.raises(RuntimeError, match="4 images were evaluated once, of 11"):
        metric.evaluate(11)
    two = Classification(small(num_classes=2)).eval()
    assert two(images, labels % 2, torch.arange(11), mode="predict")[0]["top5"].all()


# Layer decay.


def optimizer_of(model, **paramwise):
    return build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper", "constructor": "GroupedOptimizer", "paramwise_cfg": paramwise,
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        },
    ).optimizer  # fmt: skip


def test_layer_decay_of_a_classifier(capsys):
    model = Classification(small())
    optimizer = optimizer_of(model, layer_decay=0.5, undecayed=("cls_token", "pos_embed"))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    rates = {name: found[id(p)] for name, p in model.network.named_parameters()}
    assert rates["pos_embed"] == rates["cls_token"] == (0.5**4, 0) and rates["patch_embed.proj.weight"] == (
        0.5**4,
        0.05,
    )
    for block in range(3):
        assert rates[f"blocks.{block}.mlp.fc1.weight"] == (0.5 ** (3 - block), 0.05)
        assert rates[f"blocks.{block}.norm1.weight"] == (0.5 ** (3 - block), 0)
    assert rates["fc_norm.weight"] == (1, 0) and rates["head.weight"] == (1, 0.05) and rates["head.bias"] == (1, 0)
    assert len(optimizer.param_groups) == 10  # 5 layers, each with and without weight decay: equal ones are merged
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rates)


def test_layer_decay_of_a_detector_is_detectron2s(shared):
    case = json.loads((shared / "golden/vitdet/lr_decay.json").read_text())
    detector = nn.Module()
    detector.backbone = nn.Module()
    detector.backbone.net = VisionTransformer(embed_dim=8, depth=case["config"]["num_layers"], num_heads=1)
    depth_of = layer_depths(detector)
    for name, factor in case["scalars"]["factor"].items():
        layer, layers = depth_of(name)
        assert case["config"]["lr_decay_rate"] ** (layers - 1 - layer) == pytest.approx(factor, rel=1e-12), name


def test_layer_decay_needs_an_encoder():
    with pytest.raises(UserError, match="layer_decay: Linear has no encoder that tells its layers"):
        optimizer_of(nn.Linear(2, 2), layer_decay=0.5)
    assert len(optimizer_of(nn.Linear(2, 2)).param_groups) == 2


def test_lars_adapts_matrices_only():
    """MAE's update, written out: for a matrix lr * 0.001 * |w| / |g| * g with momentum, for the rest plain SGD."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = Lars([{"params": list(layer.parameters()), "lr": 2.0, "weight_decay": 0.0}], lr=2.0, momentum=0.9)
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(3):
        grads = [torch.randn_like(weight), torch.randn_like(bias)]
        layer.weight.grad, layer.bias.grad = (g.clone() for g in grads)
        optimizer.step()
        adapted = 0.001 * weight.norm() / grads[0].norm() * grads[0]
        moved = [0.9 * m + g for m, g in zip(moved, (adapted, grads[1]), strict=True)]
        weight, bias = weight - 2 * moved[0], bias - 2 * moved[1]
        torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-7, rtol=1e-6, msg=f"step {step}")
        torch.testing.assert_close(layer.bias.detach(), bias)
