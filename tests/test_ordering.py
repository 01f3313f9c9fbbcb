"""Orders: permutations that a draw repeats, what each name means, and the reference's keys."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import similarity as plain_similarity
from safetensors.torch import load_file

from semaim.models.ordering import (
    ORDERS,
    SEMANTIC_ORDERS,
    box_key,
    distance_key,
    make_order,
    similarity_map,
    sort_keys,
    square_key,
)

#: Official name -> ours. `zigzag` and `raster` look swapped there.
OFFICIAL = {
    "zigzag": "raster",
    "raster": "snake",
    "attention": "similarity",
    "stochastic": "stochastic",
    "center2out": "center_out",
    "out2center": "out_center",
    "attention_center": "semantic",
}

grids = st.tuples(st.integers(1, 9), st.integers(1, 12))
seeds = st.integers(0, 2**16)
orders = pytest.mark.parametrize("name", ORDERS)
every_grid = [(rows, columns) for rows in range(1, 10) for columns in range(1, 13)]


def inputs(grid, seed, batch=3):
    """A similarity map with many equal values, and a draw."""
    generator = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1]
    similarity = torch.randint(0, 1 + length // 2, (batch, length), generator=generator) / length
    return similarity, torch.rand(batch, length, generator=generator)


@orders
@given(grid=grids, seed=seeds)
def test_order_is_a_permutation_that_a_draw_repeats(name, grid, seed):
    similarity, draw = inputs(grid, seed)
    order = make_order(name, similarity, grid, draw)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort(dim=-1).values, torch.arange(grid[0] * grid[1]).expand_as(order))
    assert torch.equal(order, make_order(name, similarity.clone(), grid, draw.clone()))


@orders
@given(grid=grids, seed=seeds)
def test_batch_equals_one_by_one(name, grid, seed):
    similarity, draw = inputs(grid, seed)
    order = make_order(name, similarity, grid, draw)
    for image in range(len(draw)):
        alone = make_order(name, similarity[image, None], grid, draw[image, None])
        assert torch.equal(order[image, None], alone)


@orders
def test_order_stays_on_its_device(name):
    # A tensor made on the default device would meet the meta device here, and fail.
    similarity, draw = torch.rand(2, 2, 12, device="meta")
    order = make_order(name, similarity, (3, 4), draw)
    assert order.device.type == "meta" and order.shape == (2, 12)


@pytest.mark.parametrize("name", sorted(set(ORDERS) - SEMANTIC_ORDERS))
def test_orders_that_do_not_look_need_no_map(name):
    similarity, draw = inputs((4, 5), seed=1)
    assert torch.equal(make_order(name, None, (4, 5), draw), make_order(name, similarity, (4, 5), draw))


@pytest.mark.parametrize("name", sorted(SEMANTIC_ORDERS))
def test_orders_that_look_follow_the_map(name):
    similarity, draw = inputs((4, 5), seed=1)
    assert not torch.equal(make_order(name, similarity, (4, 5), draw), make_order(name, -similarity, (4, 5), draw))


# Ties


@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_sort_is_by_key_then_draw_then_index(pairs):
    key, draw = (torch.tensor(column)[None] for column in zip(*pairs, strict=True))
    expected = sorted(range(len(pairs)), key=lambda patch: (*pairs[patch], patch))
    assert sort_keys(key, draw / 5).tolist() == [expected]


@given(grid=grids, seed=seeds)
def test_equal_keys_are_ranked_by_draw(grid, seed):
    _, draw = inputs(grid, seed)
    assert torch.equal(sort_keys(torch.zeros_like(draw), draw), draw.argsort(dim=-1))


@given(grid=grids, seed=seeds)
def test_equal_distances_are_ranked_by_draw(grid, seed):
    similarity, draw = inputs(grid, seed)
    order = make_order("semantic", similarity, grid, draw)
    distance = distance_key(similarity.argmax(-1), grid).gather(1, order)
    tied = distance.diff() == 0
    assert (draw.gather(1, order).diff()[tied] > 0).all()


def test_the_official_noise_ties_patches_in_one_image_of_seven_and_ours_in_none():
    """Its keys are fp32 distances plus 0.001 times a uniform number; docs/orders.md has the share."""
    generator = torch.Generator().manual_seed(0)
    similarity, draw = (torch.rand(4000, 196, generator=generator) for _ in range(2))
    centre = similarity.argmax(-1, keepdim=True)
    patch = torch.arange(196)
    distance = (((patch // 14 - centre // 14) ** 2 + (patch % 14 - centre % 14) ** 2).float()) ** 0.5
    key = (distance + draw * 1e-3).sort(dim=-1).values
    assert 0.12 < (key.diff() == 0).any(-1).float().mean() < 0.17
    order = make_order("semantic", similarity, (14, 14), draw)
    assert torch.equal(order.sort(dim=-1).values, patch.expand(4000, -1))


# Meanings


@given(grid=grids, seed=seeds)
def test_semantic_goes_outwards_from_the_most_similar_patch(grid, seed):
    similarity, draw = inputs(grid, seed)
    order = make_order("semantic", similarity, grid, draw)
    assert torch.equal(order[:, 0], similarity.argmax(-1))
    for patches in order.tolist():
        (row, column), *others = (divmod(patch, grid[1]) for patch in patches)
        distances = [((r - row) ** 2 + (c - column) ** 2) ** 0.5 for r, c in others]
        assert distances == sorted(distances)


@given(grid=grids, seed=seeds)
def test_similarity_falls_along_its_order(grid, seed):
    similarity, draw = inputs(grid, seed)
    order = make_order("similarity", similarity, grid, draw)
    assert (similarity.gather(1, order).diff() <= 0).all()


def test_raster_and_snake():
    draw = torch.rand(1, 12)
    assert make_order("raster", None, (3, 4), draw).tolist() == [list(range(12))]
    assert make_order("snake", None, (3, 4), draw).tolist() == [[0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]]


@given(grid=grids, seed=seeds)
def test_stochastic_is_the_draw_itself(grid, seed):
    _, draw = inputs(grid, seed)
    assert torch.equal(make_order("stochastic", None, grid, draw), draw.argsort(dim=-1))


def test_center_out_starts_in_the_middle_and_out_center_ends_there():
    draw = torch.rand(1, 14 * 14)
    ring = (square_key((14, 14)) + 3).view(14, 14)
    assert (ring[6:8, 6:8] == 0).all() and (ring == 0).sum() == 2 * 2
    assert (ring[4:10, 4:10] <= 1).all() and (ring <= 1).sum() == 6 * 6
    assert (ring[2:12, 2:12] <= 2).all() and (ring <= 2).sum() == 10 * 10
    assert (ring.flatten()[make_order("center_out", None, (14, 14), draw)].diff() >= 0).all()
    assert (ring.flatten()[make_order("out_center", None, (14, 14), draw)].diff() <= 0).all()


@pytest.mark.parametrize("grid", every_grid)
def test_squares_are_symmetric_and_nested_in_the_middle(grid):
    key = square_key(grid).view(grid)
    assert torch.equal(key, key.flip(0)) and torch.equal(key, key.flip(1))
    middle_row, middle_column = grid[0] // 2, grid[1] // 2
    assert key.min() == key[middle_row, middle_column]
    assert (key[middle_row:].diff(dim=0) >= 0).all() and (key[:, middle_column:].diff(dim=1) >= 0).all()


# Nested boxes


def box_side(inside, axis):
    """First and one past the last coordinate on an axis where the mask (rows, columns) is set."""
    taken = inside.any(dim=1 - axis).nonzero().flatten()
    return taken[0].item(), taken[-1].item() + 1


@pytest.mark.parametrize("grid", every_grid)
def test_boxes_are_whole_rectangles_around_every_centre(grid):
    length = grid[0] * grid[1]
    count = -box_key(torch.arange(length), grid)
    assert (count.diagonal() == 3).all() and (count >= 0).all() and (count <= 3).all()
    for level in (1, 2, 3):
        areas = set()
        for centre in range(length):
            inside = (count[centre] >= level).view(grid)
            (top, bottom), (left, right) = box_side(inside, 0), box_side(inside, 1)
            areas.add((bottom - top, right - left))
            assert inside[top:bottom, left:right].all()
            # As near to the middle of its box as the border allows: [c - r, c + r).
            for low, high, at, limit in zip((top, left), (bottom, right), divmod(centre, grid[1]), grid, strict=True):
                if 0 < low and high < limit:
                    assert low + high == 2 * at
        assert len(areas) == 1, "a box at the border is moved, not cut"


@pytest.mark.parametrize(
    "centre, starts",
    [((7, 7), [(6, 6), (4, 4), (2, 2)]), ((0, 4), [(0, 3), (0, 1), (0, 0)]), ((13, 13), [(12, 12), (8, 8), (4, 4)])],
)
def test_boxes_on_the_grid_of_the_reference(centre, starts):
    count = torch.zeros(14, 14, dtype=torch.int64)
    for (top, left), side in zip(starts, (2, 6, 10), strict=True):
        count[top : top + side, left : left + side] += 1
    index = torch.tensor([centre[0] * 14 + centre[1]])
    assert torch.equal(-box_key(index, (14, 14))[0].view(14, 14), count)


@pytest.mark.parametrize("grid", [(28, 42), (42, 28)])
def test_boxes_grow_with_the_grid(grid):
    count = -box_key(torch.tensor([grid[0] // 2 * grid[1] + grid[1] // 2]), grid).view(grid)
    for level, side in ((3, 2), (2, 6), (1, 10)):  # sides on 14 x 14
        spans = [box_side(count >= level, axis) for axis in (0, 1)]
        assert [high - low for low, high in spans] == [side * n // 14 for n in grid]


@given(grid=grids, seed=seeds)
def test_rings_never_go_inwards(grid, seed):
    similarity, draw = inputs(grid, seed)
    for name, centre in (("semantic_rings", similarity.argmax(-1)), ("stochastic_center", draw.argmin(-1))):
        order = make_order(name, similarity, grid, draw)
        count = -box_key(centre, grid)
        assert (count.gather(1, order).diff() <= 0).all()
        assert (count.gather(1, order[:, :1]) == count.gather(1, centre[:, None])).all()


def test_stochastic_center_starts_anywhere_equally_often():
    draw = torch.rand(4800, 12, generator=torch.Generator().manual_seed(0))
    order = make_order("stochastic_center", None, (3, 4), draw)
    assert torch.equal(order[:, 0], draw.argmin(-1))
    starts = order[:, 0].bincount(minlength=12)
    assert (starts > 320).all() and (starts < 480).all()  # 400 expected, standard deviation 19


# Similarity


@pytest.mark.parametrize("source, scaling", list(itertools.product(("cls", "gap"), ("softmax", "minmax"))))
def test_similarity_is_the_plain_formula(source, scaling):
    tokens = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
    ours = similarity_map(tokens, source, scaling)
    torch.testing.assert_close(ours, plain_similarity(tokens.double(), source, scaling).float(), atol=1e-6, rtol=1e-5)


def test_similarity_range():
    tokens = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(similarity_map(tokens).sum(-1), torch.ones(2))
    scaled = similarity_map(tokens, scaling="minmax")
    assert (scaled.amin(-1) == 0).all() and (scaled.amax(-1) > 0.999).all() and (scaled <= 1).all()
    assert similarity_map(torch.ones(1, 5, 8), scaling="minmax").tolist() == [[0.0] * 4]  # no division by zero
    assert similarity_map(tokens.bfloat16()).dtype == torch.float32


# Errors


@pytest.mark.parametrize("wrong, right", [("semantc", "semantic"), ("centre_out", "center_out"), ("snke", "snake")])
def test_unknown_order_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"{wrong}.*{right}"):
        make_order(wrong, None, (1, 1), torch.zeros(1, 1))


# The reference's own results


@pytest.fixture(scope="module")
def recorded(shared):
    return load_file(shared / "golden/semaim/orders.safetensors")


@pytest.mark.parametrize("official", OFFICIAL)
def test_our_order_sorts_the_recorded_keys(recorded, official):
    maps, draws = recorded["maps"], recorded["draw"]
    keys = recorded[f"key.{official}"].double().expand_as(draws)
    for draw, key in zip(draws, keys, strict=True):
        order = make_order(OFFICIAL[official], maps, (14, 14), draw)
        assert key.gather(1, order).diff().min() >= -1e-6


def test_boxes_are_the_recorded_ones_away_from_the_far_border(recorded):
    # Beyond row or column 8 the reference's boxes run into its exclusive limit 13; and its innermost box of a centre in
    # row or column 2 starts at 0, so that it does not hold its own centre.
    near = (0, 1, 3, 4, 5, 6, 7, 8)
    centres = torch.tensor([row * 14 + column for row in near for column in near])
    assert torch.equal(-box_key(centres, (14, 14)), recorded["box_count_by_centre"][centres].long())


def test_squares_are_the_recorded_ones(recorded):
    assert torch.equal(-square_key((14, 14)), recorded["center2out.box_count"].long())


def test_similarity_order_of_the_recorded_tie(recorded):
    key = recorded["tie_example.key"]
    order = sort_keys(key, torch.rand(key.shape, generator=torch.Generator().manual_seed(0)))
    assert (key.gather(1, order).diff() >= 0).all()
