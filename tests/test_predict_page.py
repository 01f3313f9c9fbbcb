"""docs/predict.md: its commands, typed in order as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CPU, ROOT

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: runs after tools/setup.sh --extras parquet")

PAGE = (ROOT / "docs/predict.md").read_text()
#: What a command of the page writes that the text names.
WRITTEN = (
    "predictions/segmentor/predictions.json",
    "predictions/classifier/predictions.csv",
    "predictions/labels/labels/000001.png",
    "predictions/averaged/labels/000001.png",
    "predictions/video/scenes.mp4",
    "predictions/every/scenes.mp4",
    "features/scenes.npy",
    "features/scenes.txt",
    "features/mean.parquet",
    "features/patches.npy",
    "pictures/pca.png",
    "pictures/larger.png",
    "pictures/similarity.png",
)


def blocks():
    """The blocks of commands that need no file of the reader's."""
    return [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "work_dirs/NAME" not in block]


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_order(tmp_path):
    for name in ("semaim", "mmseg_configs", "mmdet_configs"):  # what a checkout has
        (tmp_path / name).symlink_to(ROOT / name)
    command = tmp_path / "bin/semaim"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m semaim.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **CPU, "PATH": path, "PYTHONPATH": str(ROOT)}
    script = "set -e\n" + "".join(blocks())
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [name for name in WRITTEN if not (tmp_path / name).is_file()] == []
    assert not list(tmp_path.rglob("*.part")), "nothing is left half written"
