"""SemAIM: predict the patches of an image one after another, from the semantic ones to the less semantic ones.

One training step, top to bottom (Song et al., AAAI 2024, figure 1; official code skyoux/SemAIM):

1. *Look.* The guide (the encoder itself, its running average, or a teacher) sees the whole image, without gradient.
   Its tokens give a similarity map; the most similar patch is the centre, and the distance from it the order.
2. *Sort.* Patches are sorted by their place in the order. In that arrangement "see only what came earlier" is the
   ordinary causal mask, so no mask is ever built.
3. *Two streams.* The content stream encodes `[cls, p1 .. p(L-1)]` under causal self-attention. The query stream starts
   from the positions of `p1 .. pL` alone; query k attends to content tokens 0..k, which are the class token and the
   k - 1 patches before it. The last patch is not in the content stream: no patch is predicted from it. The class
   token's own query is never computed: it has no loss.
4. *Predict.* Every query predicts its patch: pixels, or the guide's features.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from semaim.models.ordering import SEMANTIC_ORDERS, check_order, make_order, similarity_map
from semaim.models.recompute import Linear
from semaim.models.targets import FeatureTarget, PixelTarget, Teacher
from semaim.models.vit import Block, CrossAttention, Mlp, VisionTransformer, take


class Output(NamedTuple):
    """What a training step produced; patches are in image order (row by row), not in the order of prediction."""

    loss: Tensor  #: scalar, mean over patches and images
    loss_map: Tensor  #: (B, L)
    prediction: Tensor  #: (B, L, width)
    target: Tensor  #: (B, L, width)
    order: Tensor  #: int64 (B, L), the patch predicted k-th
    similarity: Tensor | None  #: (B, L); None where neither order nor target needs the guide


class SemAIM(VisionTransformer):
    """The two-stream autoregressive model on the plain ViT.

    Args:
        target: what is predicted, a `PixelTarget` or `FeatureTarget`.
        order: a name of `ordering.ORDERS`; "semantic" is the paper's.
        similarity: what patches are compared with: "cls" token, "gap" (mean of the patches), or "self" (the last
            block's attention of the class token, in place of a similarity).
        guide: what looks at the image: "online" (this encoder), "ema" (its running average), or a `Teacher`.
        decoder_depth: query blocks; divides the encoder's depth, which is the default.
        head: "mlp" (one hidden layer of width 4 D) or "linear".
        share_weights: query block k runs with the weights of the encoder block it reads.
        look_precision: "same" looks at the image in the precision of the training step, so in bf16 under autocast;
            "fp32" looks without autocast, as the official code does for pixel targets. The similarity itself is in
            full precision either way. Without autocast both are the same.
        **encoder: arguments of `VisionTransformer`.
    """

    def __init__(
        self,
        target: PixelTarget | FeatureTarget,
        order: str = "semantic",
        similarity: str = "cls",
        guide: "str | Teacher" = "online",
        decoder_depth: int | None = None,
        head: str = "mlp",
        share_weights: bool = False,
        look_precision: str = "same",
        **encoder: Any,
    ):
        super().__init__(**encoder)
        if similarity not in ("cls", "gap", "self"):
            raise ValueError(f"unknown similarity {similarity!r}: choose cls, gap or self")
        if not (guide in ("online", "ema") or isinstance(guide, Teacher)):
            raise ValueError(f"unknown guide {guide!r}: choose online, ema or a teacher")
        if similarity == "self" and isinstance(guide, Teacher):
            raise ValueError("similarity self needs this encoder's attention: with a teacher choose cls or gap")
        if head not in ("mlp", "linear"):
            raise ValueError(f"unknown head {head!r}: choose mlp or linear")
        if look_precision not in ("same", "fp32"):
            raise ValueError(f"unknown look_precision {look_precision!r}: choose same or fp32")
        decoder_depth = decoder_depth or self.depth
        if self.depth % decoder_depth:
            raise ValueError(f"decoder_depth {decoder_depth} does not divide the encoder's depth {self.depth}")
        self.target, self.order, self.similarity, self.guide = target, check_order(order), similarity, guide
        self.look_precision = look_precision
        self.step = self.depth // decoder_depth  # encoder blocks per query block
        self.query_blocks = nn.ModuleList(
            Block(
                self.embed_dim,
                self.num_heads,
                self.mlp_ratio,
                with_cp=bool(self.blocks[0].with_cp),
                attention=CrossAttention,
            )
            for _ in range(0 if share_weights else decoder_depth)
        )
        width = target.width or self.embed_dim
        if isinstance(target, FeatureTarget):
            seen = guide.width if isinstance(guide, Teacher) else self.embed_dim
            if width != seen:
                raise ValueError(f"the target has {width} channels, the guide's tokens have {seen}")
        self.prediction_head = (
            Mlp(self.embed_dim, 4 * self.embed_dim, width) if head == "mlp" else Linear(self.embed_dim, width)
        )
        self.reset_parameters()
        if guide == "ema":
            self.ema = VisionTransformer(**{**encoder, "drop_path_rate": 0.0, "with_cp": False}).requires_grad_(False)
            self.ema.load_state_dict(self.state_dict(), strict=False)

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The guide's tokens (B, 1 + L, width) of the whole image, and the similarity map (B, L), in full precision."""
        with torch.autocast(images.device.type, enabled=False) if self.look_precision == "fp32" else nullcontext():
            return self._look(images)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.guide, Teacher):
            tokens = self.guide(images, self.grid_of(images.shape[-2:]))
            return tokens, similarity_map(tokens, self.similarity, scaling="minmax")
        encoder = self if self.guide == "online" else self.ema
        in_training = [module for module in self.modules() if module.training]
        self.eval()  # no drop path
        try:
            if self.similarity == "self":
                return VisionTransformer.forward_with_attention(encoder, images)
            tokens = VisionTransformer.forward(encoder, images)
        finally:
            for module in in_training:
                module.training = True
            # Otherwise an older torch may reuse in `predict` the bf16 weights that were cast here, without gradient.
            torch.clear_autocast_cache()
        return tokens, similarity_map(tokens, self.similarity)

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Predict every patch from the patches before it.

        Args:
            images: (B, 3, H, W), normalised.
            order: int64 (B, L), the patch predicted k-th.

        Returns:
            (B, L, width), in image order.
        """
        tokens = self.embed(images)
        positions = self.positions(self.grid_of(images.shape[-2:]))[:, 1:]
        content = torch.cat([tokens[:, :1], take(tokens[:, 1:], order[:, :-1])], dim=1)
        query = take(positions.expand(len(images), -1, -1), order)
        for index, block in enumerate(self.blocks):
            content = block(content, causal=True)
            if (index + 1) % self.step == 0:
                reader = self.query_blocks[index // self.step] if self.query_blocks else block
                query = reader(query, context=content, causal=True)
        return take(self.prediction_head(self.norm(query)), order.argsort(dim=-1))

    def forward(self, images: Tensor, draw: Tensor | None = None) -> Output:
        """One step's loss.

        Args:
            images: (B, 3, H, W), normalised.
            draw: (B, L) uniform numbers in [0, 1) that break ties and shuffle; drawn here if None.
        """
        grid = self.grid_of(images.shape[-2:])
        if draw is None:
            draw = torch.rand(len(images), grid[0] * grid[1], device=images.device)
        tokens = similarity = None
        if self.order in SEMANTIC_ORDERS or isinstance(self.target, FeatureTarget):
            tokens, similarity = self.look(images)
        order = make_order(self.order, similarity, grid, draw)
        target = self.target.prepare(images, tokens)
        prediction = self.predict(images, order)
        loss_map = self.target.loss(prediction, target)
        return Output(loss_map.mean(), loss_map, prediction, target, order, similarity)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weight, over the encoder; call it after each optimizer step."""
        weights = dict(self.named_parameters())
        averages = dict(self.ema.named_parameters())
        get_ema_multi_avg_fn(decay)(list(averages.values()), [weights[name] for name in averages], None)
