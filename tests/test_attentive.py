"""Attentive probes against slow forms written here: heads, what they read, training of the fast probe."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_features import random

from semaim import checkpoints
from semaim.checkpoints.exporting import convert
from semaim.checkpoints.files import write_checkpoint
from semaim.checkpoints.inspecting import inspect
from semaim.encoders.networks import PlainClassifier
from semaim.engine import attentive as module
from semaim.engine.attentive import Tokens, attentive_hits, fast_attentive, make_heads, train_attentive
from semaim.engine.classification import Classification
from semaim.engine.features import fast_probe, probe_batches
from semaim.engine.images import load_pretrained
from semaim.engine.optim import Lars
from semaim.errors import UserError
from semaim.models.attentive import ATTENTIVE, attentive_head
from semaim.models.classifier import Classifier

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def efficient(tokens, state, queries, train):
    """Efficient probing as its official code has it, one image, query and token at a time."""
    value, query, weight, bias = (state[name] for name in ("0.v.weight", "0.cls_token", "2.weight", "2.bias"))
    images, length, width = tokens.shape
    share = len(value) // queries
    rows = []
    for image in range(images):
        parts = []
        for q in range(queries):
            scores = torch.stack([(query[0, q] * tokens[image, n]).sum() / math.sqrt(width) for n in range(length)])
            weights = scores.exp() / scores.exp().sum()
            values = [value[q * share : (q + 1) * share] @ tokens[image, n] for n in range(length)]
            parts.append(sum(weights[n] * values[n] for n in range(length)))
        rows.append(torch.cat(parts))
    return normalised(torch.stack(rows), state, "1", train) @ weight.T + bias


def aim(tokens, state, heads, train):
    """AIM's attention pooling, one image, head and query at a time."""
    images, length, width = tokens.shape
    flat = normalised(tokens.reshape(-1, width), state, "0.bn", train).reshape(images, length, width)
    queries, part, rows = state["0.cls_token"][0], width // heads, []
    for image in range(images):
        keys, values = flat[image] @ state["0.k.weight"].T, flat[image] @ state["0.v.weight"].T
        gathered = []
        for query in queries:
            found = []
            for head in range(heads):
                own = slice(head * part, (head + 1) * part)
                scores = torch.stack([(query[own] * key[own]).sum() / math.sqrt(part) for key in keys])
                weights = scores.exp() / scores.exp().sum()
                found.append(sum(weights[n] * values[n, own] for n in range(length)))
            gathered.append(torch.cat(found))
        rows.append(sum(gathered) / len(queries))
    return torch.stack(rows) @ state["1.weight"].T


