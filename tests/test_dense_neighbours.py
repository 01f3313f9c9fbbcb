"""k nearest neighbours of patches, compared with explicit loops in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semaim.engine.dense_neighbours import (
    Bank,
    nearest,
    patch_counts,
    predict_patches,
    sample_patches,
    shares,
    to_pixels,
)
from semaim.errors import UserError


@given(st.integers(1, 23), st.integers(1, 19), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_a_pixel_counts_in_the_patch_that_its_centre_lies_in(height, width, rows, columns, seed):
    labels = np.random.default_rng(seed).integers(-1, 5, (height, width))  # -1 and 3, 4 are no classes
    expected = np.zeros((rows * columns, 3), int)
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) / height * rows + 1e-9), int((x + 0.5) / width * columns + 1e-9)
            if 0 <= labels[y, x] < 3:
                expected[row * columns + column, labels[y, x]] += 1
    assert np.array_equal(patch_counts(torch.tensor(labels), (rows, columns), 3).numpy(), expected)


def test_shares_are_of_the_labelled_pixels():
    found = shares(torch.tensor([[3, 1], [0, 0], [0, 2]]))
    assert found.tolist() == [[0.75, 0.25], [0, 0], [0, 1]]


def slow(queries, features, labels, k, temperature):
    """Each class's share in each query patch, by sorting all similarities."""
    found = np.zeros((len(queries), labels.shape[1]))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for place, query in enumerate(queries):
        similarity = unit @ (query / np.linalg.norm(query))
        best = np.argsort(-similarity)[:k]
        weights = np.exp((similarity[best] - similarity[best[0]]) / temperature)
        for neighbour, weight in zip(best, weights / weights.sum(), strict=True):
            found[place] += weight * labels[neighbour]
    return found


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 90])
def test_neighbours_are_those_of_an_explicit_loop(k, chunk):
    random = np.random.default_rng(0)
    queries, features = random.standard_normal((33, 16)), random.standard_normal((90, 16)) * 3
    labels = random.dirichlet(np.ones(6), 90)
    bank = Bank(torch.tensor(features).float(), torch.tensor(labels).float())
    found = predict_patches(torch.tensor(queries).float(), bank, k, 0.02, chunk)
    assert np.allclose(found.numpy(), slow(queries, features, labels, k, 0.02), atol=2e-4)
    assert found.sum(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    similarity, index = nearest(torch.tensor(queries).float(), bank.features, k, chunk)
    assert torch.equal(similarity, similarity.sort(dim=1, descending=True).values) and index.unique().numel() <= 90
    with pytest.raises(UserError, match="k = 91 neighbours among 90 patches: give 1 to 90"):
        nearest(torch.tensor(queries).float(), bank.features, 91, chunk)


def test_a_patch_that_is_in_the_bank_is_what_its_label_says():
    features = torch.eye(4)
    bank = Bank(features.half(), torch.tensor([[1, 0], [0, 1], [1, 0], [0.25, 0.75]]).half())
    assert predict_patches(features * 5, bank, 1, 0.02).tolist() == bank.labels.tolist()


def test_sampled_patches_are_labelled_and_rare_classes_come_first():
    counts = torch.zeros(100, 3, dtype=torch.int64)
    counts[:90, 0], counts[90:95, 1] = 4, 4  # the last five are not labelled
    chosen = [sample_patches(counts, 20, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all(len(set(found.tolist())) == 20 and int(found.max()) < 95 for found in chosen)
    rare = np.mean([(found >= 90).sum().item() for found in chosen])
    # A rare patch scores below 5, a common one below 90: five are taken in all but few draws.
    assert rare > 4.5
    again = sample_patches(counts, 20, torch.Generator().manual_seed(3))
    assert torch.equal(again, chosen[3]) and not torch.equal(again, chosen[4])
    for most in (None, 95, 1000):
        assert sample_patches(counts, most, torch.Generator()).tolist() == list(range(95))


def test_pixels_are_the_largest_of_the_shares_resized_bilinearly():
    torch.manual_seed(0)
    grid, size = (3, 4), (11, 10)
    found = torch.rand(12, 5)
    maps = found.numpy().reshape(*grid, 5).astype(float)
    expected = np.zeros((*size, 5))
    for y in range(size[0]):
        for x in range(size[1]):
            place = [max((p + 0.5) * g / s - 0.5, 0) for p, g, s in zip((y, x), grid, size, strict=True)]
            low = [int(p) for p in place]
            high = [min(p + 1, g - 1) for p, g in zip(low, grid, strict=True)]
            b, r = place[0] - low[0], place[1] - low[1]
            top = maps[low[0], low[1]] * (1 - r) + maps[low[0], high[1]] * r
            bottom = maps[high[0], low[1]] * (1 - r) + maps[high[0], high[1]] * r
            expected[y, x] = top * (1 - b) + bottom * b
    assert np.array_equal(to_pixels(found, grid, size).numpy(), expected.argmax(axis=-1))
