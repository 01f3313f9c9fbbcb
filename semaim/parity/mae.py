"""MAE against the official code: position tables, masking, latent, prediction, losses, gradients."""

from torch import Tensor, nn

from semaim.models import MAE, PixelTarget
from semaim.models.vit import sincos_positions
from semaim.parity.cases import EXACT, Case, CaseReport, gradient

#: The two recorded losses -> whether their target is normalised per patch.
LOSSES = {"norm_pix": True, "raw_pix": False}


def build_model(case: Case) -> MAE:
    """Our model with the configuration and parameters of a case."""
    cfg = case.meta["config"]
    model = MAE(
        target_of(case, norm_pix=True),
        cfg["mask_ratio"],
        cfg["decoder_embed_dim"],
        cfg["decoder_depth"],
        cfg["decoder_num_heads"],
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
    model.load_state_dict(case.parameters())
    return model


def target_of(case: Case, norm_pix: bool) -> PixelTarget:
    """The target of a case, without blur."""
    cfg = case.meta["config"]
    return PixelTarget((cfg["patch_size"],) * 2, cfg["in_chans"], blur_kernel=0, norm_pix=norm_pix)


def check(case: Case, report: CaseReport) -> None:
    """One set of weights: masking, latent and prediction, then both losses and their gradients, in fp32 and fp64."""
    if "noise" not in case.tensors:
        return
    model, golden, scalars = build_model(case), case.tensors, case.scalars
    images, noise, cfg = case.batch, golden["noise"], case.meta["config"]
    parameters = dict(model.named_parameters())

    def compare(name: str, ours: Tensor) -> None:
        if name in golden:
            report.add(name, ours, golden[name], case.tolerance(name))

    # The reference's position tables are parameters, so the model now has them; ours are computed again.
    compare("param.pos_embed", sincos_positions(cfg["embed_dim"], model.grid))
    compare("param.decoder_pos_embed", sincos_positions(cfg["decoder_embed_dim"], model.grid))

    kept, place, mask = model.remove(noise)
    compare("mask", mask)
    compare("ids_restore", place)
    latent = model.encode(images, kept)
    compare("latent", latent)
    compare("pred", model.decode(latent, place, model.grid))

    for loss, norm_pix in LOSSES.items():
        model.target = target_of(case, norm_pix)
        model.zero_grad()
        out = model(images, noise)
        compare(f"loss.{loss}", out.loss)
        if f"loss_{loss}" in scalars:
            report.add_relative(f"loss_{loss}", out.loss.item(), scalars[f"loss_{loss}"], EXACT)
        out.loss.backward()
        for name in (n for n in golden if n.startswith(f"grad.{loss}.")):
            compare(name, gradient(parameters[name.removeprefix(f"grad.{loss}.")]))

    if "mask_ratio_second" in cfg:
        model.mask_ratio = ratio = cfg["mask_ratio_second"]
        compare(f"ratio_{ratio}.mask", model.remove(noise)[2])
        for loss, norm_pix in LOSSES.items():
            model.target = target_of(case, norm_pix)
            compare(f"ratio_{ratio}.loss.{loss}", model(images, noise).loss)
        model.mask_ratio = cfg["mask_ratio"]

    # In fp64; the noise stays in fp32, so that the same patches are removed.
    model.double()
    for loss, norm_pix in LOSSES.items():
        if f"loss_fp64_{loss}" not in scalars:
            continue
        model.target = target_of(case, norm_pix)
        model.zero_grad()
        out = model(images.double(), noise)
        report.add_relative(f"loss_fp64_{loss}", out.loss.item(), scalars[f"loss_fp64_{loss}"])
        out.loss.backward()
        for name, norm in scalars.get("grad_l2_norm_fp64", {}).items():
            kind, parameter = name.split(".", 1)
            if kind == loss:
                report.add_relative(f"grad_l2_norm_fp64.{name}", gradient(parameters[parameter]).norm().item(), norm)
