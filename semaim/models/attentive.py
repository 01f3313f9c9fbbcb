"""Attentive probes: learned queries attend to an encoder's tokens; what they gather is classified by a linear layer.

Shapes: B images, N tokens of D channels, Q queries, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  #: of the batch normalisations
QUERY_STD = 0.02  #: of the queries' first values

#: Names of `pool` in configs -> (kind of probe, whether it reads the class token besides the patches).
ATTENTIVE = {"ep": ("ep", False), "ep_all": ("ep", True), "aim": ("aim", False), "aim_all": ("aim", True)}


class EfficientPooling(nn.Module):
    """Efficient probing: every query attends to the tokens themselves, and gathers its own share of the channels.

    Query q has one attention map over all tokens, and contributes channels q D' / Q to (q + 1) D' / Q of the output,
    where D' = D / d_out: there are no projections but the values'.

    Args:
        width: D.
        queries: Q; it divides D'.
        d_out: the output has 1 / d_out of the channels.

    Source: arXiv 2506.10178, and poolings/ep.py of github.com/billpsomas/efficient-probing, whose names of parameters
    it has.
    """

    def __init__(self, width: int, queries: int = 32, d_out: int = 1):
        super().__init__()
        if queries < 1 or d_out < 1 or width % d_out or (width // d_out) % queries:
            raise ValueError(f"{queries} queries and d_out {d_out} do not divide the {width} channels of the tokens")
        self.out_features = width // d_out
        self.v = nn.Linear(width, self.out_features, bias=False)
        self.cls_token = nn.Parameter(torch.randn(1, queries, width) * QUERY_STD)

    def attention(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> weights (B, Q, N), which sum to 1 over the tokens."""
        scale = tokens.shape[-1] ** -0.5
        return (self.cls_token[0] * scale @ tokens.transpose(1, 2)).softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, D')."""
        # Averaging before projecting is the same, as both are linear, and projects Q vectors in place of N Q-th parts:
        # 2 B D (Q N + D') operations for the values, in place of 2 B D D' N.
        gathered = self.attention(tokens) @ tokens  # (B, Q, D)
        shares = self.v.weight.unflatten(0, (gathered.shape[1], -1))  # (Q, D' / Q, D)
        return torch.einsum("bqd,qcd->bqc", gathered, shares).flatten(1)


class AttentionPooling(nn.Module):
    """AIM's attention pooling: normalised tokens, projected to keys and values, and multi-head queries.

    Args:
        width: D.
        heads: H; it divides D.
        queries: Q; their outputs are averaged.

    Source: AttentionPoolingClassifier of github.com/apple/ml-aim, aim-v1/aim/v1/torch/layers.py, whose names of
    parameters it has.
    """

    def __init__(self, width: int, heads: int = 12, queries: int = 1):
        super().__init__()
        if heads < 1 or queries < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide the {width} channels of the tokens")
        self.heads, self.out_features = heads, width
        self.bn = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.cls_token = nn.Parameter(torch.randn(1, queries, width) * QUERY_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, D)."""
        tokens = self.bn(tokens.transpose(1, 2)).transpose(1, 2)
        queries = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        parts = (queries, self.k(tokens), self.v(tokens))
        gathered = F.scaled_dot_product_attention(
            *(part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        )
        return gathered.transpose(1, 2).flatten(2).mean(dim=1)


def attentive_head(
    pool: str, width: int, num_classes: int, queries: int | None = None, d_out: int = 1, heads: int = 12
) -> nn.Sequential:
    """The head of an attentive probe: tokens (B, N, D) -> logits (B, num_classes).

    Args:
        pool: a name of `ATTENTIVE`.
        width: D.
        queries: Q; None for 32 of efficient probing, 1 of AIM.
        d_out: of `EfficientPooling`.
        heads: of `AttentionPooling`.

    In efficient probing a batch normalisation without affine parameters is before the linear layer, as in MAE's linear
    probing; AIM has it on the tokens, and its linear layer has no bias.
    """
    if ATTENTIVE[pool][0] == "ep":
        pooling = EfficientPooling(width, queries or 32, d_out)
        norm = nn.BatchNorm1d(pooling.out_features, affine=False, eps=NORM_EPS)
        return nn.Sequential(pooling, norm, nn.Linear(pooling.out_features, num_classes))
    return nn.Sequential(AttentionPooling(width, heads, queries or 1), nn.Linear(width, num_classes, bias=False))


def tokens_read(pool: str, tokens: Tensor, prefix: int) -> Tensor:
    """Of an encoder's tokens (B, prefix + L, D) what an attentive probe reads: the patches, perhaps the class token."""
    patches = tokens[:, prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if ATTENTIVE[pool][1] else patches
