"""Few labels of the built-in scenes: the encoder of semaim_vit_tiny_scenes."""

_base_ = "../knn/vit_tiny_scenes.py"

task = "few_labels"
evaluation = dict(_delete_=True, type="FewLabels")
