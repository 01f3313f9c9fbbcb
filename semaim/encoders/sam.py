"""SAM's image encoder (timm's `samvit_*`) as an `Encoder`: maps instead of tokens, with windows of its own.

Its blocks attend within windows of 14 patches but for four, with relative positions, as ViTDet's do, so detectors take
it as it is. What follows the blocks is a neck of two convolutions; "the final norm" of the contract is that neck.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import Tensor, nn

from semaim.checkpoints import LoadReport
from semaim.encoders.contract import FAMILIES, Source
from semaim.encoders.timm_vit import OfTimm, entry
from semaim.errors import UserError


@FAMILIES.register_module(name="sam")
class SamEncoder(OfTimm):
    """One of timm's SAM encoders, without a classifier.

    Args:
        arch: timm's name of the architecture.
        args: further arguments of timm's network.
        img_size: accepted and not used: tables keep the source's size and are resampled in every forward pass.
        patch_size: only the architecture's own.
        drop_path_rate, with_cp: as for `TimmEncoder`.
    """

    family = "sam"
    num_prefix_tokens = 0
    windowed_itself = True
    resizes = False
    timm_modules = ("vision_transformer_sam",)

    def __init__(
        self,
        arch: str,
        args: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__()
        args = dict(args or {})
        self.filter = entry(arch, self.timm_modules).filter
        self.vit = timm.create_model(arch, pretrained=False, num_classes=0, drop_path_rate=drop_path_rate, **args)
        self.patch_size = to_2tuple(self.vit.patch_embed.patch_size)
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise UserError(f"{arch} has patches of {self.patch_size[0]} pixels: its tables fit no others")
        self.arch, self.embed_dim, self.depth = arch, self.vit.embed_dim, len(self.vit.blocks)
        self.img_size = to_2tuple(self.vit.patch_embed.img_size)
        self.description = {"family": self.family, "arch": arch, "args": args, "patch_size": None}
        self.shapes = {name: tensor.shape for name, tensor in self.vit.state_dict().items()}
        if with_cp:
            self.vit.set_grad_checkpointing(True)

    @property
    def table_window(self) -> int:
        """The side of its windows."""
        return max(block.window_size for block in self.vit.blocks)

    def width_of(self, pool: str) -> int:
        """The channels of the neck; `UserError` for native, which it does not have."""
        return super().width_of(pool) if pool == "native" else self.vit.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> the maps after the neck as tokens (B, L, D')."""
        self.check_images(images)
        return self.vit.forward_features(images).flatten(2).transpose(1, 2)

    def maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See `Encoder.maps`; before the neck."""
        self.check_images(images)
        return self.vit.forward_intermediates(images, indices=list(blocks), norm=False, intermediates_only=True)

    def keep_for_maps(self) -> None:
        """See `Encoder.keep_for_maps`."""
        self.vit.neck = nn.Identity()

    def keep_for_pool(self, pool: str) -> None:
        """See `Encoder.keep_for_pool`."""
        self.check_pool(pool)

    def load(self, source: Source) -> LoadReport:
        """See `Encoder.load`; timm's names, or those of SAM's own files."""
        assert self.filter is not None
        state = self.filter({f"image_encoder.{name}": tensor for name, tensor in source.state.items()}, self.vit)
        own = self.vit.state_dict()
        needed = [name for name in self.shapes if name in own] if source.layout == "semaim" else list(self.shapes)
        matched, extra = self.compare(state, needed, source)
        self.fill(state, matched)
        return LoadReport(source.path, source.layout, matched, unexpected=[*source.left, *extra])
