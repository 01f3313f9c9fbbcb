"""SemAIM: autoregressive self-supervised pretraining of plain vision transformers, and downstream tasks.

Its parts are imported on first use, so that `import semaim` takes no time and needs no torch:

* `open_checkpoint(file)`: what a checkpoint of any dialect holds.
* `load_encoder(file)`: its encoder, a module from images to tokens.
* `find_images(folder)`: the images in a folder; `load_images(files, encoder)`: a normalised batch of them.
* `order_of(encoder, images)`: similarity map and order of the patches; `draw_orders(files, encoder)`: their picture.
* `list_tasks()`, `list_methods()`: names of what can be trained and measured, and of how encoders are pretrained.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: Public name -> the module that defines it.
LAZY = {
    "open_checkpoint": "semaim.library",
    "load_encoder": "semaim.library",
    "find_images": "semaim.data.folder",
    "load_images": "semaim.library",
    "order_of": "semaim.library",
    "draw_orders": "semaim.library",
    "list_tasks": "semaim.registry",
    "list_methods": "semaim.registry",
}

__all__ = ["__version__", *LAZY]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'semaim' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
