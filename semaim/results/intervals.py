"""95 % intervals of the difference of two encoders: over seeds, and over validation images."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from semaim.errors import UserError
from semaim.outcomes import read_outcomes
from semaim.results.difference import LEVEL, difference
from semaim.results.runs import Run

NONE_KEPT = "no outcomes of single images are kept"
OTHER_IMAGES = "other validation images: no interval"  #: the two are not of one place after all
RESAMPLES = 2000  #: of a bootstrap: its ends then vary by about 2 % of the interval's width


@dataclass(frozen=True)
class Interval:
    """Ends of a 95 % interval of a gain, in the metric's unit, and what it is over."""

    low: float
    high: float
    over: str

    @property
    def side(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, 0 if it contains 0."""
        return (self.low > 0) - (self.high < 0)


def seeds_interval(differences: Sequence[float]) -> tuple[Interval | None, str]:
    """Paired t over the seeds: mean ± t sd / sqrt(n), with n - 1 degrees of freedom; or why there is none."""
    count = len(differences)
    if count < 2:
        return None, "one seed: no interval over seeds" if count else ""
    if not all(map(math.isfinite, differences)):
        return None, "not finite: no interval over seeds"
    middle, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread < 1e-9:  # such as k-NN on one encoder, which no seed changes
        return None, "all seeds give the same: no interval over seeds"
    half = t_quantile(count - 1) * spread / math.sqrt(count)
    return Interval(middle - half, middle + half, f"{count} seeds"), ""


@cache
def t_quantile(freedom: int) -> float:
    """The end of the central 95 % of Student's t."""
    from scipy.stats import t  # takes a second

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def images_interval(ours: Sequence[Run], baseline: Sequence[Run]) -> tuple[Interval | None, str]:
    """Interval over the validation images: a paired bootstrap where both kept outcomes; and why there is no such.

    Without outcomes a share of the images, such as top-1, has the wider interval of independent samples.
    """
    kind, images = ours[0].kind, ours[0].record.val_images
    if kind.unit != "%":
        return None, f"in {kind.unit}: no interval over images"
    try:
        scores, names = zip(*(scores_of(run) for run in (*ours, *baseline)), strict=True)
    except UserError as error:
        if not kind.share or not images or images < 1:
            return None, f"{error}: no interval over images"
        means = [statistics.fmean(run.value for run in runs) for runs in (ours, baseline)]
        if not all(0 <= mean <= 100 for mean in means):
            return None, "no shares of images: no interval over images"
        found = difference(means[0], int(images), means[1], int(images))
        unused = str(error) if str(error) != NONE_KEPT else ""  # the interval itself says that it is unpaired
        return Interval(found.low, found.high, f"{int(images):,} images, unpaired"), unused
    if any(not np.array_equal(names[0], other) for other in names[1:]):
        return None, OTHER_IMAGES
    if len(names[0]) < 2:
        return None, "one validation image: no interval over images"
    count = len(ours)
    low, high = bootstrap(np.stack(scores[:count]), np.stack(scores[count:]))
    return Interval(low, high, f"{len(names[0]):,} images"), ""


def scores_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """A run's scores by image, sorted by name, and the names; `UserError` if there are none, or of another result."""
    kept = read_outcomes(Path(run.folder))
    if kept is None or run.key not in kept.scores:
        raise UserError(NONE_KEPT)
    order = np.argsort(kept.names, kind="stable")
    scores, names = kept.scores[run.key][order], kept.names[order]
    mean = float(figure_of(scores[None], np.arange(len(scores))))
    if not math.isclose(mean, run.value, abs_tol=0.05):
        raise UserError(f"outcomes.npz has {mean:.2f}, results.json {run.value:.2f}")
    return scores, names


def figure_of(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The figure in percent, mean over runs, of scores (R, M) or (R, M, C, 2) on chosen images (m,)."""
    picked = scores[:, chosen].astype(np.float64)
    if picked.ndim == 2:
        return 100 * picked.mean()
    above, below = picked.sum(axis=1)[..., 0], picked.sum(axis=1)[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * np.nanmean(above / below, axis=-1).mean()


def bootstrap(ours: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % interval of the difference of two figures, by resampling images: the percentile bootstrap.

    Of means, one image that only the first has right and one that only the second has right are added, as by Bonett
    and Price (2012) and in `difference`: else 4 images that only one has right would decide, by chance 1 of 8 times.

    Args:
        ours, baseline: scores of the same images, (R, M) or (R, M, C, 2), as `figure_of` takes them.
    """
    from scipy.stats import bootstrap as resample  # takes a second

    places = np.arange(ours.shape[1])
    mean = ours.ndim == 2  # then only each image's difference matters
    if mean:
        differences = ours.mean(axis=0, dtype=np.float64) - baseline.mean(axis=0, dtype=np.float64)
        differences = 100 * np.append(differences, (1, -1))

    def of_chosen(chosen: np.ndarray) -> float:
        return float(figure_of(ours, chosen) - figure_of(baseline, chosen))

    found = resample(
        (differences if mean else places,),
        np.mean if mean else of_chosen,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(places)),  # 80 MB of fp64 at a time
        vectorized=mean,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
