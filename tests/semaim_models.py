"""Small SemAIM models with random parameters, and the oracle's results for them."""

import oracle
import torch

from semaim.models import PixelTarget, SemAIM

#: patches (rows, columns) and patch (height, width)
SHAPES = [((3, 3), (4, 4)), ((5, 7), (4, 4)), ((4, 2), (8, 8)), ((2, 3), (8, 4)), ((1, 1), (4, 4))]
DEPTH, HEADS = 4, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(grid, patch, batch=2, seed=0):
    return random(batch, 3, grid[0] * patch[0], grid[1] * patch[1], seed=seed)


def build(grid=(3, 4), patch=(4, 4), target=None, **options):
    """A small model with every parameter away from its special start."""
    torch.manual_seed(7)
    size = dict(embed_dim=16, depth=DEPTH, num_heads=HEADS, patch_size=patch)
    size["img_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    model = SemAIM(target or PixelTarget(patch), **(size | options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.02 if "weight" in name and parameter.dim() > 1 else 0.2)
    return model


def plain(module):
    return dict(module.named_parameters())


def oracle_tokens(model, images):
    """The unmasked pass of a model or encoder: tokens and class attention."""
    return oracle.tokens(images, plain(model), patch=model.patch_size, depth=model.depth, heads=model.num_heads)


def oracle_prediction(model, images, key, head="mlp"):
    return oracle.predict(
        images,
        plain(model),
        key,
        patch=model.patch_size,
        depth=model.depth,
        heads=model.num_heads,
        decoder_depth=model.depth // model.step,
        head=head,
        share_weights=not model.query_blocks,
    )
