"""This suite's own ViT, as SemAIM, MAE and SimMIM pretrain it, as an `Encoder`."""

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim import checkpoints
from semaim.checkpoints import LoadReport
from semaim.encoders.contract import FAMILIES, Encoder, Source
from semaim.errors import UserError
from semaim.models.vit import VisionTransformer


@FAMILIES.register_module(name="semaim")
class OwnEncoder(VisionTransformer, Encoder):
    """`VisionTransformer` with the contract's methods; its positions are trained, and resampled for other sizes.

    Args:
        **sizes: of `VisionTransformer`: size or embed_dim, depth and num_heads; img_size, patch_size, mlp_ratio.
    """

    family = "semaim"
    num_prefix_tokens = 1
    resamples_patches = True  #: a checkpoint may have patches of another size; see `checkpoints.load`

    def __init__(self, **sizes: Any):
        super().__init__(**{name: value for name, value in sizes.items() if value is not None})
        self.pos_embed.requires_grad_(True)
        kept = {key: getattr(self, key) for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
        self.img_size = to_2tuple(sizes.get("img_size") or 224)
        self.description = {"family": self.family, **kept, "patch_size": list(self.patch_size)}

    grid_of = Encoder.grid_of  # with the advice

    @property
    def title(self) -> str:
        """The size in words."""
        return f"ViT of width {self.embed_dim}, depth {self.depth}, patch {self.patch_size[0]}"

    def embed(self, images: Tensor) -> Tensor:
        """As `VisionTransformer.embed`; `UserError` unless given a batch of images of whole patches."""
        self.check_images(images)
        return super().embed(images)

    def maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See `Encoder.maps`."""
        tokens, grid, found = self.embed(images), self.grid_of(images.shape[-2:]), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in blocks:
                found.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())
        return found

    def normed_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See `Encoder.normed_maps`; of any blocks."""
        return [self.norm(tokens.movedim(1, -1)).movedim(-1, 1).contiguous() for tokens in self.maps(images, blocks)]

    def load(self, source: Source) -> LoadReport:
        """See `Encoder.load`."""
        if source.checkpoint is None:
            raise UserError(f"{source.name} holds no encoder of this suite's own")
        expected = () if isinstance(self.norm, nn.LayerNorm) else ("norm",)
        if self.pos_embed.is_meta:
            return checkpoints.fit(self, source.checkpoint, expected)[0]
        return checkpoints.load(self, source.checkpoint, expected)

    def no_weight_decay(self) -> set[str]:
        """See `Encoder.no_weight_decay`."""
        return {"cls_token", "pos_embed"}

    def keep_for_maps(self) -> None:
        """See `Encoder.keep_for_maps`."""
        self.norm = nn.Identity()

    def keep_for_pool(self, pool: str) -> None:
        """See `Encoder.keep_for_pool`: each pooling reads everything."""
        self.check_pool(pool)
