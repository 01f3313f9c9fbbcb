"""The baselines: the usual formulations, written from their descriptions and made as fast as they allow.

`ExplicitMasks` uses the parameters of one of our models, so the same input gives the same loss and gradients. It uses
our code only for the target and, for other orders than the paper's, for the keys.

Shapes: B images, L patches, N = 1 + L tokens (class token first), D channels.
"""

import io
import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from semaim.data.folder import find_images
from semaim.data.shards import read_bytes
from semaim.models import segvit
from semaim.models.ordering import make_order
from semaim.models.relative import relative_vectors
from semaim.models.semaim import SemAIM
from semaim.models.vit import LAYER_NORM_EPS
from semaim.models.vitdet import MapAttention

Layer = Any  #: a block or MLP of ours, of which the parameters alone are read


def plain_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """PyTorch's own product with a layer's weights."""
    return F.linear(x, layer.weight, layer.bias)


def plain_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """PyTorch's own layer norm with a layer's weights."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, LAYER_NORM_EPS)


def plain_mlp(x: Tensor, mlp: Layer) -> Tensor:
    """Linear, GELU, linear."""
    return plain_linear(F.gelu(plain_linear(x, mlp.fc1)), mlp.fc2)


def unfused_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """softmax(scale * Q K^T + mask) V in three steps: (B, N, D) and a mask (B, 1, N, N) -> (B, N, D)."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    if mask is not None:
        scores += mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


