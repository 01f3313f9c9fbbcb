"""ImageNet-C's 15 corruptions at 5 severities: 75 passes over the validation images, or as many as are chosen."""

_base_ = "../_base_/features.py"

task = "corruptions"
evaluation = dict(_delete_=True, type="Corruptions")
