"""docs/predict.md: its commands, typed in order as they stand."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from commands import CPU, ROOT, fork

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: runs after tools/setup.sh --extras all")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: runs after tools/setup.sh")

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


#: The command, as its package installs it.
COMMAND = "import sys\n\nfrom semaim.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"


def typed():
    """The lines of the blocks of commands that need no file of the reader's, as a shell joins them."""
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "work_dirs/NAME" not in block]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_order(tmp_path):
    for name in ("semaim", "mmseg_configs", "mmdet_configs"):  # what a checkout has
        (tmp_path / name).symlink_to(ROOT / name)
    command, env = tmp_path / "bin/command.py", {**os.environ, **CPU}
    command.parent.mkdir()
    command.write_text(COMMAND)
    for line in typed():
        name, *words = shlex.split(line)
        if name == "semaim":
            done = fork([str(command), *words], env, tmp_path, timeout=600)
        else:
            assert name == "python"
            done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    assert [name for name in WRITTEN if not (tmp_path / name).is_file()] == []
    assert not list(tmp_path.rglob("*.part")), "nothing is left half written"