def normalised(rows, state, name, train):
    """A batch normalisation without affine parameters."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        mean, variance = rows.mean(dim=0), rows.var(dim=0, unbiased=False)
    return (rows - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "pool, slow, number, options",
    [
        ("ep", efficient, 4, {"queries": 4}),
        ("ep", efficient, 3, {"queries": 3, "d_out": 2}),
        ("ep_all", efficient, 1, {"queries": 1}),
        ("aim", aim, 3, {"heads": 3}),
        ("aim_all", aim, 2, {"heads": 2, "queries": 5}),
    ],
)
def test_a_head_and_its_gradients_are_those_of_the_slow_form(pool, slow, number, options, train):
    torch.manual_seed(0)
    head = attentive_head(pool, 12, 5, **options).double().train(train)
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    tokens, labels = random(6, 7, 12).double() * 2 + 1, torch.arange(6) % 5
    state = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in head.state_dict().items()}
    expected = slow(tokens, state, number, train)
    logits = head(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-10, rtol=1e-8)
        assert parameter.grad.abs().max() > 1e-6, name


def test_the_published_sizes():
    """Of ViT-B and 1,000 classes: 0.59 M values, 32 queries, the classifier; AIM: keys and values, one query."""
    counts = {pool: sum(p.numel() for p in attentive_head(pool, 768, 1000).parameters()) for pool in ATTENTIVE}
    assert counts["ep"] == counts["ep_all"] == 768 * 768 + 32 * 768 + 768 * 1000 + 1000
    assert counts["ep"] == 1_383_400  # "Trainable Parameters" in the official log of MAE's ViT-B, logs/mae_base/ep.txt
    assert counts["aim"] == counts["aim_all"] == 2 * 768 * 768 + 768 + 768 * 1000
    half = attentive_head("ep", 768, 1000, d_out=2)
    assert sum(p.numel() for p in half.parameters()) == 768 * 384 + 32 * 768 + 384 * 1000 + 1000
    query = attentive_head("ep", 768, 1000)[0].cls_token
    assert query.shape == (1, 32, 768) and query.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queries": 5}, "5 queries and d_out 1 do not divide the 32 channels"),
        ({"d_out": 3}, "32 queries and d_out 3 do not divide"),
        ({"pool": "aim", "heads": 12}, "12 heads do not divide the 32 channels"),
        ({"pool": "ep2"}, "choose from ep, ep_all, aim, aim_all"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    given = dict(options)
    with pytest.raises(UserError, match=message):
        make_heads(1, given.pop("pool", "ep"), 32, 5, 0, given)
    kinds = {key: value for key, value in options.items() if key != "pool"}
    with pytest.raises(UserError, match="do not divide the 32" if kinds else "unknown pool 'ep2': choose from cls"):
        network = {"type": "Classifier", "num_classes": 5, "pool": options.get("pool", "ep"), "probe": True}
        Classification({**network, "attention": kinds, **SMALL})


def test_an_encoder_that_is_trained_has_no_attentive_head():
    with pytest.raises(ValueError, match="set probe=True"):
        Classifier(5, "ep", **SMALL)
    with pytest.raises(ValueError, match="attention is of an attentive probe"):
        Classifier(5, "cls", probe=True, attention={"queries": 2}, **SMALL)


@pytest.mark.parametrize("pool", ATTENTIVE)
def test_what_our_own_encoder_gives_to_a_probe(pool):
    torch.manual_seed(0)
    attention = {"heads": 4} if "aim" in pool else None
    network = Classifier(5, pool, probe=True, attention=attention, **SMALL).eval()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("head.") for name in trained)
    images, tokens = random(3, 3, 32, 32), None
    with torch.no_grad():
        tokens = network.embed(images)
        for block in network.blocks:
            tokens = block(tokens)  # the norm is not the encoder's: it has been trained after the decoder
        read = tokens if pool.endswith("_all") else tokens[:, 1:]
        torch.testing.assert_close(network(images), network.head(read))
        assert network.shapes == {"features": (32,), "tokens": tuple(tokens.shape[1:])}
    assert pool.endswith("_all") == network.pooling.startswith("class token and patches, attentive")


def test_of_another_encoder_registers_are_left_out():
    description = {"family": "timm", "arch": "vit_small_patch14_reg4_dinov2"}
    description["args"] = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    torch.manual_seed(0)
    images = random(2, 3, 28, 28)
    for pool, first in (("ep", []), ("ep_all", [0])):
        network = PlainClassifier(description, 5, pool, probe=True, img_size=28, attention={"queries": 4}).eval()
        with torch.no_grad():
            tokens = network.encoder(images)
            assert tokens.shape == (2, 1 + 4 + 4, 48) and network.shapes["tokens"] == (9, 48)
            torch.testing.assert_close(network(images), network.head(tokens[:, [*first, 5, 6, 7, 8]]))
    with pytest.raises(UserError, match="no class token"):
        PlainClassifier({**description, "arch": "vit_base_patch16_siglip_224", "args": {"depth": 1}}, 5, "ep_all", True)


def test_training_changes_the_head_alone():
    torch.manual_seed(0)
    model = Classification({"type": "Classifier", "num_classes": 5, "pool": "ep_all", "probe": True, **SMALL})
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    optimizer = Lars([{"params": [p for p in model.network.parameters() if p.requires_grad]}], lr=1.0)
    for step in range(3):
        images, labels = random(8, 3, 32, 32, seed=step), torch.arange(8) % 5
        optimizer.zero_grad()
        model.train()(images, labels, torch.arange(8))["loss"].backward()
        optimizer.step()
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("head."), name


# The fast probe


def tokens_of(count, seed=0, classes=4, length=6, width=16):
    """Tokens whose class only one token shows, which a mark tells apart; half of the others show wrong classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    shown = torch.randint(classes, (count, length), generator=generator)
    place = torch.randint(1, length, (count,), generator=generator)  # the first is the class token
    shown[torch.arange(count), place] = labels
    rows = F.one_hot(shown, width).float() * 3 + random(count, length, width, seed=seed) * 0.3
    rows[torch.arange(count), place, width - 1] += 6
    return rows.half(), labels


def lars_oracle(head, tokens, labels, rows, lr, epochs, batch, seed):
    """Training by MAE's LARS, written out: momentum 0.9, trust coefficient 0.001, biases as in SGD."""
    batches = list(probe_batches(rows, epochs, batch, seed))
    moving = {name: torch.zeros_like(parameter) for name, parameter in head.named_parameters()}
    head.train()
    for step, part in enumerate(batches):
        head.zero_grad()
        F.cross_entropy(head(tokens[part]), labels[part]).backward()
        rate = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                update = parameter.grad
                if parameter.ndim > 1 and parameter.norm() > 0 and update.norm() > 0:
                    update = update * (0.001 * parameter.norm() / update.norm())
                moving[name] = 0.9 * moving[name] + update
                parameter -= rate * moving[name]
    return head.eval()


