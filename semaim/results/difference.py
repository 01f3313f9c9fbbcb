"""Whether two shares differ by more than the sampling of the validation images explains."""

import math
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95  #: of the interval


@dataclass(frozen=True)
class Difference:
    """First minus second, and the ends of its interval, in percentage points."""

    points: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, 0 if it contains 0: cannot tell."""
        return (self.low > 0) - (self.high < 0)


def difference(first: float, first_images: int, second: float, second_images: int) -> Difference:
    """The difference of two shares in percent, such as top-1, with its 95 % interval.

    The interval is that of Agresti and Caffo (The American Statistician 54(4), 2000): the normal approximation of two
    independent binomials, after one right and one wrong image are added to each. With p = (right + 1) / (images + 2),
    its middle is p1 - p2 and its half width 1.96 sqrt(p1 (1 - p1) / (n1 + 2) + p2 (1 - p2) / (n2 + 2)). It does
    not shrink to nothing at 0 and 100 %, as Wald's does.

    Two encoders are usually measured on the same images, so the samples are paired. The variance of the difference is
    then that of independent samples minus twice the covariance. Images that are hard for one encoder are usually hard
    for the other, so the covariance is usually positive, and leaving it out makes the interval wider: conservative.

    For a mean over seeds, give the number of images of one run: all seeds use the same images, so more seeds do not
    enlarge the sample. The interval does not cover the variation between seeds.

    Args:
        first, second: shares, 0 to 100.
        first_images, second_images: number of images that each was measured on.

    Raises:
        ValueError: a share is outside 0 to 100, or there are no images.
    """
    shares = []
    for share, images in ((first, first_images), (second, second_images)):
        if not 0 <= share <= 100 or images < 1:
            raise ValueError(f"{share} % of {images} images: give 0 to 100 %, of 1 image or more")
        shares.append(((share / 100 * images + 1) / (images + 2), images + 2))
    middle = shares[0][0] - shares[1][0]
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(sum(p * (1 - p) / n for p, n in shares))
    return Difference(first - second, 100 * (middle - half), 100 * (middle + half))
