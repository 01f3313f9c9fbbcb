"""ImageNet-C's 15 corruptions of an image at five severities, drawn anew and reproducibly.

As ImageNet-C was made, an image is corrupted after it was resized and cropped. The published data set is JPEG files of
quality 85 of such crops, of 224 pixels; nothing is stored here, so figures differ a little from those on the files. The
files themselves are class folders and can be measured as such.

The corruptions are those of imagecorruptions-imaug, with ImageNet-C's parameters except where `DIFFERENCES` says so.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019), `create_c/make_imagenet_c.py` of github.com/hendrycks/robustness.
"""

import importlib
import inspect
import zlib
from importlib.metadata import version

import numpy as np
from PIL import Image

from semaim.data.seeding import seeded
from semaim.errors import UserError, nearest
from semaim.places import to_install

#: Kind -> names, in the paper's order.
KINDS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in KINDS.values() for name in names)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  #: side in pixels that the library takes

#: Where imagecorruptions-imaug 1.1.5 differs from ImageNet-C's script. All other parameters are equal.
DIFFERENCES = {
    "motion_blur": "own shifts along a line, weighted by the same half Gaussian; the script calls ImageMagick",
    "snow": "the flakes are blurred as in motion_blur; enlarged, they are cut at the top left, not in the middle",
    "zoom_blur": "the enlarged images are cut at the top left of what is too much, a few pixels, not in the middle",
    "glass_blur": "none at 224 pixels; other images are shuffled over their own size",
    "fog": "none at 224 pixels; other images have a map of their own size, rounded up to a power of two",
    "frost": "one of six photographs, enlarged by 1.1; the script takes one of the first five as it is",
    "pixelate": "enlarged by the nearest pixel, not by the mean over a box",
    # Root mean squares of either field of shifts, drawn for an image of 224 pixels.
    "elastic_transform": "local shifts of 1.0, 1.4, 1.8, 2.0, 2.5 pixels at 224; the script's are 0.8, 1.1, 2.0 at"
    " severities 3 to 5, and smooth ones of 2.4, 4.4 at 1 and 2; it also moves three corners, by up to 24, 49, 5, 5, 5",
}

_PACKAGE, _MODULE = "imagecorruptions-imaug", "imagecorruptions"


class Corrupt:
    """Corrupts a PIL image of RGB, 32 pixels or more a side: a step of a transform.

    What is random is drawn with one number of numpy's global generator, which `LabelledImages` seeds by (seed, index),
    and the corruption's name. So it is the same at every severity, and depends on no worker.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
    """

    def __init__(self, name: str, severity: int):
        check_corruption(name, severity)
        self.name, self.severity = name, severity
        self.function = library().corruption_dict[name]
        #: Two of the functions draw from generators of their own, which take a seed.
        self.takes_seed = "seed" in inspect.signature(self.function).parameters
        # One of them compiles itself at its first call, in seconds: here, not in every worker of every loader.
        with seeded(0):
            self(Image.new("RGB", (SMALLEST, SMALLEST)))

    def __call__(self, image: Image.Image) -> Image.Image:
        """The corrupted image, of the same size."""
        with seeded(np.random.randint(2**31), zlib.crc32(self.name.encode())):
            options = {"seed": np.random.randint(2**31)} if self.takes_seed else {}
            return Image.fromarray(np.uint8(self.function(image, self.severity, **options)))

    def __repr__(self) -> str:
        return f"Corrupt({self.name}, severity={self.severity}, {_PACKAGE} {version(_PACKAGE)})"


def check_corruption(name: str, severity: int) -> None:
    """`UserError` for an unknown corruption or severity."""
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}: {nearest(str(name), CORRUPTIONS)}")
    if type(severity) is not int or severity not in SEVERITIES:
        raise UserError(f"severity {severity!r} of {name}: give a whole number from 1 to 5 (0 for the clean image)")


def library():
    """The module of the corruptions; `UserError` if it is not installed."""
    try:
        version(_PACKAGE)  # another package, which no longer imports, has a module of that name
        return importlib.import_module(_MODULE)
    except ImportError:
        raise UserError(f"corruptions need {_PACKAGE}, which is missing: {to_install('corruptions')}") from None
