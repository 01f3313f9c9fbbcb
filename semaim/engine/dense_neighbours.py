"""k nearest neighbours of patches: what a frozen encoder's patches say about the classes of pixels, without training.

Shapes: H x W pixels of a label map, L patches of a grid (rows, columns), C classes, D channels, N patches of the bank
(of training images), Q queries (patches of a validation image), k neighbours.

Source: Balazevic et al., Towards In-context Scene Understanding (arXiv 2306.01667), as reimplemented in
vpariza/open-hummingbird-eval (hbird/hbird_eval.py at 0fd976f): normalised features, 30 neighbours, softmax of their
similarities over 0.02, the classes' shares of a patch's pixels as its label, rare classes sampled first.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from semaim.engine.extraction import processes
from semaim.errors import UserError


class Bank(NamedTuple):
    """Patches of the training images.

    Args:
        features: (N, D) of length 1, fp16.
        labels: (N, C) each class's share of the patch's labelled pixels, fp16.
    """

    features: Tensor
    labels: Tensor

    @property
    def megabytes(self) -> float:
        """Memory that it takes."""
        return sum(part.numel() * part.element_size() for part in self) / 1e6


def patch_counts(labels: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """How many pixels of each class a patch has: label map (H, W) -> int64 (L, C).

    The image is stretched to the grid, so a map of any size can be counted: a pixel belongs to the patch that its
    centre lies in. Values outside of 0 to C - 1 are ignored.
    """
    height, width = labels.shape
    row = (torch.arange(height, device=labels.device) * 2 + 1) * grid[0] // (2 * height)
    column = (torch.arange(width, device=labels.device) * 2 + 1) * grid[1] // (2 * width)
    patch = (row[:, None] * grid[1] + column).expand_as(labels)
    known = (labels >= 0) & (labels < classes)
    places = patch[known] * classes + labels[known].long()
    return places.bincount(minlength=grid[0] * grid[1] * classes).view(-1, classes)


def known(labels: Tensor, ignored: int) -> Tensor:
    """A label map with -1 where it is ignored."""
    return labels.long().masked_fill(labels == ignored, -1)


def patch_classes(labels: Tensor, grid: tuple[int, int], classes: int, ignored: int) -> Tensor:
    """The class that most of a patch's pixels have: label map (H, W) -> int64 (L,).

    Ignored pixels do not count: a patch of nothing else is `ignored` itself. Of equally many the lowest class.
    """
    counts = patch_counts(known(labels, ignored), grid, classes)
    return counts.argmax(dim=1).masked_fill(counts.sum(dim=1) == 0, ignored)


def sample_patches(counts: Tensor, most: int | None, generator: torch.Generator) -> Tensor:
    """Indices of at most `most` labelled patches of an image, by rising index: those of its rare classes first.

    The score of a patch is the number of patches that hold its classes, summed over them, times a uniform number; the
    smallest scores are taken.

    Args:
        counts: (L, C), of `patch_counts`.
        most: None for all.
        generator: of the image's uniform numbers, on the CPU.
    """
    present = (counts > 0).cpu().double()
    labelled = present.any(dim=1).nonzero().flatten()
    draw = torch.rand(len(counts), generator=generator, dtype=torch.float64)  # for all: the labels change no draw
    if most is None or len(labelled) <= most:
        return labelled
    scores = ((present @ present.sum(dim=0)) * draw)[labelled]
    return labelled[scores.argsort(stable=True)[:most]].sort().values


def shares(counts: Tensor) -> Tensor:
    """Counts (L, C) -> each class's share of a patch's labelled pixels (L, C); 0 for a patch without any."""
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def nearest(queries: Tensor, features: Tensor, k: int, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """The k most similar rows of a bank: queries (Q, D), features (N, D) -> cosine similarities and indices (Q, k).

    The search is exact, in fp32. `chunk` rows of the bank are compared at once with 1024 queries: 268 MB by default.
    """
    if not 1 <= k <= len(features):
        raise UserError(f"k = {k} neighbours among {len(features)} patches: give 1 to {len(features)}")
    similarities = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    indices = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(features), chunk):
        part = F.normalize(features[start : start + chunk].float(), dim=1)
        for rows in torch.arange(len(queries), device=queries.device).split(1024):
            own = F.normalize(queries[rows].float(), dim=1)
            found, index = (own @ part.T).topk(min(k, len(part)))
            found = torch.cat([similarities[rows], found], dim=1)
            index = torch.cat([indices[rows], index + start], dim=1)
            similarities[rows], best = found.topk(k)
            indices[rows] = index.gather(1, best)
    return similarities, indices


@torch.no_grad()
def predict_patches(queries: Tensor, bank: Bank, k: int, temperature: float, chunk: int = 65536) -> Tensor:
    """Shares of the classes in each query patch: queries (Q, D) -> (Q, C) fp32, which sum to 1.

    They are the mean of the neighbours' labels, weighted by the softmax of similarity / temperature.
    """
    similarities, indices = nearest(queries, bank.features, k, chunk)
    weights = (similarities / temperature).softmax(dim=1)
    found = weights.new_zeros(len(queries), bank.labels.shape[1])
    for neighbour in range(k):  # one at a time: together they would take k times the memory
        found += weights[:, neighbour, None] * bank.labels[indices[:, neighbour]].float()
    return found


def to_pixels(found: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Shares of patches (L, C) -> the class of every pixel, int64 (H, W): resized bilinearly, then the largest."""
    maps = found.T.unflatten(1, grid)[None]
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


def gather(features: Tensor, labels: Tensor, images: Tensor) -> Bank:
    """The bank of all processes, on each, from the patches of its own images.

    Args:
        features: (n, D), fp16. labels: (n, C), fp16.
        images: (n,) index of each patch's image: the bank is in its order, whatever the number of processes.
    """
    if processes()[1] == 1:
        return Bank(features, labels)
    sizes = [torch.zeros(1, dtype=torch.int64, device=images.device) for _ in range(processes()[1])]
    dist.all_gather(sizes, torch.tensor([len(images)], device=images.device))
    most = max(int(size) for size in sizes)
    parts = []
    for rows in (features, labels, images):
        padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather([part.view(torch.uint8) for part in received], padded.view(torch.uint8))  # gloo has no fp16
        parts.append(torch.cat([part[: int(size)] for part, size in zip(received, sizes, strict=True)]))
    order = parts[2].argsort(stable=True)
    return Bank(parts[0][order], parts[1][order])
