"""CamVid's street scenes: 11 classes in ADE20K's folders, label 0 for the unlabelled; lent to other configs."""

_classes = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
_palette = [
    [128, 128, 128],
    [128, 0, 0],
    [192, 192, 128],
    [128, 64, 128],
    [60, 40, 222],
    [128, 128, 0],
    [192, 128, 128],
    [64, 64, 128],
    [64, 0, 128],
    [64, 64, 0],
    [0, 128, 192],
]
_camvid = dict(
    type="BaseSegDataset",
    data_root="data/camvid",
    metainfo=dict(classes=_classes, palette=_palette),
    reduce_zero_label=True,
)
