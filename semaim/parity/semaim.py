"""SemAIM against the official code: similarity, orders, both streams, losses, gradients, schedules."""

from typing import cast

import torch
from torch import Tensor, nn

from semaim.engine.optim import group_parameters
from semaim.engine.schedule import cosine_with_warmup
from semaim.errors import UserError
from semaim.models import FeatureTarget, PixelTarget, SemAIM, Teacher
from semaim.models.ordering import ORDERS, box_counts, make_order, rows_and_columns, similarity_map, square_key
from semaim.models.targets import ema_decay
from semaim.models.vit import Block, VisionTransformer, sincos_positions
from semaim.parity.cases import EXACT, Case, CaseReport, Check, gradient
from semaim.parity.clip import check_tower

#: The official names of the orders. `zigzag` and `raster` look swapped there.
OFFICIAL_ORDERS = {
    "attention_center": "semantic",
    "attention": "similarity",
    "attention_guided": "semantic_rings",
    "zigzag": "raster",
    "raster": "snake",
    "stochastic": "stochastic",
    "center2out": "center_out",
    "out2center": "out_center",
    "stochastic_center": "stochastic_center",
}


def check(case: Case, report: CaseReport) -> None:
    """Run one case; its contents decide what is checked."""
    if "config" not in case.meta:
        raise UserError(f"{case.name} is no recorded case: it has no config")
    if case.meta["config"].get("share_weight") and case.meta["status"] != "ok":
        check_shared_weights(case, report)
    elif "order_key" in case.tensors:
        check_model(case, report)
        if "tower" in case.meta["config"]:
            check_tower(case, report, build_model(case))
    elif "draw" in case.tensors:
        check_orders(case, report)
    else:
        check_schedules(case, report)


class RecordedTeacher(Teacher):
    """Returns the recorded tokens of the reference's teacher."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.width = tokens, tokens.shape[-1]

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The recorded tokens, whatever the images."""
        return self.tokens