@pytest.mark.parametrize("pool", ["ep", "aim_all"])
def test_a_head_is_trained_as_the_slow_form_trains_it(pool):
    bank, labels = tokens_of(64)
    rows, options = torch.arange(0, 64, 2), {"queries": 4, "heads": 2}
    heads = make_heads(3, pool, 16, 4, 5, options)
    start = [head.state_dict() for head in make_heads(2, pool, 16, 4, 5, options)]
    assert all(torch.equal(start[0][name], start[1][name]) for name in start[0])
    read = bank.float() if pool.endswith("_all") else bank[:, 1:].float()
    expected = lars_oracle(make_heads(1, pool, 16, 4, 5, options)[0], read, labels, rows, 5.0, 3, 8, 7)
    stored = Tokens(bank.numpy(), labels.numpy(), pool, 1, "cpu")
    train_attentive(heads, stored, rows, [0.1, 5.0, 1e30], 3, 8, 7)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(heads[1].state_dict()[name], value, atol=1e-5, rtol=1e-4)
    hits = attentive_hits(heads, stored, torch.arange(64))
    with torch.no_grad():
        right = expected(read).argmax(dim=1) == labels
    assert torch.equal(hits[1, :, 0], right) and not hits[2].any() and hits.shape == (3, 64, 2)


def test_queries_find_the_token_that_matters():
    """Where one token of six shows the class, the mean of the tokens cannot, and attention can."""
    (bank, labels), (queries, query_labels) = tokens_of(600), tokens_of(200, seed=1)
    options = {"epochs": 12, "batch": 32, "lrs": (5, 25), "head": {"queries": 4}}
    found = fast_attentive(bank.numpy(), labels.numpy(), queries.numpy(), query_labels.numpy(), 4, **options)
    means = [rows[:, 1:].float().mean(dim=1) for rows in (bank, queries)]
    linear = fast_probe(means[0], labels, means[1], query_labels, 4, epochs=20, batch=32)
    assert found.top1 > 90 > linear.top1 + 10
    assert 100 * found.hits.mean() == pytest.approx(found.top1) and len(found.hits) == 200


def test_held_out_images_choose_and_queries_do_not(monkeypatch):
    (bank, labels), (queries, query_labels) = tokens_of(80), tokens_of(40, seed=1)
    trained, scored = [], []

    def record(heads, tokens, rows, lrs, *rest):
        trained.append((len(tokens.labels), rows.tolist(), list(lrs)))
        train_attentive(heads, tokens, rows, lrs, *rest)

    def judge(heads, tokens, rows):
        scored.append((len(tokens.labels), rows.tolist()))
        return attentive_hits(heads, tokens, rows)

    monkeypatch.setattr(module, "train_attentive", record)
    monkeypatch.setattr(module, "attentive_hits", judge)
    options = {"epochs": 4, "batch": 16, "lrs": (10, 1, 3), "head": {"queries": 4}, "held_out": 0.2}
    right = fast_attentive(bank, labels, queries, query_labels, 4, **options)
    (first, train, tried), (second, everything, chosen) = trained
    (held_from, held), (judged, all_queries) = scored
    assert (first, second, held_from, judged) == (80, 80, 80, 40) and tried == [1, 3, 10]
    assert sorted(train + held) == everything == list(range(80)) and all_queries == list(range(40))
    assert chosen == [right.lr] and right.held_out[right.lr] == max(right.held_out.values())
    wrong = fast_attentive(bank, labels, queries, (query_labels + 1) % 4, 4, **options)
    assert wrong.held_out == right.held_out and wrong.lr == right.lr
    torch.manual_seed(9)
    np.random.seed(9)
    again = fast_attentive(bank, labels, queries, query_labels, 4, **options)
    assert again == right and np.array_equal(again.hits, right.hits)
    assert fast_attentive(bank, labels, queries, query_labels, 4, **options, seed=1) != right


@pytest.mark.parametrize("pool, attention", [("ep_all", None), ("aim", {"heads": 2})])
def test_no_other_dialect_has_an_attentive_head(pool, attention, tmp_path):
    """It is refused, or left out where a part is asked for; an encoder for other tasks is read without it."""
    network = Classifier(5, pool, probe=True, attention=attention, **SMALL)
    path, classes = tmp_path / "probe.pth", list("abcde")
    write_checkpoint({"format": "semaim", "model": network.state_dict(), "classes": classes, "config": None}, path)
    assert re.search("classes +5: a, b, c, ...", inspect(path))
    with pytest.raises(UserError, match="head"):
        convert(path, tmp_path / "out.pth", "timm")
    left = convert(path, tmp_path / "out.pth", "timm", partial=True)
    written = checkpoints.read(tmp_path / "out.pth").state
    assert "head.0.cls_token" in left and not any(name.startswith("head") for name in written)
    for source in (path, tmp_path / "out.pth"):
        other = Classifier(7, "avg", **SMALL)
        load_pretrained(other, source)
        assert torch.equal(other.blocks[1].mlp.fc1.weight, network.blocks[1].mlp.fc1.weight)
