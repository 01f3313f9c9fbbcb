"""UperNet on ViT-B from SemAIM. SemAIM's own mIoU is not known; published for MAE under this recipe: 48.1."""

_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime.py"]