def build_model(case: Case) -> SemAIM:
    """Our model with the configuration and parameters of a case."""
    cfg = case.meta["config"]
    features = cfg["predict_feature"] != "none"
    guide: str | Teacher = "online"
    target: FeatureTarget | PixelTarget
    if "teacher_tokens" in case.tensors:
        guide = RecordedTeacher(case.tensors["teacher_tokens"])
    if features:
        target = FeatureTarget(guide.width if isinstance(guide, Teacher) else None)
    else:
        target = PixelTarget(
            (cfg["patch_size"],) * 2,
            cfg["in_chans"],
            cfg.get("gaussian_kernel_size") or 0,
            cfg.get("gaussian_sigma") or 1.0,
            cfg["norm_pix_loss"],
            cfg["loss_type"].lower(),
        )
    model = SemAIM(
        target,
        OFFICIAL_ORDERS[cfg["permutation_type"]],
        cfg["attention_type"],
        guide,
        decoder_depth=cfg["query_depth"],
        head=cfg["prediction_head_type"].lower(),
        share_weights=cfg["share_weight"],
        img_size=cfg["img_size"],
        patch_size=cfg["patch_size"],
        in_chans=cfg["in_chans"],
        embed_dim=cfg["embed_dim"],
        depth=cfg["depth"],
        num_heads=cfg["num_heads"],
        mlp_ratio=cfg["mlp_ratio"],
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = cfg["layer_norm_eps"]
    parameters = case.parameters()
    kernel = parameters.pop("gaussian_blur.weight", None)
    if kernel is not None and isinstance(target, PixelTarget) and target.kernel is not None:
        target.kernel.copy_(kernel[0, 0].sum(dim=0))  # of a product of two 1-D kernels
    parameters.pop("gaussian_blur.bias", None)
    if parameters:
        model.load_state_dict(parameters)
    return model


def recover_draw(order: str, key: Tensor, similarity: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The uniform numbers contained in the reference's keys."""
    if order == "semantic" and similarity is not None:
        zeros = torch.zeros_like(similarity)
        return (key - ORDERS[order](similarity, grid, zeros).sqrt()) / 1e-3
    if order == "similarity":
        return torch.zeros_like(key)
    return key - key.floor()


def fall_along(key: Tensor, order: Tensor) -> float:
    """The largest decrease of a key (B, L) along an order (B, L): 0 if the order sorts it."""
    ordered = key.gather(1, order)
    return (ordered[:, :-1] - ordered[:, 1:]).max().clamp_min(0).item()


def check_model(case: Case, report: CaseReport) -> None:
    """A training step of SemAIM: similarity, order, both streams, prediction, loss and gradients."""
    model, golden, images = build_model(case), case.tensors, case.batch
    cfg, scalars = case.meta["config"], case.scalars
    grid, batch = model.grid, len(images)

    def compare(name: str, ours: Tensor) -> None:
        if name in golden:
            report.add(name, ours, golden[name], case.tolerance(name))

    compare("param.pos_embed", sincos_positions(model.embed_dim, grid))
    if "gaussian_blur.weight" in case.parameters() and not isinstance(model.target, FeatureTarget):
        fresh = PixelTarget((1, 1), cfg["in_chans"], cfg["gaussian_kernel_size"], cfg["gaussian_sigma"]).kernel
        if fresh is not None:
            compare("param.gaussian_blur.weight", torch.outer(fresh, fresh).expand(cfg["in_chans"], 1, -1, -1))

    # Look.
    tokens, similarity = model.look(images)
    compare("similarity", similarity)
    if "teacher_tokens" not in golden:
        compare("encoder_tokens", tokens)
        for source in ("cls", "gap"):
            compare(f"similarity_{source}", similarity_map(tokens, source))
        compare("similarity_self", model.forward_with_attention(images)[1])
    if "centre_row_col" in scalars:
        centre = torch.tensor(scalars["centre_row_col"])
        ours = similarity.argmax(dim=-1)
        report.add("centre_row_col", torch.stack([ours // grid[1], ours % grid[1]], dim=-1), centre, 0.5)

    # Order.
    key = golden["order_key"]
    order = key.argsort(dim=-1, stable=True)
    kind = cfg["permutation_type"]
    if kind == "attention_guided" and grid == (14, 14):
        report.add("order", -key.floor(), reference_boxes(grid)[similarity.argmax(dim=-1)], None)
    elif kind in ("attention_guided", "stochastic_center") or (kind == "raster" and grid != (14, 14)):
        report.deviations.append(f"order {kind} of the reference is defective on this grid; its keys are used as given")
    else:
        draw = recover_draw(model.order, key, similarity, grid)
        fall = fall_along(key, make_order(model.order, similarity, grid, draw))
        report.checks.append(Check("order", fall, EXACT))
    rank = order.argsort(dim=-1)
    tied = [index for index in range(batch) if len(key[index].unique()) < key.shape[1]]
    free = [index for index in range(batch) if index not in tied]
    if tied:
        report.deviations.append(
            f"images {tied} have patches with equal keys, which see each other in the reference and are ranked here:"
            " results that depend on them (also loss and gradients) are not compared"
        )
    seen = torch.ones(batch, 1, key.shape[1] + 1, dtype=torch.bool)
    class_row = torch.zeros_like(seen)
    class_row[..., 0] = True
    earlier = torch.cat([seen[:, 0, :1, None].expand(-1, key.shape[1], 1), rank[:, None] < rank[..., None]], dim=-1)
    own = torch.nn.functional.pad(torch.eye(key.shape[1], dtype=torch.bool), (1, 0))
    for name, visible in {"content_visible": earlier | own, "query_visible": earlier}.items():
        if name in golden:
            visible = torch.cat([class_row, visible], dim=1)
            report.add(name, visible[free], golden[name][free], None)

    # Two streams: hooks record ours in the sorted order; the reference's are sorted alike for the comparison.
    streams: dict[str, Tensor] = {}
    for prefix, blocks in {"content_stream": model.blocks, "query_stream": model.query_blocks}.items():
        for index, block in enumerate(blocks):
            block.register_forward_hook(
                lambda _, __, output, name=f"{prefix}.{index}": streams.update({name: output.detach()})
            )
    target = model.target.prepare(images, tokens)
    prediction = model.predict(images, order)
    loss_map = model.target.loss(prediction, target)
    for name, stream in streams.items():
        if name not in golden:
            continue
        content = name.startswith("content")
        recorded = golden[name][:, 1:].gather(1, order[..., None].expand(-1, -1, stream.shape[-1]))
        recorded = torch.cat([golden[name][:, :1], recorded[:, :-1]], dim=1) if content else recorded
        report.add(name, stream[free], recorded[free], case.tolerance(name))
    if any(name.startswith("content") for name in golden):
        report.deviations.append("the last patch's row of the content stream, which nothing reads, is not computed")
    if "pred" in golden:
        report.add("pred", prediction[free], golden["pred"][free, 1:], case.tolerance("pred"))
        report.deviations.append("the class token's query, on which no loss falls, is not computed")
    if "loss_map" in golden:
        report.add("loss_map", loss_map[free], golden["loss_map"][free], case.tolerance("loss_map"))
    if "blurred_patches_image0" in golden and isinstance(model.target, PixelTarget):
        compare("blurred_patches_image0", model.target.patches(images[:1]))
    compare("target_image0", target[:1])
    if tied:
        return

    # Loss and gradients, in fp32 and fp64.
    compare("loss", loss_map.mean())
    loss_map.mean().backward()
    gradients = dict(model.named_parameters())
    for name in (n for n in golden if n.startswith("grad.")):
        compare(name, gradient(gradients[name[5:]]))
    model.double().zero_grad()
    images, tokens = images.double(), tokens.double()
    loss = model.target.loss(model.predict(images, order), model.target.prepare(images, tokens)).mean()
    if "loss_fp64" in scalars:
        report.add_relative("loss_fp64", loss.item(), scalars["loss_fp64"])
        loss.backward()
        for name, norm in scalars.get("grad_l2_norm_fp64", {}).items():
            report.add_relative(f"grad_l2_norm_fp64.{name}", gradient(gradients[name]).norm().item(), norm)


def check_shared_weights(case: Case, report: CaseReport) -> None:
    """An option that the reference cannot run, compared with separate query blocks that copy the shared ones."""
    torch.manual_seed(0)
    shared = build_model(case)
    case.meta["config"]["share_weight"] = False
    copies = build_model(case)
    copies.load_state_dict(shared.state_dict(), strict=False)
    dim = shared.embed_dim
    for index, block in enumerate(copies.query_blocks):
        source = shared.blocks[(index + 1) * shared.step - 1].state_dict()
        for kind in ("weight", "bias"):
            qkv = source.pop(f"attn.qkv.{kind}")
            source |= {f"attn.{name}.{kind}": qkv[i * dim : (i + 1) * dim] for i, name in enumerate("qkv")}
        block.load_state_dict(source)
    draw = torch.rand(len(case.batch), shared.grid[0] * shared.grid[1])
    with torch.no_grad():
        ours, theirs = shared(case.batch, draw), copies(case.batch, draw)
    report.add("loss_map", ours.loss_map, theirs.loss_map, EXACT)
    report.add("pred", ours.prediction, theirs.prediction, 10 * EXACT)
    report.deviations.append(
        f"the reference cannot run this option ({case.meta.get('error')}); here it runs, and equals a model whose query"
        " blocks hold copies of the shared weights"
    )


def reference_boxes(grid: tuple[int, int]) -> Tensor:
    """The number of the reference's nested boxes around each centre that hold each patch: (L, L).

    They are our boxes on a grid smaller by one row and column, except that the innermost box is already moved to the
    border when the second one touches it.
    """
    patches = rows_and_columns(grid)
    smaller = (grid[0] - 1, grid[1] - 1)
    to_border = tuple(
        torch.where(place < 3, 0, torch.where(place > limit - 3, limit, place))
        for place, limit in zip(patches, smaller, strict=True)
    )
    outer = box_counts(patches, patches, smaller, scale_of=grid, half_sides=(3, 5))
    return outer + box_counts(to_border, patches, smaller, scale_of=grid, half_sides=(1,))


def check_orders(case: Case, report: CaseReport) -> None:
    """Every order: with the same random numbers, our permutation has to sort the reference's keys."""
    golden, grid = case.tensors, tuple(case.meta["config"]["grid"])
    maps, draws = golden["maps"], golden["draw"]
    for official, ours in OFFICIAL_ORDERS.items():
        key = golden.get(f"key.{official}")
        if key is None or official in ("attention_guided", "stochastic_center"):
            continue
        falls = [
            fall_along(recorded, make_order(ours, maps, grid, draw))
            for recorded, draw in zip(key.float().expand_as(draws), draws, strict=True)
        ]
        report.checks.append(Check(f"key.{official}", max(falls), EXACT))

    if "center2out.box_count" in golden:
        report.add("center2out.box_count", -square_key(grid), golden["center2out.box_count"], None)
    if "box_count_by_centre" in golden:
        patches = rows_and_columns(grid)
        theirs, own = reference_boxes(grid), box_counts(patches, patches, grid)
        report.add("box_count_by_centre", theirs, golden["box_count_by_centre"], None)
        report.deviations.append(
            "nested boxes (semantic_rings, stochastic_center) hold their centre and reach the last row and column here:"
            f" {int((own != theirs).any(dim=1).sum())} of {len(own)} centres have other boxes than in the reference,"
            " whose boxes never reach them, and whose innermost box misses a centre two patches from a border"
        )
        for official, centre_of in {
            "attention_guided": lambda sample: maps.argmax(-1),
            "stochastic_center": lambda sample: (
                golden["stochastic_center.centre"][sample].long() @ torch.tensor([grid[1], 1])
            ),
        }.items():
            if f"key.{official}" not in golden:
                continue
            for sample, draw in enumerate(draws):
                report.add(
                    f"key.{official}", draw - theirs[centre_of(sample)], golden[f"key.{official}"][sample], 2 * EXACT
                )
        report.deviations.append(
            "stochastic_center draws its centre from all patches here; the reference never from the last row or column"
        )
    if "tie_example.key" in golden:
        report.deviations.append(
            "equal keys are ranked by their random numbers here; in the reference they see each other in the content"
            " mask and not in the query mask (tie_example)"
        )


def check_schedules(case: Case, report: CaseReport) -> None:
    """Running average, learning rate, layer-wise groups."""
    golden, scalars = case.tensors, case.scalars
    if "decay_by_epoch" in scalars:
        ours = torch.tensor([ema_decay(epoch) for epoch in range(len(scalars["decay_by_epoch"]))], dtype=torch.float64)
        report.add("decay_by_epoch", ours, torch.tensor(scalars["decay_by_epoch"], dtype=torch.float64), 1e-12)
    if "update.model" in golden:
        model = SemAIM(FeatureTarget(), guide="ema", img_size=4, patch_size=4, embed_dim=8, depth=1, num_heads=1)
        rows, columns = golden["update.model"].shape
        # Any weight that is large enough will do.
        weight, average = (cast(Block, of.blocks[0]).mlp.fc1.weight[:rows, :columns] for of in (model, model.ema))
        with torch.no_grad():
            weight[:] = golden["update.model"]
            average[:] = golden["update.average_before"]
        model.update_ema(ema_decay(37))
        name = "update.average_after"
        report.add(name, average, golden[name], case.tolerance(name))
    if "lr_schedule" in scalars:
        schedule = scalars["lr_schedule"]
        cfg = schedule["config"]
        rates = [
            cfg["lr"] * cosine_with_warmup(epoch, cfg["epochs"], cfg["warmup_epochs"], cfg["min_lr"] / cfg["lr"])
            for epoch in schedule["epoch"]
        ]
        report.add("lr_schedule", torch.tensor(rates).double(), torch.tensor(schedule["lr"]).double(), 1e-9)
    if "layer_scale" in scalars:
        scales, decays = scalars["layer_scale"], scalars["weight_decay"]
        depth = 1 + max(int(name.split(".")[1]) for name in scales if name.startswith("blocks."))
        layer_decay = scales[f"blocks.{depth - 1}.norm1.weight"]
        # One weight per recorded name: biases and norms have one dimension, all others two.
        flat = ("bias", "norm1.weight", "norm2.weight", "norm.weight")
        weights = [(name, nn.Parameter(torch.zeros((1,) if name.endswith(flat) else (1, 1)))) for name in scales]
        groups = group_parameters(
            weights,
            1.0,
            max(decays.values()),
            layer_decay,
            lambda name: VisionTransformer.layer_depth(name, depth),
            undecayed=("cls_token", "pos_embed"),
        )
        group_of = {name: group for group in groups for name in group["names"]}
        for key, recorded in {"lr_scale": scales, "weight_decay": decays}.items():
            values = torch.tensor([group_of[name][key] for name in recorded]).double()
            report.add(f"groups.{key}", values, torch.tensor(list(recorded.values())).double(), EXACT)
