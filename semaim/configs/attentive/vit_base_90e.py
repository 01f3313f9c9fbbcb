"""Efficient probing by its published protocol: LARS, total batch 4096, 90 epochs. Published for MAE: 75.5 top-1.

32 queries attend to the patch tokens before the encoder's norm, as in the official code. With the class token:
--cfg-options model.network.pool=ep_all; AIM's attention pooling: aim, aim_all.
"""

_base_ = "../linear/vit_base_90e_mae.py"

task = "attentive"
model = dict(
    network=dict(
        _delete_=True,
        type="Classifier",
        size="base",
        img_size=224,
        patch_size=16,
        num_classes=None,  # as many as the data has
        pool="ep",
        probe=True,
    )
)
total_batch_size = 4096  # peak 1.6 = 0.1 x 4096 / 256
