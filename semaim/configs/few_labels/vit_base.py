"""Few labels of ImageNet: 1 to 16 per class, and seeded draws of 1 % and 10 %.

SimCLR's published lists, which are not shipped: --cfg-options evaluation.lists=[1percent.txt,10percent.txt].
"""

_base_ = "../_base_/features.py"

task = "few_labels"
evaluation = dict(_delete_=True, type="FewLabels", shares=(0.01, 0.1))
