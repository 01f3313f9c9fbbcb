"""The oracle of the two-stream model against the recorded results of the reference."""

import json

import oracle
import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "case", ["pixel", "pixel_l1_qd2_linear", "large_decoder", "feature", "feature_clip", "clip_tower"]
)
def test_oracle_gives_the_recorded_loss(shared, case):
    recorded = load_file(shared / f"golden/semaim/{case}.safetensors")
    meta = json.loads((shared / f"golden/semaim/{case}.json").read_text())
    config = meta["config"]
    images = load_file(shared / "golden/images.safetensors")[meta["images"]["tensor"]][: len(recorded["order_key"])]
    p = {name.removeprefix("param."): t for name, t in recorded.items() if name.startswith("param.")}
    prediction = oracle.predict(
        images,
        p,
        recorded["order_key"],
        patch=(16, 16),
        depth=config["depth"],
        heads=config["num_heads"],
        decoder_depth=config["query_depth"],
        head=config["prediction_head_type"].lower(),
    )
    tensors = meta["tensors"]
    torch.testing.assert_close(prediction, recorded["pred"][:, 1:], atol=tensors["pred"]["atol"], rtol=0)
    if "teacher_tokens" in recorded:
        loss_map = oracle.feature_loss(prediction, recorded["teacher_tokens"])
    else:
        kernel = config["gaussian_kernel_size"] or 0
        target = oracle.pixel_target(images, (16, 16), kernel, config["gaussian_sigma"], config["norm_pix_loss"])
        loss_map = oracle.pixel_loss(prediction, target, config["loss_type"].lower())
    torch.testing.assert_close(loss_map, recorded["loss_map"], atol=tensors["loss_map"]["atol"], rtol=0)


def test_masks_of_the_oracle_are_the_recorded_ones(shared):
    recorded = load_file(shared / "golden/semaim/orders.safetensors")
    content, query = oracle.visible(recorded["tie_example.key"])
    assert torch.equal(content, recorded["tie_example.content_visible"].bool())
    assert torch.equal(query, recorded["tie_example.query_visible"].bool())
