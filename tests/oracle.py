"""A plain, slow second form of the model, to test the fast one against.

SemAIM with explicit additive masks, one per image: nothing is sorted, every row is computed (the class token's query
and the last patch too), attention is two matrix products and a softmax. No module of semaim is used; `p` is a dict of
parameters by name. Everything stands in image order.

Shapes: B images, L patches, N = 1 + L tokens (class token first), D channels.
"""

import math

import numpy as np
import torch


def rank_of(order):
    """Order (B, L), the patch predicted k-th -> key (B, L), the place of each patch."""
    key = torch.empty_like(order)
    for image, patches in enumerate(order.tolist()):
        for place, patch in enumerate(patches):
            key[image, patch] = place
    return key


def visible(key):
    """Which token sees which: key (B, L) -> content and query, bool (B, N, N), [b, i, j] where i sees j."""
    size, length = key.shape
    content, query = torch.zeros(2, size, length + 1, length + 1, dtype=torch.bool)
    content[:, :, 0] = query[:, :, 0] = True
    content[:, 1:, 1:] = key[:, None, :] <= key[:, :, None]
    query[:, 1:, 1:] = key[:, None, :] < key[:, :, None]
    return content, query


def additive(seen):
    """Bool (B, N, N) -> 0 where seen, minus infinity elsewhere."""
    return torch.where(seen, 0.0, -math.inf)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(x, p, name):
    x = linear(x, p, f"{name}.fc1")
    return linear(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), p, f"{name}.fc2")


