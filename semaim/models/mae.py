"""MAE: predict the removed patches of an image from the few that are kept. The baseline, on the same encoder.

One training step, top to bottom (He et al., CVPR 2022; official code facebookresearch/mae at efb2a80):

1. *Remove.* One uniform number per patch; the patches with the smallest are kept, a quarter of them in the paper.
2. *Encode.* The encoder sees the class token and the kept patches only, which is why MAE is fast.
3. *Decode.* The latent is projected to the decoder's width, a mask token stands in for every removed patch, positions
   are added, and a few narrow blocks see all of it.
4. *Predict.* Every patch predicts its pixels; the loss is the mean over the removed patches.

Every image loses equally many patches, so the mean over the removed patches of a batch does not change when the batch
is split over processes or accumulated steps.

Shapes: B images, L patches, K of them kept, D encoder channels; `width` values per patch.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from semaim.models.targets import PixelTarget
from semaim.models.vit import LAYER_NORM_EPS, Block, VisionTransformer, sincos_positions, take


class MAEOutput(NamedTuple):
    """What a training step produced; patches are in image order (row by row)."""

    loss: Tensor  #: scalar, mean over the removed patches of all images
    loss_map: Tensor  #: (B, L), of the kept patches too
    prediction: Tensor  #: (B, L, width)
    target: Tensor  #: (B, L, width)
    mask: Tensor  #: (B, L), 1 where the patch was removed, 0 where it was kept


class MAE(VisionTransformer):
    """The masked autoencoder on the plain ViT.

    Args:
        target: the pixels of each patch; MAE does not blur them (`blur_kernel=0`).
        mask_ratio: share of the patches that is removed; int(L * (1 - mask_ratio)) are kept.
        decoder_embed_dim: width of the decoder's tokens; its MLP ratio is the encoder's.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: heads of a block of the decoder.
        **encoder: arguments of `VisionTransformer`. Drop path is the encoder's alone, `with_cp` the decoder's too.
    """

    def __init__(
        self,
        target: PixelTarget,
        mask_ratio: float = 0.75,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        **encoder: Any,
    ):
        super().__init__(**encoder)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is no share of the patches between 0 and 1")
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth {decoder_depth}: a decoder needs a block")
        if not isinstance(target, PixelTarget):
            raise ValueError(f"MAE predicts pixels: the target has to be a PixelTarget, not a {type(target).__name__}")
        encoder_patch, target_patch = ((*part.patch_size, part.in_chans) for part in (self, target))
        if encoder_patch != target_patch:  # not only the width: 8 x 2 pixels are as many as 4 x 4
            raise ValueError(
                f"the target's patches have (height, width, channels) {target_patch}, the encoder's {encoder_patch}"
            )
        self.target, self.mask_ratio = target, mask_ratio
        self.count_kept(self.grid[0] * self.grid[1])  # fails now, not in the first step
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, self.mlp_ratio, with_cp=bool(self.blocks[0].with_cp))
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target.width)
        self.reset_parameters()
        nn.init.normal_(self.mask_token, std=0.02)

    def count_kept(self, length: int) -> int:
        """The number of patches kept of an image's `length`; ValueError for none or all."""
        kept = int(length * (1 - self.mask_ratio))
        if not 0 < kept < length:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps {kept} of {length} patches: keep some, remove some")
        return kept

    def remove(self, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the kept patches.

        Args:
            draw: (B, L) uniform numbers; the smallest are kept.

        Returns:
            kept: int64 (B, K), the kept patches by rising draw.
            place: int64 (B, L), where each patch stands when all are sorted by rising draw; the reference's
                `ids_restore`.
            mask: (B, L) float32, 1 where removed.
        """
        order = draw.argsort(dim=-1, stable=True)
        place, count = order.argsort(dim=-1), self.count_kept(draw.shape[1])
        return order[:, :count], place, (place >= count).float()

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised, and kept patches int64 (B, K) -> latent (B, 1 + K, D), class token first."""
        tokens = self.embed(images)  # positions are added before patches are removed
        tokens = torch.cat([tokens[:, :1], take(tokens[:, 1:], kept)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def decode(self, latent: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent (B, 1 + K, D) and place int64 (B, L) on a (rows, columns) grid -> prediction (B, L, width)."""
        tokens = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(place), place.shape[1] + 1 - tokens.shape[1], -1)
        patches = take(torch.cat([tokens[:, 1:], mask_tokens], dim=1), place)
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
        tokens = tokens + resample_abs_pos_embed(self.decoder_pos_embed, grid, self.grid, num_prefix_tokens=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def forward(self, images: Tensor, draw: Tensor | None = None) -> MAEOutput:
        """One step's loss.

        Args:
            images: (B, 3, H, W), normalised.
            draw: (B, L) uniform numbers in [0, 1), the masking noise; drawn here if None.
        """
        grid = self.grid_of(images.shape[-2:])
        if draw is None:
            draw = torch.rand(len(images), grid[0] * grid[1], device=images.device)
        kept, place, mask = self.remove(draw)
        target = self.target.prepare(images)
        prediction = self.decode(self.encode(images, kept), place, grid)
        loss_map = self.target.loss(prediction, target)
        return MAEOutput((loss_map * mask).sum() / mask.sum(), loss_map, prediction, target, mask)
