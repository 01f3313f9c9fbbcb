"""ViT-B from SemAIM, 100 epochs. Published for SemAIM under a recipe that is not known: 51.3 box / 45.4 mask AP;
for MAE under this recipe (ViTDet, detectron2): 51.6 / 45.9. The two must not be set against each other."""

_base_ = ["_base_/mask_rcnn.py", "_base_/coco.py", "_base_/vitdet_100ep.py", "_base_/runtime.py"]
