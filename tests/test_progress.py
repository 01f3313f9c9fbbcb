"""The progress bar of the real command on a pseudo-terminal, and plain lines in the log file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CPU, flags, losses

ROOT = Path(__file__).resolve().parent.parent
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminal: runs on Linux and macOS")
def test_a_terminal_shows_loss_speed_and_time_left_and_the_log_stays_plain(tiny_config, tmp_path):
    import pty

    master, slave = pty.openpty()
    line = [sys.executable, "-m", "semaim.cli", "train", "semaim/configs/pretrain/semaim_vit_tiny_scenes.py"]
    options = {**tiny_config().cfg_options, "train_cfg.max_epochs": 20}
    line += ["--work-dir", str(tmp_path / "run"), *flags(options)]
    env = {**os.environ, **CPU, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    run = subprocess.Popen(line, cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # Linux's end of a terminal that nobody holds open
        assert shown
    os.close(master)
    text = shown.decode()
    assert run.wait(60) == 0, text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    bars = re.findall(r"(\d+)/100 loss (\d\.\d{4})  (\d+\.\d) images/s  ETA (\d:\d\d:\d\d)", ESCAPE.sub("", text))
    assert bars, text
    logged = {step: f"{loss:.4f}" for step, loss in losses(tmp_path / "run").items()}
    assert len(logged) == 100 and all(logged[int(step)] == loss for step, loss, _, _ in bars)
    assert bars[-1][0] == "100" and bars[-1][3] == "0:00:00"
    (log,) = (tmp_path / "run").glob("2*/*.log")
    lines = [line for line in log.read_text().splitlines() if " images/s  data " in line]
    assert len(lines) == 100 and "\x1b" not in log.read_text()
