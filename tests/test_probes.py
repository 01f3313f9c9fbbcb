"""k nearest neighbours and the fast linear probe on features, against slow forms written here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_features import clusters, random
from torch import nn

from semaim.engine import features as module
from semaim.engine.classifiers import Classifiers, Settings
from semaim.engine.evaluation import Frozen
from semaim.engine.features import (
    ProbeResult,
    accuracies,
    fast_probe,
    heads_hits,
    knn_accuracy,
    knn_hits,
    probe_batches,
    split_held_out,
    train_heads,
)
from semaim.errors import UserError
from semaim.tasks.fast_probe import FastProbe


def knn_oracle(bank, bank_labels, queries, labels, classes, ks, temperature):
    """One query and one neighbour at a time, in double precision."""
    unit = [row / math.sqrt(sum(x * x for x in row)) for row in bank.double().numpy()]
    result = {}
    for k in ks:
        top1 = top5 = 0
        for query, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
            query = query / math.sqrt(sum(x * x for x in query))
            near = sorted(((float(np.dot(query, row)), i) for i, row in enumerate(unit)), reverse=True)[:k]
            scores = [0.0] * classes
            for similarity, i in near:
                scores[int(bank_labels[i])] += math.exp(similarity / temperature)
            ranking = sorted(range(classes), key=lambda c: (-scores[c], c))
            top1 += ranking[0] == label
            top5 += label in ranking[:5]
        result[k] = (100 * top1 / len(queries), 100 * top5 / len(queries))
    return result


@given(
    size=st.integers(1, 40),
    queries=st.integers(1, 15),
    width=st.integers(2, 9),
    classes=st.integers(1, 9),
    chunk=st.integers(1, 50),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
    data=st.data(),
)
def test_knn_equals_the_oracle(size, queries, width, classes, chunk, temperature, data):
    ks = data.draw(st.lists(st.integers(1, size), min_size=1, max_size=4, unique=True))
    seed = data.draw(st.integers(0, 10**6))
    bank, queries = random(size, width, seed=seed) * 3, random(queries, width, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(classes, (len(rows),), generator=generator) for rows in (bank, queries)]
    given_ = (bank, labels[0], queries, labels[1], classes, ks)
    found = knn_accuracy(*given_, temperature, chunk)
    assert found == knn_oracle(*given_, temperature) and list(found) == ks
    assert found == knn_accuracy(*given_, temperature, chunk=1000)
    for i in range(len(queries)):  # a query's hits are those of the query alone
        alone = knn_accuracy(bank, labels[0], queries[i : i + 1], labels[1][i : i + 1], classes, ks, temperature)
        hits = {k: tuple(100.0 * both[i]) for k, both in knn_hits(*given_, temperature, chunk).items()}
        assert hits == alone


@pytest.mark.parametrize("temperature", [0.02, 0.07, 10])
def test_knn_weighs_by_similarity(temperature):
    bank, queries = clusters(12, noise=2), clusters(8, noise=2, seed=1)
    given_ = (*bank, *queries, 6, (3, 20, 72), temperature)
    assert knn_accuracy(*given_) == knn_oracle(*given_)


def test_a_low_temperature_does_not_overflow():
    bank, queries = clusters(12, noise=2), clusters(8, noise=2, seed=1)
    nearest = knn_accuracy(*bank, *queries, 6, (1, 20), temperature=1e-4)
    assert nearest[20][0] == nearest[1][0] == knn_oracle(*bank, *queries, 6, (1,), 1.0)[1][0]


def test_knn_of_a_file_equals_knn_in_memory(tmp_path):
    bank, queries = clusters(12, noise=1.5), clusters(8, noise=1.5, seed=1)
    np.save(tmp_path / "bank.npy", bank[0].half().numpy())
    from_file = np.load(tmp_path / "bank.npy", mmap_mode="r"), bank[1].numpy(), queries[0].numpy(), queries[1].numpy()
    expected = knn_accuracy(bank[0].half().float(), bank[1], *queries, 6)
    assert knn_accuracy(*from_file, 6, chunk=7) == expected and 20 < expected[5][0] < 90


def test_near_neighbours_are_told_apart_in_single_precision():
    angles = torch.arange(1000) * 1e-3
    bank, queries = torch.stack([angles.cos(), angles.sin()], 1), torch.stack([angles.cos(), angles.sin()], 1)
    # One step away, the similarity is 1 - 5e-7; two rows of bf16 that near are equal.
    assert knn_accuracy(bank, torch.arange(1000), queries, torch.arange(1000), 1000, (1,), chunk=300)[1][0] > 90


def test_separated_classes_are_all_right():
    bank, queries = clusters(12, noise=0.01), clusters(8, noise=0.01, seed=1)
    assert set(knn_accuracy(*bank, *queries, 6, (1, 5, 10)).values()) == {(100.0, 100.0)}


def test_random_labels_are_at_chance():
    labels = torch.randint(10, (1200,), generator=torch.Generator().manual_seed(0))
    features = random(1200, 8)
    for top1, top5 in knn_accuracy(features[:600], labels[:600], features[600:], labels[600:], 10).values():
        assert top1 == pytest.approx(10, abs=5) and top5 == pytest.approx(50, abs=9)  # 4 standard deviations


def test_top5_of_few_classes():
    bank = clusters(9, classes=3, noise=5)
    result = knn_accuracy(*bank, *clusters(5, classes=3, noise=5, seed=1), 3, (1, 5))
    assert [top5 for _, top5 in result.values()] == [100, 100] and result[5][0] < 100


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ks=(5, 37)), "k = 37 neighbours of 36: give 1 to 36"),
        (dict(ks=(0, 5)), "k = 0 neighbours"),
        (dict(classes=5), "labels 0 to 5 do not fit 5 classes"),
    ],
)
def test_knn_errors(options, message):
    options = dict(classes=6, ks=(5,)) | options
    with pytest.raises(UserError, match=message):
        knn_accuracy(*clusters(6), *clusters(2), **options)
    with pytest.raises(UserError, match="no features"):
        knn_accuracy(*clusters(6), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 6)


def score_heads(heads, features, labels, rows):
    """Top-1 and top-5 accuracy of each head."""
    return [accuracies(hits) for hits in heads_hits(heads, features, labels, rows)]


def linear_oracle(bank, labels, rows, classes, lr, batches, weight):
    """The same training by PyTorch's own layer, loss, optimizer and schedule."""
    head = nn.Linear(bank.shape[1], classes)
    norm = nn.BatchNorm1d(bank.shape[1], affine=False, eps=1e-6, momentum=None).double()
    norm(bank[rows].double())
    # The running variance is the unbiased one; that of a batch in training is not.
    norm.running_var *= (len(rows) - 1) / len(rows)
    norm.eval()
    with torch.no_grad():
        head.weight.copy_(weight.T)
        head.bias.zero_()

    def model(features):
        return head(norm(features.double()).float())

    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    batches = list(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    for part in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(bank[part]), labels[part]).backward()
        optimizer.step()
        schedule.step()
    return model, head


