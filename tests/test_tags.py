"""timm's plain ViTs: every consumer is right or refuses with a reason, and the judge sees what is wrong."""

from types import SimpleNamespace
from zlib import crc32

import pytest
from timm.data import create_transform, resolve_data_config
from torch import nn

from semaim.cli import check_tags
from semaim.data.labelled import evaluation_transform
from semaim.encoders.images import Preparation, cfg_of
from semaim.encoders.timm_vit import TimmEncoder
from semaim.parity import tags

pytestmark = pytest.mark.usefixtures("one_thread")

TAGS = tags.plain_tags()
GROUPS = tags.architectures(TAGS)
#: One architecture of each kind of block, position and pooling, the narrowest that timm has weights for.
SAMPLE = (
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_xsmall_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "flexivit_small",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
)


def group_of(arch):
    return next(group for group in GROUPS if group[0].partition(".")[0] == arch)


def check(verdicts):
    """All are right, or refused for a reason that is known here."""
    known = ("has no class token", "is no whole number of 14 x 14 patches", "has no pooling of its own")
    own = ("it computes with ", "it lacks ", " is ", " has eps", "does not record its activation", "but no blocks.0.")
    for verdict in verdicts:
        assert verdict.word != "WRONG", verdict
        if verdict.word == "refused":
            reasons = own if verdict.consumer in tags.RECIPES else known
            assert any(words in verdict.reason for words in reasons), verdict


def by_tag(verdicts):
    found = {}
    for verdict in verdicts:
        found.setdefault(verdict.tag, {})[verdict.consumer] = verdict
    return found


# Names and shapes


def test_images_are_prepared_as_timm_does_for_every_tag():
    """The values, and the transform that they make."""
    for tag in TAGS:
        assert tags.compare_images(tag, SimpleNamespace()) == (0.0, ""), tag
        own, timms = Preparation.of_cfg(cfg_of(tag), tag), resolve_data_config(pretrained_cfg=cfg_of(tag))
        ours = evaluation_transform(
            own.size, own.crop_pct, own.statistics.mean, own.statistics.std, own.crop_mode, own.interpolation
        )
        assert repr(ours) == repr(create_transform(**timms)), tag


def test_names_and_shapes_of_a_tag_of_each_family():
    first = {check_tags.family(group[0].partition(".")[0]): group for group in reversed(GROUPS)}
    assert len(first) > 35
    check(verdict for group in first.values() for verdict in tags.judge(group[:1], compute=False, depth=1))


@pytest.fixture(scope="module")
def names():
    """What every consumer makes of the names and shapes of every tag, in networks of one block."""
    return [verdict for group in GROUPS for verdict in tags.judge(group, compute=False, depth=1)]


@pytest.mark.slow
def test_every_tag_is_read_by_every_task_or_refused(names):
    check(names)
    found = by_tag(names)
    assert len(found) == len(TAGS) and all(
        len(own) == len(tags.CONSUMERS) + len(tags.RECIPES) for own in found.values()
    )
    assert len(check_tags.right_tags(found)) >= 350
    assert sum(own["pool cls"].word == "loads" for own in found.values()) > 250
    for tag, own in found.items():
        if "_384.webli" not in tag:  # images of 384 pixels, patches of 14
            assert own["pool avg"].word == own["pool native"].word == own["ViTDet"].word == "loads", tag


@pytest.mark.slow
def test_which_tags_the_recipes_for_our_own_vit_read(names):
    loads = {(verdict.tag.partition(".")[0], verdict.consumer) for verdict in names if verdict.word == "loads"}
    loads = {(arch, name) for arch, name in loads if name in tags.RECIPES}
    for arch in ("deit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"):
        assert all((arch, name) in loads for name in tags.RECIPES), arch
    # Of those without a class token, a detector takes what config.json says has our activation, and nothing else does.
    assert [name for arch, name in loads if arch == "vit_base_patch16_siglip_gap_224"] == ["own ViTDet"]
    assert not [arch for arch, _ in loads if arch == "vit_base_patch32_siglip_gap_256"]  # of the tanh form
    families = ("dinov2", "dinov3", "deit3", "distilled", "beit", "clip", "eva02", "_pe_", "reg4", "rope", "aimv2")
    assert not [arch for arch, _ in loads if any(family in arch for family in families)]


