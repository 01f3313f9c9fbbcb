"""CLIP as teacher: the configs' guide is the recorded tower, and what cannot be it is refused."""

import json

import pytest
import timm
import torch
from commands import flags, one_line, tool
from safetensors.torch import save_file

from semaim.engine.config import CONFIGS, load_config
from semaim.engine.teachers import build_teacher
from semaim.errors import UserError
from semaim.models import Teacher
from semaim.parity.cases import Case
from semaim.parity.clip import build_tower

BASE = CONFIGS / "pretrain/semaim_clip_vit_base_800e.py"


@pytest.fixture(scope="module")
def case(shared):
    return Case(shared / "golden/semaim/clip_tower.json")


def test_the_configs_guide_gives_the_recorded_tokens(case, tmp_path, monkeypatch):
    """From a file of OpenAI's names, in half precision, through what the config says, to the official tokens."""
    tower = {name[8:]: t for name, t in case.tensors.items() if name.startswith("teacher.")}
    save_file(tower, tmp_path / "clip.safetensors")
    assert tower["visual.proj"].dtype == torch.float16
    sizes = dict(embed_dim=128, depth=2, num_heads=2)

    def small(name, pretrained_cfg_overlay, **options):  # the architecture of that name, in the recorded sizes
        overlay = {**pretrained_cfg_overlay, "num_classes": 40}
        return timm.create_model(name, pretrained_cfg_overlay=overlay, **sizes, **options)

    monkeypatch.setattr("semaim.engine.teachers.create_model", small)
    for name in ("base", "large"):
        guide = load_config(CONFIGS / f"pretrain/semaim_clip_vit_{name}_800e.py").model.network.guide.to_dict()
        assert guide.pop("type") == "Teacher"
        teacher = build_teacher(**guide, weights=str(tmp_path / "clip.safetensors"))
        tokens = teacher(case.images, (14, 14))
        assert teacher.width == 40
        torch.testing.assert_close(
            tokens, case.tensors["teacher_tokens"], atol=case.tolerance("teacher_tokens"), rtol=0
        )


def test_another_activation_and_other_images_are_as_far_off_as_recorded(case):
    """So neither difference can hide in a tolerance, and `normalisation="teacher"` does what it says."""
    tokens = case.tensors["teacher_tokens"]
    quick, exact = build_tower(case), build_tower(case, "vit_base_patch16_clip_224")
    changed = {
        "if_exact_gelu": Teacher(exact, project=True, normalisation="student"),
        "if_images_have_clip_statistics": Teacher(quick, project=True, normalisation="teacher"),
    }
    for name, teacher in changed.items():
        difference = (teacher(case.images, (14, 14)) - tokens).abs().max().item()
        assert difference == pytest.approx(case.scalars[name], rel=5e-3)  # recorded to three digits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_clip_224.openai", "use vit_base_patch16_clip_quickgelu_224.openai"),
        ("vit_large_patch14_clip_336.openai", "use vit_large_patch14_clip_quickgelu_336.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", "use vit_base_patch16_clip_quickgelu_224.metaclip_400m"),
        ("vit_base_patch16_clip_224", "does not say whose weights .*clip.safetensors holds"),
    ],
)
def test_a_tower_with_another_activation_than_its_weights_is_refused(name, message, tmp_path):
    (tmp_path / "clip.safetensors").touch()
    with pytest.raises(UserError, match=message):
        build_teacher(name, weights=str(tmp_path / "clip.safetensors"), project=True)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_quickgelu_224"])
def test_what_is_named_right_is_opened(name, tmp_path):
    (tmp_path / "clip.safetensors").write_text("nothing")
    with pytest.raises(UserError, match=f"cannot load teacher {name} from .*clip.safetensors"):
        build_teacher(name, weights=str(tmp_path / "clip.safetensors"), project=True)


def test_the_refusal_as_a_user_sees_it(scenes, tmp_path):
    changed = {
        "model.network.guide.name": "vit_base_patch16_clip_224.openai", "total_batch_size": 8, "num_workers": 0,
    }  # fmt: skip
    done = tool("train.py", BASE, "--data-root", scenes, "--work-dir", tmp_path / "run", *flags(changed))
    one_line(done, "built with GELU, and its weights were trained with QuickGELU: use vit_base_patch16_clip_quickgelu")


def test_weights_out_of_reach_are_asked_for_by_the_name_they_have_on_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    guide = load_config(BASE).model.network.guide.to_dict()
    guide.pop("type")
    with pytest.raises(UserError, match=r"model.safetensors of timm/vit_base_patch16_clip_224.openai from"):
        build_teacher(**guide)


def test_the_recorded_tower_is_what_the_configs_describe(shared):
    """16 px patches and 512 channels at full size; the record differs in sizes only."""
    meta = json.loads((shared / "golden/semaim/clip_tower.json").read_text())["config"]
    assert meta["tower"]["activation"] == "QuickGELU" and meta["predict_feature"] == "clip"
    with torch.device("meta"):
        network = timm.create_model(load_config(BASE).model.network.guide.name.split(".")[0], dynamic_img_size=True)
    assert Teacher(network, project=True).width == 512 and network.patch_embed.patch_size == (16, 16)
    assert {module.eps for module in network.modules() if isinstance(module, torch.nn.LayerNorm)} == {
        meta["tower"]["layer_norm_eps"]
    }
