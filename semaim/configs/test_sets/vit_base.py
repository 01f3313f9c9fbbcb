"""Further test sets of ImageNet's classes, such as ImageNet-V2, -A, -R and -Sketch: --test-root NAME=DIR for each."""

_base_ = "../_base_/features.py"

task = "test_sets"
evaluation = dict(_delete_=True, type="FurtherSets")
