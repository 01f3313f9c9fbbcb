"""Pictures of what SemAIM does: image | similarity | order | reconstruction, and the curves of a run."""

import io
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from semaim.errors import UserError
from semaim.models.targets import PixelTarget
from semaim.models.vit import patchify, unpatchify


def render(figure: Figure) -> Image.Image:
    """A matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


@torch.no_grad()
def draw_orders(model, images: Tensor, title: str = "") -> Image.Image:
    """What a `Pretraining` model makes of images, one row each.

    Args:
        model: `semaim.engine.pretraining.Pretraining`.
        images: uint8 (B, 3, H, W).
        title: over the picture.

    Columns: the image; the similarity map, where the order uses one; the order, from first (bright) to last (dark), a
    cross on the first patch; with pixel targets the reconstruction, every patch predicted from the true patches
    before it and given the true patch's mean and variance, as these are normalised away.
    """
    network, preprocess = model.network, model.data_preprocessor
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    normalised = preprocess.normalise(images.to(device))
    grid = network.grid_of(images.shape[-2:])
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(len(images), grid[0] * grid[1], generator=generator).to(device)
    with model.autocast(device):
        output = network(normalised, draw)
    network.train(training)

    rank = output.order.argsort(dim=-1).view(-1, *grid).cpu()
    columns = ["image", "order"]
    if output.similarity is not None:
        columns.insert(1, "similarity")
    if isinstance(network.target, PixelTarget):
        columns.append("reconstruction")
        rebuilt = preprocess.denormalise(reconstruct(network, normalised, output.prediction.float())).cpu()
    side = 1.6
    figure = Figure(figsize=(side * len(columns), side * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    figure.suptitle(title, fontsize=10)
    for row, line in enumerate(axes):
        for name, axis in zip(columns, line, strict=True):
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=9)
            if name == "image":
                axis.imshow(images[row].permute(1, 2, 0).cpu().numpy())
            elif name == "similarity":
                axis.imshow(output.similarity[row].view(grid).float().cpu().numpy(), cmap="viridis")
            elif name == "order":
                axis.imshow(-rank[row].numpy(), cmap="magma")
                first_row, first_column = divmod(int(output.order[row, 0]), grid[1])
                axis.plot(first_column, first_row, "+", color="black", markersize=7)
            else:
                axis.imshow(rebuilt[row].permute(1, 2, 0).numpy())
    return render(figure)


def reconstruct(network, images: Tensor, prediction: Tensor) -> Tensor:
    """Predicted patches (B, L, width) as normalised images (B, 3, H, W)."""
    target, grid = network.target, network.grid_of(images.shape[-2:])
    if target.norm_pix:
        variance, mean = torch.var_mean(patchify(images, network.patch_size), dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    return unpatchify(prediction, network.patch_size, grid)


def read_scalars(work_dir: str | Path) -> list[dict]:
    """The logged scalars of a run, resumed parts in place of what they repeat, by rising iteration."""
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    if not files:
        raise UserError(f"no logged scalars in {work_dir}: name the work folder of a run")
    by_iteration: dict[int, dict] = {}
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [line for line in lines if "loss" in line and "iter" in line]  # not of validation
        if lines:
            by_iteration = {i: line for i, line in by_iteration.items() if i < lines[0]["iter"]}
        by_iteration.update({line["iter"]: line for line in lines})
    return [by_iteration[i] for i in sorted(by_iteration)]


def draw_curve(scalars: list[dict], title: str = "") -> Image.Image:
    """Loss and learning rate over the iterations."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    iterations = [line["iter"] for line in scalars]
    axis.plot(iterations, [line["loss"] for line in scalars], color="tab:blue")
    axis.set(xlabel="iteration", title=title)
    axis.set_ylabel("loss", color="tab:blue")
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(iterations, [line["lr"] for line in scalars], color="tab:orange", linewidth=1)
    right.set_ylabel("learning rate", color="tab:orange")
    return render(figure)