@pytest.mark.parametrize("lr", [0.01, 0.3, 2])
def test_a_head_equals_the_one_trained_by_pytorch(lr):
    features, labels = clusters(20, classes=8, noise=3)
    features[:, 1:] = features[:, 1:] * 5 + 30
    features[:, 0] *= 3e-4  # of the size of the normalisation's eps
    features = features.half()
    rows = torch.arange(0, len(labels), 2) + 1
    heads = train_heads(features, labels, rows, 8, [lr], 4, 16, seed=3)
    start = train_heads(features, labels, rows, 8, [lr], 0, 16, seed=3)
    assert start.weight.std() == pytest.approx(0.01, rel=0.3) and not start.bias.any()
    batches = probe_batches(rows, 4, 16, seed=3)
    expected, linear = linear_oracle(features, labels, rows, 8, lr, batches, start.weight[0])
    torch.testing.assert_close(heads.weight[0].T, linear.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads.bias[0], linear.bias, atol=1e-4, rtol=1e-4)
    logits = expected(features[rows])
    top1 = 100 * (logits.argmax(1) == labels[rows]).double().mean().item()
    top5 = 100 * (logits.topk(5).indices == labels[rows, None]).any(1).double().mean().item()
    assert score_heads(heads, features, labels, rows) == [pytest.approx((top1, top5))] and top5 < 98


