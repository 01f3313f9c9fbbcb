"""Pictures of what a pretrained model does with images, one row each, and the curves of a run."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from semaim.errors import UserError
from semaim.models import MAE, SemAIM
from semaim.models.ordering import Grid, make_order, similarity_map
from semaim.models.targets import PixelTarget
from semaim.models.vit import VisionTransformer, patchify, unpatchify

COMPARED = ("raster", "stochastic", "similarity", "semantic")  #: orders that stand side by side, as in the paper
SEEN = {"cls": "the class token", "gap": "the mean patch"}  #: what a network's `similarity` compares patches with

Panel = Callable[[Axes], object]  #: draws one cell


# Laying out


def render(figure: Figure) -> Image.Image:
    """A matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


def lay_out(columns: dict[str, list[Panel]], title: str = "", across: bool = False) -> Image.Image:
    """Panels under the names of their columns, a row for each image; `across`: turned, a column for each image."""
    side, rows, names = 1.6, len(next(iter(columns.values()))), len(columns)
    lines = max(name.count("\n") for name in columns)
    if across:
        figure = Figure(figsize=(side * rows + 0.3 + 0.15 * lines, side * names + 0.3), layout="constrained")
        axes = figure.subplots(names, rows, squeeze=False).T
    else:
        figure = Figure(figsize=(side * names, side * rows + 0.5 + 0.15 * lines), layout="constrained")
        axes = figure.subplots(rows, names, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for place, (name, panels) in enumerate(columns.items()):
        first = axes[0, place]
        if across:
            first.text(-0.06, 0.5, name, size=9, rotation=90, ha="right", va="center", transform=first.transAxes)
        else:
            first.set_title(name, fontsize=9)
        for axis, panel in zip(axes[:, place], panels, strict=True):
            axis.set_axis_off()
            panel(axis)
    return render(figure)


def photos(images: Tensor) -> list[Panel]:
    """Images (B, 3, H, W), uint8 or floats in [0, 1]."""
    return [lambda axis, image=image: axis.imshow(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


def maps(values: Tensor, grid: Grid, colours: str = "viridis", marked: Tensor | None = None) -> list[Panel]:
    """One number per patch (B, L) as colours, a cross on the patches `marked` (B,)."""

    def draw(axis: Axes, row: int) -> None:
        axis.imshow(values[row].view(grid).float().cpu().numpy(), cmap=colours)
        if marked is not None:
            y, x = divmod(int(marked[row]), grid[1])
            axis.plot(x, y, "+", color="black", markersize=7)

    return [lambda axis, row=row: draw(axis, row) for row in range(len(values))]


def overlays(images: Tensor, values: Tensor, grid: Grid) -> list[Panel]:
    """Images uint8 (B, 3, H, W), dark where a number per patch (B, L) is low."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    light = ((values - low) / (high - low + 1e-12)).sqrt().view(-1, 1, *grid).float().cpu()
    light = F.interpolate(light, images.shape[-2:], mode="bilinear").clamp(0, 1)
    return photos(images.cpu() / 255 * (0.15 + 0.85 * light))


def ranks(order: Tensor, grid: Grid) -> list[Panel]:
    """Orders int64 (B, L), from first (bright) to last (dark), a cross on the first patch."""
    return maps(-order.argsort(dim=-1), grid, "magma", order[:, 0])


# What a `semaim.engine.pretraining.Pretraining` model makes of images, uint8 (B, 3, H, W)


@contextmanager
def looking(model, images: Tensor) -> Iterator[tuple[VisionTransformer, Tensor, Grid, Tensor]]:
    """The model's network for a look without gradient, the images normalised on its device, their grid, and `draw`."""
    network = model.network
    device = next(network.parameters()).device
    training = [module for module in network.modules() if module.training]
    network.eval()
    grid = network.grid_of(images.shape[-2:])
    draw = torch.rand(len(images), grid[0] * grid[1], generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), model.autocast(device):
            yield network, model.data_preprocessor.normalise(images.to(device)), grid, draw
    finally:
        for module in training:
            module.training = True


def draw_orders(model, images: Tensor, title: str = "", across: bool = False) -> Image.Image:
    """Image, similarity map where the order uses one, order, and with pixel targets the reconstruction.

    Every patch is predicted from the true patches before it and given the true patch's mean and variance, as these
    are normalised away.
    """
    with looking(model, images) as (network, seen, grid, draw):
        if not isinstance(network, SemAIM):
            raise UserError(f"{type(network).__name__} predicts in no order: look at its reconstruction")
        output = network(seen, draw)
        columns = {"image": photos(images)}
        if output.similarity is not None:
            columns["similarity"] = maps(output.similarity, grid)
        columns["order"] = ranks(output.order, grid)
        if isinstance(network.target, PixelTarget):
            columns["reconstruction"] = photos(rebuild(model, seen, output.prediction))
    return lay_out(columns, title, across)


def draw_comparison(model, images: Tensor, title: str = "", across: bool = False) -> Image.Image:
    """The orders `COMPARED` of the same images, the last two by this model's similarity map."""
    with looking(model, images) as (network, seen, grid, draw):
        similarity = similarities(network, seen)[0]
        columns = {"image": photos(images)}
        for name in COMPARED:
            columns[name] = ranks(make_order(name, similarity, grid, draw), grid)
    return lay_out(columns, title, across)


def draw_attention(model, images: Tensor, title: str = "", across: bool = False) -> Image.Image:
    """The class token's attention on the patches in the encoder's last block, mean over heads."""
    with looking(model, images) as (network, seen, grid, _):
        attention = network.forward_with_attention(seen)[1]
        columns = {
            "image": photos(images),
            "attention": maps(attention, grid),
            "image, lit by it": overlays(images, attention, grid),
        }
    return lay_out(columns, title, across)


def similarities(network: VisionTransformer, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How alike patches are: to what orders compare them with (B, L), the centre (B,), and to that patch (B, L)."""
    if isinstance(network, SemAIM):
        tokens, similarity = network.look(seen)
    else:
        tokens = VisionTransformer.forward(network, seen)
        similarity = similarity_map(tokens)
    centre, patches = similarity.argmax(dim=-1), tokens[:, 1:].float()
    return similarity, centre, F.cosine_similarity(patches[torch.arange(len(seen)), centre, None], patches, dim=-1)


def draw_similarity(model, images: Tensor, title: str = "", across: bool = False) -> Image.Image:
    """Similarity of the patches to the class token, whose highest is the centre of the order, and to the centre."""
    with looking(model, images) as (network, seen, grid, _):
        similarity, centre, to_centre = similarities(network, seen)
        source = getattr(network, "similarity", "cls")
        compared = f"similarity to\n{SEEN[source]}" if source in SEEN else "attention of\nthe class token"
        columns = {
            "image": photos(images),
            compared: maps(similarity, grid, marked=centre),
            "similarity to\nthe centre": maps(to_centre, grid, marked=centre),
            "image, lit by\nthe first": overlays(images, similarity, grid),
        }
    return lay_out(columns, title, across)


def draw_reconstruction(model, images: Tensor, title: str = "", across: bool = False) -> Image.Image:
    """What the model predicts of the pixels: SemAIM's in its order, MAE's of what it does not see."""
    with looking(model, images) as (network, seen, grid, draw):
        if not isinstance(network.target, PixelTarget):
            raise UserError("this run predicts features, not pixels: there is nothing to rebuild")
        output = network(seen, draw)
        whole = rebuild(model, seen, output.prediction)
        columns = {"image": photos(images)}
        if isinstance(network, MAE):
            height, width = network.patch_size
            removed = output.mask.view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3).cpu()
            shown = images.cpu() / 255
            columns["what it sees"] = photos(shown * (1 - removed) + 0.5 * removed)
            columns["reconstruction"] = photos(shown * (1 - removed) + whole * removed)  # of the rest it learns nothing
        else:
            columns |= {"order": ranks(output.order, grid), "prediction": photos(whole)}
    return lay_out(columns, title, across)


def rebuild(model, images: Tensor, prediction: Tensor) -> Tensor:
    """Predicted patches (B, L, width) of normalised images as floats in [0, 1] on the CPU (B, 3, H, W)."""
    return model.data_preprocessor.denormalise(reconstruct(model.network, images, prediction.float())).cpu()


def reconstruct(network, images: Tensor, prediction: Tensor) -> Tensor:
    """Predicted patches (B, L, width) as normalised images (B, 3, H, W)."""
    target, grid = network.target, network.grid_of(images.shape[-2:])
    if target.norm_pix:
        variance, mean = torch.var_mean(patchify(images, network.patch_size), dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    return unpatchify(prediction, network.patch_size, grid)


# Curves


def read_lines(work_dir: str | Path) -> list[dict]:
    """All logged scalars of a run in the order of time, resumed parts in place of what they repeat.

    Lines of training have `iter`; each of validation gets it here, that of the line of training before it, and a
    `validation` of True. The line that a running training has half written is left out.
    """
    kept: list[dict] = []
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        lines, last = [], 0
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if not isinstance(line, dict):
                continue
            trained = "loss" in line and "iter" in line
            last = line["iter"] if trained else last
            lines.append(line if trained else {**line, "iter": last, "validation": True})
        if lines:
            start = lines[0]["iter"]
            kept = [line for line in kept if line["iter"] < start or not start]
        kept += lines
    return kept


def read_scalars(work_dir: str | Path) -> list[dict]:
    """The logged scalars of a run's training, by rising iteration."""
    lines = read_lines(work_dir)
    if not lines and not list(Path(work_dir).glob("*/vis_data/scalars.json")):
        raise UserError(f"no logged scalars in {work_dir}: name the work folder of a run")
    by_iteration = {line["iter"]: line for line in lines if "validation" not in line}
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