@pytest.mark.parametrize("tag", ["vit_small_patch16_224.dino", "vit_base_patch16_siglip_gap_224.v2_webli"])
def test_a_file_without_its_config_is_not_taken_for_more(tag):
    """No tensor distinguishes GELU from its tanh form."""
    args = tags.small(tag, 1)
    with tags.on_meta():
        theirs = tags.timm.create_model(tag, pretrained=False, **args)
    words = {config: [one.word for one in tags.check_own(tag, theirs, args, config)] for config in (True, False)}
    assert words[False] == (["refused"] * 4 if "siglip" in tag else words[True])
    assert words[True][2] == "loads"


# Numbers


@pytest.mark.parametrize("arch", SAMPLE)
def test_what_is_read_gives_timms_numbers(arch):
    found = list(tags.judge(group_of(arch)[:1]))
    check(found)
    words = {verdict.consumer: verdict.word for verdict in found}
    assert all(words[name] == "right" for name in check_tags.NEEDED), found


@pytest.mark.slow
def test_a_sample_of_all_gives_timms_numbers():
    """A part of the architectures, by a hash of their names; `semaim tags` computes all."""
    known: dict = {}
    chosen = [group for group in GROUPS if crc32(group[0].encode()) % 24 == 0]
    verdicts = [verdict for group in chosen for verdict in tags.judge(group, known=known)]
    check(verdicts)
    assert "loads" not in {verdict.word for verdict in verdicts} and len(chosen) > 5


@pytest.mark.parametrize(
    ("tag", "recipe", "named"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "own k-NN", "blocks.*.ls1.gamma"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "own ViTDet", "reg_token"),
        ("deit3_small_patch16_224.fb_in1k", "own fine-tuning", "blocks.*.ls2.gamma"),
        ("deit_tiny_distilled_patch16_224.fb_in1k", "own UperNet", "dist_token"),
        ("vit_base_patch32_clip_quickgelu_224.openai", "own k-NN", "norm_pre.weight"),
        ("vit_base_patch16_siglip_gap_224.v2_webli", "own fine-tuning", "it lacks cls_token"),
        ("vit_base_patch32_siglip_gap_256.v2_webli", "own ViTDet", "blocks.0.mlp.act is GELUTanh"),
        ("beit3_base_patch16_224.in22k_ft_in1k", "own fine-tuning", "blocks.0.attn.norm.weight"),
        ("vit_small_patch16_rope_ape_224.naver_in1k", "own UperNet", "blocks.0.gamma_1"),
    ],
)
def test_what_our_own_vit_refuses_computes_something_else(tag, recipe, named):
    """The judge would say WRONG, had the loader let it pass."""
    args = tags.small(tag, 1)
    with tags.on_meta():
        shapes = tags.timm.create_model(tag, pretrained=False, **args)
    (verdict,) = [one for one in tags.check_own(tag, shapes, args) if one.consumer == recipe]
    assert named.replace("*", "0") in verdict.reason.replace("*", "0")
    found = tags.pairs_of_own(recipe, tag, tags.random_network(tag, **args), args, part=True)
    assert tags.compare(found)[0] > 1e-6


# What is wrong is seen


def epsilon(vit):
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps *= 10


def layer_scale(vit):
    for block in vit.blocks:
        block.ls1.forward = lambda tokens: tokens


def activation(vit):
    for block in vit.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def frozen(vit):
    vit.pos_embed.requires_grad_(False).requires_grad_(True)
    embed = vit.patch_embed.forward
    vit.patch_embed.forward = lambda images: embed(images).detach()


def parts(vit):
    del vit.blocks[0].ls1
    vit.blocks[0].ls1 = nn.Identity()