def attention_weights(query, key, heads, mask):
    """(B, N, D), (B, M, D) -> per head (B, N, M), rows summing to 1."""
    width = query.shape[-1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        yield part, torch.softmax(scores + mask, dim=-1)


def attend(query, key, value, heads, mask):
    return torch.cat([w @ value[..., part] for part, w in attention_weights(query, key, heads, mask)], dim=-1)


def qkv(x, p, name):
    """Query, key and value layers of an encoder block's attention, from the one stacked layer."""
    dim = x.shape[-1]
    for start in (0, dim, 2 * dim):
        rows = slice(start, start + dim)
        yield lambda y, rows=rows: y @ p[f"{name}.qkv.weight"][rows].T + p[f"{name}.qkv.bias"][rows]


def block(x, context, p, name, heads, mask):
    """Pre-norm block; keys and values from `context`, through the same norm as the queries."""
    if f"{name}.attn.qkv.weight" in p:
        to_query, to_key, to_value = qkv(x, p, f"{name}.attn")
    else:
        to_query, to_key, to_value = (lambda y, k=k: linear(y, p, f"{name}.attn.{k}") for k in "qkv")
    x_normed, context = norm(x, p, f"{name}.norm1"), norm(context, p, f"{name}.norm1")
    out = attend(to_query(x_normed), to_key(context), to_value(context), heads, mask)
    x = x + linear(out, p, f"{name}.attn.proj")
    return x + mlp(norm(x, p, f"{name}.norm2"), p, f"{name}.mlp")


def patchify(images, patch):
    """(B, C, H, W) -> (B, L, ph * pw * C), row by row, the channel fastest, one patch after another."""
    height, width = patch
    patches = []
    for top in range(0, images.shape[2], height):
        for left in range(0, images.shape[3], width):
            patches.append(images[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(patches, dim=1)


def embed(images, p, patch):
    """Class and patch tokens with positions (B, N, D), for images of the position table's own size."""
    weight = p["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    patches = patchify(images, patch) @ weight.T + p["patch_embed.proj.bias"]
    return torch.cat([p["cls_token"].expand(len(images), 1, -1), patches], dim=1) + p["pos_embed"]


def tokens(images, p, *, patch, depth, heads):
    """The unmasked pass: tokens after the final norm (B, N, D), and the last block's class attention (B, L)."""
    x = embed(images, p, patch)
    for index in range(depth):
        if index == depth - 1:
            normed = norm(x, p, f"blocks.{index}.norm1")
            query, key, _ = (layer(normed) for layer in qkv(x, p, f"blocks.{index}.attn"))
            weights = [w for _, w in attention_weights(query, key, heads, 0)]
            attention = sum(weights)[:, 0, 1:] / heads
        x = block(x, x, p, f"blocks.{index}", heads, 0)
    return norm(x, p, "norm"), attention


def predict(images, p, key, *, patch, depth, heads, decoder_depth, head="mlp", share_weights=False):
    """Masked two-stream pass -> prediction of every patch (B, L, width).

    Args:
        key: (B, L); a patch is predicted from the patches whose key is smaller. `rank_of(order)` for an order.
    """
    content_mask, query_mask = (additive(seen).to(images.dtype) for seen in visible(key))
    content = embed(images, p, patch)
    query = p["pos_embed"].expand(len(images), -1, -1)
    step = depth // decoder_depth
    for index in range(depth):
        content = block(content, content, p, f"blocks.{index}", heads, content_mask)
        if index % step == step - 1:
            name = f"blocks.{index}" if share_weights else f"query_blocks.{index // step}"
            query = block(query, content, p, name, heads, query_mask)
    predict_one = mlp if head == "mlp" else linear
    return predict_one(norm(query, p, "norm"), p, "prediction_head")[:, 1:]


def cosine(a, b):
    return (a * b).sum(-1) / a.square().sum(-1).sqrt() / b.square().sum(-1).sqrt()


def similarity(tokens, source="cls", scaling="softmax"):
    """Tokens (B, N, D) -> (B, L)."""
    whole = tokens[:, :1] if source == "cls" else tokens[:, 1:].sum(1, keepdim=True) / (tokens.shape[1] - 1)
    value = cosine(whole, tokens[:, 1:])
    if scaling == "softmax":
        return value.exp() / value.exp().sum(-1, keepdim=True)
    low, high = value.min(-1, keepdim=True).values, value.max(-1, keepdim=True).values
    return (value - low) / (high - low + 1e-6)


def gaussian(size, sigma):
    """Weights of a Gaussian that sum to 1: nested lists (size, size)."""
    middle = (size - 1) / 2
    raw = [
        [math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / (2 * sigma**2)) for j in range(size)] for i in range(size)
    ]
    total = sum(map(sum, raw))
    return [[value / total for value in row] for row in raw]


def blur(images, size, sigma):
    """Weighted sum of shifted images, nothing (zero) outside the border."""
    height, width = images.shape[2:]
    reach = size // 2
    wide = images.new_zeros(*images.shape[:2], height + 2 * reach, width + 2 * reach)
    wide[:, :, reach : reach + height, reach : reach + width] = images
    out = torch.zeros_like(images)
    for i, row in enumerate(gaussian(size, sigma)):
        for j, weight in enumerate(row):
            out = out + weight * wide[:, :, i : i + height, j : j + width]
    return out


def pixel_target(images, patch, blur_kernel=9, blur_sigma=1.0, norm_pix=True):
    """(B, L, ph * pw * C): blurred, then normalised per patch with the unbiased variance."""
    patches = patchify(blur(images, blur_kernel, blur_sigma) if blur_kernel else images, patch)
    if not norm_pix:
        return patches
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()


def pixel_loss(prediction, target, loss="l2"):
    """(B, L), mean over each patch's values."""
    difference = prediction - target
    return (difference.abs() if loss == "l1" else difference**2).mean(-1)


def feature_loss(prediction, tokens):
    """(B, L): 2 - 2 cos between the prediction and the guide's patch tokens (B, N, width)."""
    return 2 - 2 * cosine(prediction, tokens[:, 1:])


def sincos(dim, grid):
    """Sine-cosine positions (1, N, dim): column half, then row half; all sines, then all cosines."""
    quarter = dim // 4
    table = np.zeros((1, 1 + grid[0] * grid[1], dim))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for half, coordinate in enumerate((column, row)):
                for k in range(quarter):
                    angle = coordinate / 10000 ** (k / quarter)
                    start = 2 * quarter * half
                    table[0, 1 + row * grid[1] + column, start + k] = math.sin(angle)
                    table[0, 1 + row * grid[1] + column, start + quarter + k] = math.cos(angle)
    return torch.from_numpy(table)
