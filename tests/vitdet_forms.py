"""Small ViTDets with random parameters, and a slow form of their forward pass with every bias written out."""

import oracle
import torch
import torch.nn.functional as F
from torch import nn

from semaim.models.vitdet import ViTDet

PATCH, DEPTH, HEADS, DIM = 4, 3, 2, 20
TABLES = ("rel_pos_h", "rel_pos_w")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(grid, batch=2):
    return random(batch, 3, grid[0] * PATCH, grid[1] * PATCH)


def pixels(grid):
    return grid[0] * PATCH, grid[1] * PATCH


def build(table=(4, 4), pretrain=(3, 5), **options):
    """A small encoder with every parameter away from its special start; block 1 is global."""
    size = dict(patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, window_size=3, global_blocks=(1,))
    size |= dict(img_size=pixels(table), pretrain_img_size=pixels(pretrain))
    model = ViTDet(**(size | options))
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def plain(module, name=""):
    return {f"{name}{key}": parameter for key, parameter in module.named_parameters()}


def gradients(loss, module):
    return dict(zip(plain(module), torch.autograd.grad(loss, module.parameters()), strict=True))


# The slow form: one image, one window, one head after another, with an N x N bias whose places are looped over.


def slow_table(table, length):
    """A table (n, d) resampled to (length, d), linearly between centres."""
    rows = []
    for i in range(length):
        place = min(max((i + 0.5) * len(table) / length - 0.5, 0), len(table) - 1)
        low = int(place)
        high = min(low + 1, len(table) - 1)
        rows.append(table[low] * (low + 1 - place) + table[high] * (place - low))
    return torch.stack(rows)


def slow_bias(query, height, width, table_h, table_w):
    """(N, d) unscaled queries of one head -> (N, N)."""
    table_h, table_w = slow_table(table_h, 2 * height - 1), slow_table(table_w, 2 * width - 1)
    place_h, place_w = [], []
    for y in range(height):
        for x in range(width):
            place_h.append([y - v + height - 1 for v in range(height) for _ in range(width)])
            place_w.append([x - u + width - 1 for _ in range(height) for u in range(width)])
    each = torch.arange(height * width)[:, None]
    return (query @ table_h.T)[each, torch.tensor(place_h)] + (query @ table_w.T)[each, torch.tensor(place_w)]


def slow_attention(x, p, name, heads, window, relative=True):
    """Normalised map (B, H, W, D) -> (B, H, W, D)."""
    height, width, dim = x.shape[1:]
    side_h, side_w = (window, window) if window else (height, width)
    out = torch.zeros_like(x)
    for index, image in enumerate(x):
        for top in range(0, height, side_h):
            for left in range(0, width, side_w):
                here = (slice(top, top + side_h), slice(left, left + side_w))
                tokens = image.new_zeros(side_h, side_w, dim)
                rows, columns = image[here].shape[:2]
                tokens[:rows, :columns] = image[here]
                tokens = tokens.flatten(0, 1)[None]
                query, key, value = (layer(tokens) for layer in oracle.qkv(tokens, p, name))
                attended = []
                for part in torch.arange(dim).chunk(heads):
                    bias = 0
                    if relative:
                        tables = (p[f"{name}.{table}"] for table in TABLES)
                        bias = slow_bias(query[0][:, part], side_h, side_w, *tables)
                    attended.append(oracle.attend(query[..., part], key[..., part], value[..., part], 1, bias))
                attended = oracle.linear(torch.cat(attended, -1), p, f"{name}.proj")
                out[(index, *here)] = attended[0].unflatten(0, (side_h, side_w))[:rows, :columns]
    return out


def slow_forward(model, images):
    """Images (B, 3, height, width) -> map (B, D, H, W)."""
    p, grid = plain(model), (images.shape[2] // PATCH, images.shape[3] // PATCH)
    table = p["pos_embed"]
    if grid != model.grid:
        table = table[0].T.unflatten(1, model.grid)[None]
        table = F.interpolate(table, grid, mode="bicubic", antialias=False)[0].flatten(1).T
    weight = p["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    x = oracle.patchify(images, (PATCH, PATCH)) @ weight.T + p["patch_embed.proj.bias"] + table
    x = x.unflatten(1, grid)
    for index in range(DEPTH):
        name, window = f"blocks.{index}", 0 if index in model.global_blocks else model.window_size
        relative = "blocks.0.attn.rel_pos_h" in p
        x = x + slow_attention(oracle.norm(x, p, f"{name}.norm1"), p, f"{name}.attn", HEADS, window, relative)
        x = x + oracle.mlp(oracle.norm(x, p, f"{name}.norm2"), p, f"{name}.mlp")
    return x.permute(0, 3, 1, 2)