def test_batches_are_shuffles_of_the_rows():
    rows = torch.arange(10, 33)
    batches = list(probe_batches(rows, 3, 5, seed=1))
    assert [len(batch) for batch in batches] == [5] * 12
    epochs = [torch.cat(batches[start : start + 4]) for start in (0, 4, 8)]
    assert all(len(set(epoch.tolist())) == 20 and set(epoch.tolist()) <= set(rows.tolist()) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert [len(batch) for batch in probe_batches(rows, 2, 1000, seed=1)] == [23, 23]
    assert not torch.equal(next(probe_batches(rows, 1, 23, seed=2)), next(probe_batches(rows, 1, 23, seed=1)))


def test_initial_weights_are_drawn_by_the_seed():
    data = (*clusters(6), torch.arange(36), 6, [0.1], 0, 16)
    first, same, other = (train_heads(*data, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_learning_rates_do_not_touch_one_another():
    features, labels = clusters(20, noise=1.5)
    rows, lrs = torch.arange(len(labels)), [0.001, 0.03, 1, 3e38]
    together = train_heads(features, labels, rows, 6, lrs, 3, 16, seed=0)
    assert not together.weight[3].isfinite().all()
    for i, lr in enumerate(lrs[:3]):
        alone = train_heads(features, labels, rows, 6, [lr], 3, 16, seed=0)
        torch.testing.assert_close(together.weight[i], alone.weight[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.bias[i], alone.bias[0], atol=1e-5, rtol=1e-4)
    scores = score_heads(together, features, labels, rows)
    assert scores[3] == (0, 0) and scores[2][0] > 50


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: max(sizes) > 1),
    share=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 100),
)
def test_held_out_part_is_stratified(sizes, share, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    train, held = split_held_out(labels, share, seed)
    assert sorted(train.tolist() + held.tolist()) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        count = int((labels[held] == label).sum())
        assert count == min(max(1, round(share * size)), max(size - 1, 0)) or abs(share * size % 1 - 0.5) < 1e-3
    assert torch.equal(held, split_held_out(labels, share, seed)[1])


def test_held_out_part_is_drawn_by_the_seed():
    labels = torch.arange(4).repeat(50)
    assert not torch.equal(split_held_out(labels, 0.1, 0)[1], split_held_out(labels, 0.1, 1)[1])


def test_what_chooses_and_what_is_trained_on(monkeypatch):
    """Held-out images are not trained on before the choice, and queries are seen last and only to be judged."""
    (bank, labels), (queries, query_labels) = clusters(20, noise=1.5), clusters(10, noise=1.5, seed=1)
    trained, scored = [], []

    def record_training(bank, labels, rows, classes, lrs, *rest):
        trained.append((bank, rows, lrs))
        return train_heads(bank, labels, rows, classes, lrs, *rest)

    def record_scoring(heads, features, labels, rows):
        scored.append((features, rows, score_heads(heads, features, labels, rows)))
        return heads_hits(heads, features, labels, rows)

    monkeypatch.setattr(module, "train_heads", record_training)
    monkeypatch.setattr(module, "heads_hits", record_scoring)
    result = fast_probe(bank, labels, queries, query_labels, 6, [0.001, 0.1, 10], epochs=3, batch=16)
    assert all(torch.equal(source, bank) for source, _, _ in trained)
    (_, train, tried), (_, everything, chosen) = trained
    (held_from, held, accuracies), (judged, all_queries, [both]) = scored
    assert torch.equal(held_from, bank) and torch.equal(judged, queries)
    assert not set(train.tolist()) & set(held.tolist()) and len(held) == 12
    assert everything.tolist() == list(range(120)) == sorted(train.tolist() + held.tolist())
    assert all_queries.tolist() == list(range(60))
    assert result.held_out == dict(zip(tried, (top1 for top1, _ in accuracies), strict=True))
    assert chosen == [result.lr] and result.held_out[result.lr] == max(result.held_out.values())
    assert (result.top1, result.top5) == both and result.hits.dtype == bool
    assert len(result.hits) == 60 and 100 * result.hits.mean() == pytest.approx(result.top1)


def test_queries_choose_nothing():
    (bank, labels), (queries, query_labels) = clusters(20, noise=1.5), clusters(10, noise=1.5, seed=1)
    right = fast_probe(bank, labels, queries, query_labels, 6, epochs=3, batch=16)
    wrong = fast_probe(bank, labels, queries, (query_labels + 1) % 6, 6, epochs=3, batch=16)
    assert right.held_out == wrong.held_out and right.lr == wrong.lr and right.top1 > wrong.top1


def test_probe_learns_and_finds_its_learning_rate():
    width = 16
    spectrum = torch.arange(1, width + 1) ** -0.7  # as features have: few strong directions and many weak ones
    bank, labels = clusters(200, width=width, noise=1)
    queries, query_labels = clusters(50, width=width, noise=1, seed=1)
    result = fast_probe(bank * spectrum, labels, queries * spectrum, query_labels, 6, batch=128, epochs=10)
    ideal = torch.cdist(queries, random(6, width, seed=100)).argmin(1)
    assert result.top1 > 100 * (ideal == query_labels).double().mean() - 3
    assert result.top5 > result.top1 and not result.at_border and "tried" not in str(result)
    assert list(result.held_out) == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]


def test_probe_repeats_itself():
    (bank, labels), queries = clusters(20, noise=2), clusters(10, noise=2, seed=1)
    bank = bank.half().numpy()
    options = dict(epochs=3, batch=16, lrs=(0.003, 0.1, 1))
    first = fast_probe(bank, labels.numpy(), *queries, 6, **options)
    torch.manual_seed(5)
    np.random.seed(5)
    assert fast_probe(bank, labels.numpy(), *queries, 6, **options) == first
    assert fast_probe(bank, labels.numpy(), *queries, 6, seed=1, **options) != first
    for seed in (0, 1):  # that of the run, for the task and for the probes of corruptions and further test sets
        data = Frozen((bank, labels.numpy()), queries, 6, torch.device("cpu"), lambda line: None, seed)
        own = fast_probe(bank, labels, *queries, 6, **options, seed=seed)
        assert FastProbe(**options).run(data).metrics["probe_top1"] == own.top1
        fitted = Classifiers(data, Settings(**options)).probe
        assert (fitted.lr, fitted.held_out) == (own.lr, own.held_out)


def test_learning_rates_at_the_border_are_reported():
    data = (*clusters(30, noise=1.5), *clusters(10, noise=1.5, seed=1), 6)
    small = fast_probe(*data, lrs=(1e-6, 1e-5, 0.1), epochs=3, batch=16)
    assert small.lr == 0.1 and small.at_border and str(small).endswith("lr 0.1, the largest tried: try larger ones")
    large = fast_probe(*data, lrs=(1e38, 0.1, 1e37), epochs=3, batch=16)
    assert large.lr == 0.1 and large.at_border and str(large).endswith("the smallest tried: try smaller ones")
    assert large.held_out[1e38] == 0 < large.held_out[0.1] and math.isfinite(large.top1)
    alone = fast_probe(*data, lrs=(0.1,), epochs=3, batch=16)
    assert not alone.at_border and alone.top1 == large.top1 == small.top1


def test_the_middle_of_the_best_learning_rates_is_taken():
    data = (*clusters(30, noise=0.01), *clusters(10, noise=0.01, seed=1), 6)
    result = fast_probe(*data, lrs=(0.03, 0.1, 0.3, 1, 3), epochs=5, batch=16)
    assert set(result.held_out.values()) == {100.0} and result.lr == 0.3 and not result.at_border
    assert result.top1 == result.top5 == 100


def test_constant_channels_do_no_harm():
    (bank, labels), (queries, query_labels) = clusters(20, noise=0.3), clusters(10, noise=0.3, seed=1)
    bank[:, 2], queries[:, 2] = 40, 40
    result = fast_probe(bank, labels, queries, query_labels, 6, lrs=(0.03, 0.1, 0.3), epochs=5, batch=16)
    assert result.top1 > 90


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lrs=(3e38, 1e39), epochs=20), "no learning rate from 3e\\+38 to 1e\\+39"),
        (dict(lrs=(0, 1)), "learning rates.*above 0"),
        (dict(lrs=()), "learning rates.*above 0"),
        (dict(held_out=1.0), "a share of 1 cannot be held out"),
        (dict(classes=5), "labels 0 to 5 do not fit 5 classes"),
    ],
)
def test_probe_errors(options, message):
    options = dict(classes=6, epochs=2, batch=16) | options
    with pytest.raises(UserError, match=message):
        fast_probe(*clusters(6), *clusters(2), **options)


def test_a_class_of_one_image_is_not_held_out():
    with pytest.raises(UserError, match="no class has two"):
        split_held_out(torch.arange(5), 0.1, 0)
    train, held = split_held_out(torch.tensor([0, 1, 1]), 0.1, 0)
    assert 0 in train.tolist() and len(held) == 1


def test_result_is_one_line():
    result = ProbeResult(0.1, 67.891, 90.0, {0.1: 60.0, 1.0: 50.0}, True)
    assert str(result) == "top-1 67.89 %, top-5 90.00 % with lr 0.1, the smallest tried: try smaller ones"
