"""What a step computes, counted: no time is measured, so nothing here hangs on the machine."""

from unittest.mock import patch

import pytest
import torch
from operations import Operations
from torch.utils.flop_counter import FlopCounterMode

from semaim.benchmarks.baselines import ExplicitMasks
from semaim.engine.pretraining import Pretraining
from semaim.models import PixelTarget, SemAIM, cpu_products

BATCH, PATCH, DIM, DEPTH, READERS, HEADS, SIDE = 2, 8, 48, 4, 2, 4, 6
LENGTH = SIDE * SIDE
PIXELS = 3 * PATCH * PATCH


def make(**options):
    torch.manual_seed(0)
    model = SemAIM(
        PixelTarget((PATCH, PATCH), blur_kernel=0),
        img_size=SIDE * PATCH,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        decoder_depth=READERS,
        **options,
    )
    return model, torch.randn(BATCH, 3, SIDE * PATCH, SIDE * PATCH), torch.rand(BATCH, LENGTH)


def count_flops(loss_of):
    with patch.object(cpu_products, "ONE_DNN", False), FlopCounterMode(display=False) as counter:
        loss_of().backward()
    return counter.get_flop_counts()["Global"], counter.get_total_flops()


def block(tokens):
    """Products of one self-attention block with its weights: qkv 3, proj 1, MLP 8 squares of the width a token."""
    return 2 * tokens * 12 * DIM**2


def reader(queries, keys):
    """Of one query block: q, proj and MLP of the queries, k and v of the keys."""
    return 2 * (queries * 10 + keys * 2) * DIM**2


def head(queries):
    return 2 * queries * (DIM * 4 * DIM + 4 * DIM * PIXELS)


def embedding(patches=LENGTH):
    return 2 * patches * PIXELS * DIM


#: Forward; backward to inputs and to weights.
TRAINED = 3


def test_our_products_are_those_of_the_arithmetic():
    model, images, draw = make()
    counts, total = count_flops(lambda: model(images, draw).loss)
    look = embedding() + DEPTH * block(1 + LENGTH)
    content = 2 * embedding() + TRAINED * DEPTH * block(LENGTH)  # no gradient goes to the images
    query = TRAINED * (READERS * reader(LENGTH, LENGTH) + head(LENGTH))
    attention = sum(n for name, n in counts.items() if "attention" in str(name))  # torch counts it on a GPU only
    assert total - attention == BATCH * (look + content + query)


def test_explicit_masks_multiply_more():
    model, images, draw = make()
    explicit = ExplicitMasks(model)
    _, total = count_flops(lambda: explicit(images, draw))
    tokens = 1 + LENGTH
    scores = 2 * tokens * tokens * DIM  # of all heads; the product with the values costs as much
    look = embedding() + DEPTH * (block(tokens) + 2 * scores) + 2 * tokens * 3 * DIM**2 + scores  # weights, not read
    content = 2 * embedding() + TRAINED * DEPTH * (block(tokens) + 2 * scores)
    query = TRAINED * (READERS * (reader(tokens, tokens) + 2 * scores) + head(tokens))
    assert total == BATCH * (look + content + query)
    _, ours = count_flops(lambda: model(images, draw).loss)
    assert ours < total


@pytest.fixture(scope="module")
def operations():
    """A training step's operations, taken as the runner does, at a size where nothing else has L x L numbers."""
    model = Pretraining(
        network=dict(
            type="SemAIM",
            img_size=SIDE * PATCH,
            patch_size=PATCH,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            decoder_depth=READERS,
            target=dict(type="PixelTarget", blur_kernel=0),
        )
    )
    data = {"image": torch.randint(0, 256, (BATCH, 3, SIDE * PATCH, SIDE * PATCH), dtype=torch.uint8)}
    data["draw"] = torch.rand(BATCH, LENGTH)
    with Operations() as seen:
        model(**model.data_preprocessor(data, True))["loss"].backward()
    return seen


def test_every_block_runs_once_a_pass(operations):
    fused = {name: n for name, n in operations.counts.items() if "scaled_dot_product" in name}
    forward = sum(n for name, n in fused.items() if "backward" not in name)
    assert forward == DEPTH + DEPTH + READERS  # order pass, content, query
    assert sum(fused.values()) - forward == DEPTH + READERS
    norms = operations.counts["native_layer_norm"]
    once = DEPTH * 2 + 1  # order pass
    stored = DEPTH + READERS * 2 + 1  # content, queries and their context, the last norm
    again = 2 * (DEPTH + READERS)  # in front of the MLP, and once more in the backward pass
    assert norms == once + stored + again


def test_activations_are_computed_again_not_kept(operations):
    assert operations.counts["gelu"] == DEPTH + 2 * (DEPTH + READERS + 1)


def test_nothing_waits_for_the_device(operations):
    waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    assert not waiting & set(operations.counts)


def test_no_mask_and_no_attention_weights_are_built(operations):
    sides = {LENGTH, LENGTH + 1}
    assert not [shape for shape in operations.shapes if len(shape) > 1 and set(shape[-2:]) <= sides]


def test_the_explicit_form_is_seen_to_build_them():
    model, images, draw = make()
    with Operations() as seen:
        ExplicitMasks(model)(images, draw)
    assert (BATCH, 1, 1 + LENGTH, 1 + LENGTH) in seen.shapes
    assert any("softmax" in name for name in seen.counts)


def test_sorting_takes_three_sorts_and_five_gathers(operations):
    # Draws, keys, the way back; two gathers to break ties, then content, queries, predictions.
    assert operations.counts["sort"] == 3
    assert operations.counts["gather"] == 5
