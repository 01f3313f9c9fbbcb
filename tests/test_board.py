"""`semaim board`: TensorBoard's page and numbers, fetched; Ctrl-C; wrong folders."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from commands import losses

from semaim.cli import main

ROOT = Path(__file__).resolve().parent.parent


def get(address, patience=60):
    """A page of a server that is starting."""
    end = time.monotonic() + patience
    while True:
        try:
            return urlopen(address, timeout=10).read()
        except (URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.mark.slow
def test_the_board_shows_the_numbers_of_the_runs_in_a_folder(pretrained, tmp_path):
    (tmp_path / "work dirs").mkdir()
    (tmp_path / "work dirs/mine").symlink_to(pretrained.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without the environment's programs on the path, as when it is not activated.
    env = {**os.environ, "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-m", "semaim.cli", "board", tmp_path / "work dirs", "--port", str(port)]
    board = subprocess.Popen(line, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        assert b"<tf-" in get(address) or b"TensorBoard" in get(address)
        end = time.monotonic() + 60
        while not (tags := json.loads(get(f"{address}/data/plugin/scalars/tags"))) and time.monotonic() < end:
            time.sleep(0.2)  # it reads the files after it has started
        ((run, names),) = tags.items()
        assert run.startswith("mine/") and {"loss", "lr", "images_per_second"} <= names.keys()
        rows = json.loads(get(f"{address}/data/plugin/scalars/scalars?tag=loss&run={quote(run)}"))
        assert {step: value for _, step, value in rows} == pytest.approx(losses(pretrained.parent))
        board.send_signal(signal.SIGINT)
        board.wait(30)
    finally:
        board.kill()
        text = board.communicate()[0]
    assert f":{port}/" in text, text


def test_a_wrong_folder_is_one_line(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, folder in ((["board"], "work_dirs"), (["board", "--port", "1"], "work_dirs"), (["board", "x"], "x")):
        assert main(words) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: no such folder: {folder}: ") and len(error.splitlines()) == 1
