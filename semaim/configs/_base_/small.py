"""What the configs for small data lend to each other: encoders, and the classes of the built-in scenes."""

_scenes = dict(size="tiny", depth=4, img_size=64, patch_size=8)
_scenes_easy = dict(_scenes, embed_dim=128, num_heads=2)
_cifar10 = dict(size="tiny", embed_dim=128, depth=4, num_heads=4, img_size=32, patch_size=4)

_classes = (
    "airplane",
    "bag",
    "ball",
    "bird",
    "car",
    "cat",
    "clock",
    "dog",
    "fish",
    "flower",
    "fruit",
    "hat",
    "heart",
    "horse",
    "insect",
    "monkey",
    "shoe",
    "smiley",
    "train",
    "tree",
)
_classes_easy = ("airplane", "ball", "car", "cat", "clock", "fish", "flower", "heart", "smiley", "tree")
_palette = [[37 * i % 256, 91 * i % 256, 153 * i % 256] for i in range(1, 22)]  # of the classes and the background