@pytest.fixture
def spoil(monkeypatch):
    """A function that changes timm's network in every encoder from now on."""

    def spoil(change):
        build = TimmEncoder.__init__

        def spoiled(self, *args, **options):
            build(self, *args, **options)
            change(self.vit)

        monkeypatch.setattr(TimmEncoder, "__init__", spoiled)

    return spoil


TASKS = {"pool avg", "pool native", "fine-tuning", "ViTDet", "UperNet"}


@pytest.mark.parametrize("change", [epsilon, layer_scale, activation, parts])
def test_another_network_is_wrong(change, spoil):
    spoil(change)
    found = {verdict.consumer: verdict for verdict in tags.judge(group_of("test_vit2"))}
    assert {name for name, verdict in found.items() if verdict.word == "WRONG"} == TASKS
    assert found["images"].word == "right"
    if change is parts:
        assert found["ViTDet"].reason == "not loaded: blocks.0.ls1.gamma"
    else:
        assert all(found[name].error > 1e-6 and "differs by" in found[name].reason for name in TASKS), found


def test_parameters_without_a_gradient_are_wrong(spoil):
    spoil(frozen)
    found = {verdict.consumer: verdict for verdict in tags.judge(group_of("test_vit2"))}
    assert {name for name, verdict in found.items() if verdict.word == "WRONG"} == {"fine-tuning", "ViTDet", "UperNet"}
    assert found["ViTDet"].reason == "gradient of patch_embed.proj.weight differs by inf"


@pytest.mark.parametrize("name", ["mean", "crop_pct"])
def test_other_images_are_wrong(name, monkeypatch):
    found = tags.cfg_of
    monkeypatch.setattr(tags, "cfg_of", lambda tag: {**found(tag), name: {"mean": (0.4,) * 3, "crop_pct": 0.8}[name]})
    verdict = next(tags.judge(group_of("test_vit"), compute=False, depth=1))
    assert (verdict.consumer, verdict.word, verdict.reason) == ("images", "WRONG", name)


def test_an_error_that_is_no_answer_to_a_user_is_wrong(spoil):
    spoil(lambda vit: {}["blocks"])
    verdicts = list(tags.judge(group_of("test_vit2"), compute=False))
    assert {v.consumer for v in verdicts if (v.word, v.reason) == ("WRONG", "KeyError: 'blocks'")} == TASKS | {
        "pool cls"
    }


# The command


def test_the_command_prints_verdicts_and_writes_the_table(here, tmp_path):
    done = here("check_tags.py", "test_vit*", "--table", tmp_path / "table.md")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("test_vit")}
    assert rows["test_vit"] == ["right"] * 11
    assert rows["test_vit3"] == ["right", "refused"] + ["right"] * 5 + ["refused"] * 4
    assert "3 of 3 tags right in images, pool avg, fine-tuning, ViTDet, UperNet; 0 wrong" in done.stdout
    text = (tmp_path / "table.md").read_text()
    assert "| pool cls | 1 | 2 | 0 | pool=cls: it has no class token: choose avg or native (2) |" in text
    assert "| `test_*` | 3 | 2 no, 1 yes | yes | yes | yes | yes | yes | 2 no, 1 yes |" in text


def test_the_command_fails_if_anything_is_wrong(spoil, capsys):
    spoil(layer_scale)
    assert check_tags.main(["test_vit2*"]) == 1
    out = capsys.readouterr().out
    assert "0 of 1 tags right" in out and "1 wrong" in out and "WRONG: output 0 differs by" in out


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("vit_base_patch16_siglip_gap_224", "vit_*_siglip_gap"),
        ("vit_so150m2_patch16_reg1_gap_384", "vit_*_reg_gap"),
        ("vit_huge_plus_patch16_dinov3_qkvb", "vit_*_plus_dinov3_qkvb"),
        ("deit_base_distilled_patch16_384", "deit_*_distilled"),
        ("vit_pe_core_tiny_patch16_384", "vit_pe_core_*"),
        ("flexivit_base", "flexivit_*"),
    ],
)
def test_families(arch, family):
    assert check_tags.family(arch) == family
