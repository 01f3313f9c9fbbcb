"""The encoder with a linear head on its pooled tokens: fine-tuning, linear probing, features."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from semaim.models.attentive import ATTENTIVE, attentive_head, tokens_read
from semaim.models.vit import LAYER_NORM_EPS, VisionTransformer

POOLS = ("cls", "avg")


def make_head(
    width: int, num_classes: int, probe: bool, init_std: float, pool: str = "cls", attention: dict | None = None
) -> nn.Module:
    """A linear head (B, width) -> (B, num_classes), or none for 0 classes; arguments as for `Classifier`.

    For an attentive `pool` one (B, N, width) -> (B, num_classes), with PyTorch's own initialisation; ValueError if the
    encoder is trained.
    """
    if pool in ATTENTIVE:
        if not probe:
            raise ValueError(f"pool {pool!r} is an attentive probe's, of a frozen encoder: set probe=True")
        return attentive_head(pool, width, num_classes or 1, **(attention or {}))
    if attention:
        raise ValueError(f"attention is of an attentive probe: set pool to {', '.join(ATTENTIVE)}, not {pool!r}")
    head: nn.Module = nn.Identity()
    if num_classes:
        head = nn.Linear(width, num_classes)
        trunc_normal_(head.weight, std=init_std)
        nn.init.zeros_(head.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), head) if probe else head


def attended(pool: str) -> str:
    """What an attentive probe reads, in words."""
    kind, class_token = ATTENTIVE[pool]
    reads = "class token and patches" if class_token else "patches"
    return f"{reads}, attentive ({'efficient probing' if kind == 'ep' else 'AIM'})"


class Classifier(VisionTransformer):
    """A plain ViT that classifies.

    Args:
        num_classes: of the head; 0 for no head.
        pool: "avg" pools the patch tokens of the last block, followed by a separate norm (`fc_norm`); "cls" takes the
            class token after the encoder's `norm`; a name of `ATTENTIVE` attends to the last block's tokens.
        probe: linear probing: the encoder is frozen and always in eval mode, and the head is
            preceded by a batch normalisation without affine parameters.
        head_init_std: of the head's truncated normal initialisation.
        fc_norm: whether pooled patches get that norm; None: only where it is trained, so not in a probe.
        attention: further arguments of `attentive_head`: queries, d_out, heads.
        **encoder: of `VisionTransformer`.

    Source: MAE's and SemAIM's `models_vit.py`, `main_finetune.py` and `main_linprobe.py`; names as in timm and MAE.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        num_classes: int = 1000,
        pool: str = "avg",
        probe: bool = False,
        head_init_std: float = 2e-5,
        fc_norm: bool | None = None,
        attention: dict | None = None,
        **encoder,
    ):
        super().__init__(**encoder)
        if pool not in (*POOLS, *ATTENTIVE):
            raise ValueError(f"unknown pool {pool!r}: choose from {', '.join((*POOLS, *ATTENTIVE))}")
        self.pool, self.probe, self.num_classes = pool, probe, num_classes
        # Fine-tuning trains the position table too.
        self.pos_embed.requires_grad_(not probe)
        if pool != "cls":
            # In pretraining, `norm` belongs to the decoder's end: pooled patches get a new norm, or none in a probe.
            self.norm = nn.Identity()
        if pool == "avg":
            normed = not probe if fc_norm is None else fc_norm
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS) if normed else nn.Identity()
        if probe:
            self.requires_grad_(False)
        self.head = make_head(self.embed_dim, num_classes, probe, head_init_std, pool, attention)

    @property
    def pooling(self) -> str:
        """A short description of `features` for logs and results."""
        if self.pool in ATTENTIVE:
            return attended(self.pool)
        if self.pool == "cls":
            return "class token"
        return "mean of the patches" + (", layer norm" if isinstance(self.fc_norm, nn.LayerNorm) else "")

    def train(self, mode: bool = True) -> "Classifier":
        """A probe's encoder stays in eval mode: no drop path."""
        super().train(mode and not self.probe)
        if self.probe:
            self.training = mode
            self.head.train(mode)
        return self

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an image's pooled features and tokens."""
        return {"features": (self.embed_dim,), "tokens": (1 + self.grid[0] * self.grid[1], self.embed_dim)}

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> the last block's tokens, before the norm (B, 1 + L, D)."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the head reads of `tokens`: (B, D), or (B, N, D) in an attentive probe."""
        if self.pool in ATTENTIVE:
            return tokens_read(self.pool, tokens, self.num_prefix_tokens)
        if self.pool == "avg":
            return self.fc_norm(tokens[:, 1:].mean(dim=1))
        return self.norm(tokens)[:, 0]

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> what the head reads: (B, D), or (B, N, D) in an attentive probe."""
        return self.pooled(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, num_classes)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
            features = self.features(images)
        return self.head(features)
