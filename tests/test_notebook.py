"""docs/first_hour.ipynb as it stands, on fewer images and steps."""

import re
import sys
from pathlib import Path

import pytest
from commands import CPU

nbformat = pytest.importorskip("nbformat", reason="no nbformat: runs after tools/setup.sh")
nbclient = pytest.importorskip("nbclient", reason="no nbclient: runs after tools/setup.sh")

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "docs/first_hour.ipynb"


def test_the_notebook_is_kept_without_outputs():
    book = nbformat.read(BOOK, as_version=4)
    nbformat.validate(book)
    assert book.cells[0].source.startswith("# ") and BOOK.stat().st_size < 20_000
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its cells of commands need bash: runs on Linux")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("mmdet", reason="no mmdet: runs after tools/setup.sh --extras all")
    book = nbformat.read(BOOK, as_version=4)
    smaller = {
        r'DATA = Path\("[^"]+"\)': f'DATA = Path("{tmp_path}/data")',
        r'RUNS = Path\("[^"]+"\)': f'RUNS = Path("{tmp_path}/runs")',
        r"EPOCHS = \d+": "EPOCHS = 1",
        r"STEPS = \d+": "STEPS = 2",
        r"--images \d+": "--images 60",
        r"--unlabelled \d+": "--unlabelled 64",
    }
    for pattern, new in smaller.items():
        changed = 0
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.source, count = re.subn(pattern, new, cell.source)
                changed += count
        assert changed == 1, pattern
    for name, value in {**CPU, "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(BOOK.parent)}})
    client.execute()  # a cell that fails, also one of commands, is an error
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    pictures = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(pictures) == 4  # images, curve, orders, detections
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "64 images to learn from" in printed and "\x1b[?25l" not in printed
    assert re.search(r"images \(6, 3, 64, 64\) -> tokens \(6, 65, 128\)", printed), printed
    assert re.search(r"^knn \{'", printed, re.M) and re.search(r"^knn_random \{'", printed, re.M)
    assert "random weights" in printed
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == [
        "detector", "knn", "knn_random", "pretrain",
    ]  # fmt: skip
