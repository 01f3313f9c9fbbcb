"""Features of a frozen encoder, extracted once without augmentation: ViT-B/16, 224 px, class token."""

_base_ = "runtime.py"

task = "knn"
model = dict(
    type="Classification",
    network=dict(type="Classifier", size="base", img_size=224, patch_size=16, num_classes=0, pool="cls", probe=True),
    precision="bf16",
)
dataset = dict(type="LabelledImages", root="data/imagenet", augment="none", crop_pct=0.875)
images_per_gpu = 256
evaluation = dict(type="NearestNeighbours", ks=(10, 20, 100, 200), temperature=0.07)