class ExplicitMasks(nn.Module):
    """SemAIM as published: a separate additive mask for each image, all else as in an ordinary transformer.

    * The order pass runs without gradient, in fp32 outside of autocast, and its last block twice: once for attention
      weights that are not used, once for the tokens.
    * Masks are fp32 (B, 1, N, N), 0 and minus infinity, built in each step and added in place to the scores.
    * All N rows are computed in both streams: the class token's query, the last patch, and the class token's
      prediction, which is discarded.
    * Query blocks normalise queries, keys and values one by one, though keys and values are the same tokens.

    In two points it is better than the published code: the key of the semantic order is computed in fp64, so that
    rounding ties no two patches and the loss can be checked against ours; dropout of probability 0 is left out.

    Args:
        model: its parameters, order and pixel target are used; its guide has to be the encoder itself.
    """

    def __init__(self, model: SemAIM):
        super().__init__()
        if model.guide != "online" or model.similarity != "cls":
            raise ValueError("the explicit form is written for the class token of the encoder itself")
        self.model = model

    def embed(self, images: Tensor) -> Tensor:
        """Class and patch tokens with positions: (B, N, D)."""
        model = self.model
        position = model.positions(model.grid_of(images.shape[-2:]))
        proj = model.patch_embed.proj
        patches = F.conv2d(images, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)
        class_token = (model.cls_token + position[:, :1]).expand(len(images), -1, -1)
        return torch.cat([class_token, patches + position[:, 1:]], dim=1)

    def block(self, x: Tensor, block: Layer, mask: Tensor | None) -> Tensor:
        """Self-attention and MLP: (B, N, D) -> (B, N, D)."""
        query, key, value = plain_linear(plain_norm(x, block.norm1), block.attn.qkv).chunk(3, dim=-1)
        out = unfused_attention(query, key, value, block.attn.num_heads, mask)
        x = x + plain_linear(out, block.attn.proj)
        return x + plain_mlp(plain_norm(x, block.norm2), block.mlp)

    def read(self, x: Tensor, content: Tensor, block: Layer, mask: Tensor) -> Tensor:
        """A query block's attention to the content, and MLP: (B, N, D), (B, N, D) -> (B, N, D)."""
        attn = block.attn
        query = plain_linear(plain_norm(x, block.norm1), attn.q)
        key = plain_linear(plain_norm(content, block.norm1), attn.k)
        value = plain_linear(plain_norm(content, block.norm1), attn.v)
        x = x + plain_linear(unfused_attention(query, key, value, attn.num_heads, mask), attn.proj)
        return x + plain_mlp(plain_norm(x, block.norm2), block.mlp)

    @torch.no_grad()
    def similarity(self, images: Tensor) -> Tensor:
        """The order pass: scaled similarity of each patch to the class token, (B, L)."""
        with torch.autocast(images.device.type, enabled=False):
            x = self.embed(images)
            last: Layer = self.model.blocks[-1]
            for block in self.model.blocks[:-1]:
                x = self.block(x, block, None)
            query, key, _ = plain_linear(plain_norm(x, last.norm1), last.attn.qkv).chunk(3, dim=-1)
            query, key = (t.unflatten(-1, (last.attn.num_heads, -1)).transpose(1, 2) for t in (query, key))
            ((query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5).softmax(dim=-1)  # unused, as published
            x = plain_norm(self.block(x, last, None), cast(nn.LayerNorm, self.model.norm))
            return F.cosine_similarity(x[:, :1], x[:, 1:], dim=-1).softmax(dim=-1)

    @torch.no_grad()
    def keys(self, images: Tensor, draw: Tensor) -> Tensor:
        """The key of each patch; the order is by rising key: (B, L)."""
        model, grid = self.model, self.model.grid_of(images.shape[-2:])
        similarity = self.similarity(images)
        if model.order != "semantic":
            return make_order(model.order, similarity, grid, draw).argsort(dim=-1)
        index = torch.arange(grid[0] * grid[1], device=images.device)
        row, column = index // grid[1], index % grid[1]
        centre = similarity.argmax(dim=-1, keepdim=True)
        away = (row - centre // grid[1]).square() + (column - centre % grid[1]).square()
        return away.double().sqrt() + 1e-3 * draw

    @staticmethod
    def masks(key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, L) -> additive masks of content and query stream, fp32 (B, 1, N, N)."""
        seen = key[:, None, :] <= key[:, :, None], key[:, None, :] < key[:, :, None]
        masks = []
        for patches in seen:
            mask = torch.full((len(key), 1, 1 + key.shape[1], 1 + key.shape[1]), float("-inf"), device=key.device)
            mask[..., 0] = 0
            mask[:, 0, 1:, 1:].masked_fill_(patches, 0)
            masks.append(mask)
        return masks[0], masks[1]

    def forward(self, images: Tensor, draw: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) and draw (B, L) -> the scalar loss."""
        model = self.model
        content_mask, query_mask = self.masks(self.keys(images, draw))
        target = model.target.prepare(images)
        content = self.embed(images)
        query = model.positions(model.grid_of(images.shape[-2:])).expand(len(images), -1, -1)
        for index, block in enumerate(model.blocks):
            content = self.block(content, block, content_mask)
            if (index + 1) % model.step == 0:
                query = self.read(query, content, model.query_blocks[index // model.step], query_mask)
        query, head = plain_norm(query, cast(nn.LayerNorm, model.norm)), model.prediction_head
        prediction = plain_linear(query, head) if isinstance(head, nn.Linear) else plain_mlp(query, head)
        return model.target.loss(prediction[:, 1:], target).mean()


def published_step(
    explicit: ExplicitMasks, images: Tensor, draw: Tensor, groups: list[dict], betas: tuple[float, float]
) -> Callable[[], float]:
    """Its training step: fp16 with loss scaling on a GPU (fp32 on a CPU), clipping, AdamW, the loss copied to the host.

    The optimizer is the default `torch.optim.AdamW(parameters)`: not fused; one tensor after another on a CPU, in lists
    of tensors ("foreach") on a GPU.
    """
    kind = images.device.type
    scaler = torch.amp.GradScaler(kind, enabled=kind == "cuda")
    optimizer = torch.optim.AdamW(groups, betas=betas)
    parameters = [parameter for group in groups for parameter in group["params"]]

    def step() -> float:
        with torch.autocast(kind, torch.float16, enabled=kind == "cuda"):
            loss = explicit(images, draw)
        value = loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 3.0)
        scaler.step(optimizer)
        scaler.update()
        return value

    return step


def plain_map_attention(attention: MapAttention, maps: Tensor) -> Tensor:
    """ViTDet's global attention with our weights: the (HW x HW) bias is built, and each step is a separate operation.

    scale * q.k, plus a bias for all pairs from q.h and q.w, then the softmax in fp32 and the product with the values.

    Args:
        attention: of a global block.
        maps: (B, H, W, D).
    """
    grid, heads = maps.shape[1:3], attention.num_heads
    query, key, value = (
        t.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in plain_linear(maps, attention.qkv).chunk(3, dim=-1)
    )
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    by_place = query.unflatten(2, grid)
    along_h = torch.einsum("bnhwd,hkd->bnhwk", by_place, relative_vectors(attention.rel_pos_h, grid[0]))
    along_w = torch.einsum("bnhwd,wkd->bnhwk", by_place, relative_vectors(attention.rel_pos_w, grid[1]))
    scores = scores.unflatten(2, grid).unflatten(4, grid) + along_h[..., :, None] + along_w[..., None, :]
    out = scores.flatten(4, 5).flatten(2, 3).softmax(dim=-1) @ value
    return plain_linear(out.transpose(1, 2).flatten(2).unflatten(1, grid), attention.proj)


def plain_biased_attention(attention: segvit.BiasedAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """UperNet's attention with our weights, each step a separate operation: (B, 1 + L, D) -> (B, 1 + L, D).

    The grid is the one that the bias table is made for.
    """
    query, key, value = plain_linear(x, attention.qkv).chunk(3, dim=-1)
    bias = attention.rel_bias[segvit.bias_index(grid, x.device)].permute(2, 0, 1)
    return plain_linear(unfused_attention(query, key, value, attention.num_heads, bias), attention.proj)


def plain_transform(img_size: int, min_scale: float = 0.2, floats: bool = True) -> transforms.Compose:
    """torchvision's v1 transforms: a random crop, flipped or not, as normalised floats or as uint8: (3, S, S)."""
    bicubic, normalise = InterpolationMode.BICUBIC, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(img_size, scale=(min_scale, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            *([transforms.ToTensor(), normalise] if floats else [transforms.PILToTensor()]),
        ]
    )


class PlainImages(Dataset):
    """Random crops loaded in the usual way: Pillow, torchvision's v1 transforms, normalised floats in the worker.

    Args:
        root: as for `PretrainImages`.
        img_size: side of the crops in pixels.
        min_scale: smallest share of an image's area that a crop may have.
        floats: False for uint8 crops.
    """

    def __init__(self, root: str | os.PathLike, img_size: int = 224, min_scale: float = 0.2, floats: bool = True):
        self.paths = find_images(root)
        self.transform = plain_transform(img_size, min_scale, floats)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(io.BytesIO(read_bytes(self.paths[index]))).convert("RGB"))
