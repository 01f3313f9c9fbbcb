"""Features of a frozen encoder, extracted once without augmentation: ViT-B/16, class token.

Images have the size and crop that the encoder was made for: what its source records, else the size of its position
table, and 0.875 of the resized side.
"""

_base_ = "runtime.py"

task = "knn"
model = dict(
    type="Classification",
    network=dict(type="Classifier", size="base", img_size=None, patch_size=16, num_classes=0, pool="cls", probe=True),
    precision="bf16",
)
dataset = dict(type="LabelledImages", root="data/imagenet", augment="none", crop_pct=None)
images_per_gpu = 256
evaluation = dict(type="NearestNeighbours", ks=(10, 20, 100, 200), temperature=0.07)
