"""`mmcv._ext` as a module: found where no compiled one is, with errors for missing operators, and light to import."""

import importlib
import pkgutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmcv", reason="mmcv is not installed: runs after tools/setup.sh --extras all")

from semaim import compat  # noqa: E402
from semaim.errors import UserError  # noqa: E402

compat.install()
ext = importlib.import_module("mmcv._ext")
if Path(ext.__file__) != compat.SOURCE:
    pytest.skip("a compiled mmcv takes our place: runs in the environment of tools/setup.sh", allow_module_level=True)

import mmcv.ops  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def test_module_has_a_spec_and_install_is_idempotent():
    before = list(sys.meta_path)
    compat.install()
    assert sys.meta_path == before and before.count(compat.TorchvisionOps) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert pkgutil.find_loader("mmcv._ext") is not None  # mmengine's and mmcv's way to look
        from mmengine.utils.dl_utils import misc

        assert misc.mmcv_full_available() and mmcv.utils.ext_loader.check_ops_exist()
    assert ext.__name__ == ext.__spec__.name == "mmcv._ext" and sys.modules["mmcv._ext"] is mmcv._ext is ext
    assert compat.TorchvisionOps.find_spec("mmcv.nothing") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mmcv._ext.nms")
    with pytest.raises(AttributeError, match="_private"):
        _ = ext._private


def call_deform_conv():
    mmcv.ops.deform_conv2d(torch.randn(1, 1, 5, 5), torch.zeros(1, 18, 3, 3), torch.randn(1, 1, 3, 3))


def call_deform_attention():
    value, shapes, start = torch.randn(1, 4, 1, 2), torch.tensor([[2, 2]]), torch.tensor([0])
    places, weights = torch.rand(1, 3, 1, 1, 1, 2), torch.ones(1, 3, 1, 1, 1)
    MultiScaleDeformableAttnFunction.apply(value, shapes, start, places, weights, 64)


MISSING = {
    "deform_conv_forward": call_deform_conv,
    "ms_deform_attn_forward": call_deform_attention,
    "softnms": lambda: mmcv.ops.soft_nms(torch.rand(2, 4), torch.rand(2)),
    "nms_match": lambda: mmcv.ops.nms_match(torch.rand(2, 5), 0.5),
    "roi_pool_forward": lambda: mmcv.ops.roi_pool(torch.rand(1, 1, 4, 4), torch.zeros(1, 5), 2),
    "roi_align_forward with pool_mode='max'": lambda: mmcv.ops.roi_align(
        torch.rand(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 0, "max"
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_operators_name_themselves_and_the_cure(name):
    with pytest.raises(UserError) as error:
        MISSING[name]()
    assert f"do not replace {name}: install a compiled mmcv" in str(error.value) and "\n" not in str(error.value)


def python(code):
    """Run in a process of its own, in which nothing is imported."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_downstream_packages_can_be_imported():
    packages = [package for package in ("mmdet", "mmseg") if find_spec(package)]
    if not packages:
        pytest.skip("neither mmdet nor mmsegmentation is installed: runs after tools/setup.sh --extras all")
    imports = ", ".join(f"{package}.models, {package}.apis" for package in packages)
    child = python(f"import semaim.compat as c; c.install(); import {imports}; print('done')")
    assert child.stdout == "done\n", child.stderr


def test_environment_report_runs():
    assert "torchvision" in mmcv.utils.collect_env()["MMCV Compiler"]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_compiled_module_wins(tmp_path, first):
    """Also one that appears after `install`; mmcv itself is an empty package here, which is imported sooner."""
    for file, text in (("mmcv/__init__.py", ""), ("built/_ext.py", "compiled = True\n")):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    steps = [f"mmcv.__path__.append({str(tmp_path / 'built')!r})", "c.install()"][:: 1 if first else -1]
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mmcv, semaim.compat as c"
    end = "import mmcv._ext as e; print(e.compiled is True, c.TorchvisionOps in sys.meta_path)"
    child = python("; ".join([begin, *steps, end]))
    assert child.stdout == f"True {not first}\n", child.stderr


def test_without_mmcv():
    code = "import sys; sys.modules['mmcv'] = None; from semaim import compat, errors; errors.run(compat.install)"
    child = python(code)
    assert child.stderr == "error: mmcv is not installed: run tools/setup.sh --extras all\n", child.stderr


def test_importing_the_package_imports_nothing_heavy():
    child = python("import sys, semaim.compat; print([m for m in ('mmcv', 'torch', 'mmengine') if m in sys.modules])")
    assert child.stdout == "[]\n", child.stderr
