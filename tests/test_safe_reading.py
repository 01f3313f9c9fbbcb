"""Checkpoints are read and never run: what would call something is refused by its name."""

import argparse
import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_files import Call, random_states

from semaim import checkpoints
from semaim.checkpoints.files import plain, read_checkpoint, write_checkpoint
from semaim.engine.pretraining import model_from_checkpoint
from semaim.errors import UserError


@pytest.fixture(scope="module")
def states():
    """Weights of our models, by what they are."""
    return random_states()


class HistoryBuffer:
    """As mmengine's: it pickles functions that it fetches with getattr."""


HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"


@pytest.mark.parametrize("suffix", ["pth", "old.pth", "pkl"])
@pytest.mark.parametrize("where", ["value", "getattr", "eval"])
def test_hostile_files_are_refused_by_name_and_never_run(suffix, where, states, tmp_path):
    made = tmp_path / "made"
    hostile = {
        "value": Call(os.system, f"touch {made}"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "eval": Call(eval, f"open({str(made)!r}, 'w').close()"),
    }[where]
    path = tmp_path / f"x.{suffix}"
    content = {"model": states["encoder"], "args": hostile}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps({"args": hostile}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "pth")
    with pytest.raises(UserError, match=f"x.{suffix} is refused: reading it would call ") as error:
        checkpoints.read(path)
    assert not made.exists() and "\n" not in str(error.value)
    # What the file asks for does what it is accused of.
    if where != "getattr":
        function, arguments = hostile.__reduce__()
        function(*arguments)
        assert made.exists()


def zipped_pickle(path, code, states):
    """A zip file of torch's with a pickle written by hand."""
    buffer = io.BytesIO()
    torch.save(states["encoder"], buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            new.writestr(item, code if item.endswith("data.pkl") else old.read(item))


@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("allowed", [(), (getattr, collections.deque, print)])
@pytest.mark.parametrize("chain", ["attribute", "call"])
def test_getattr_is_a_stand_in_whatever_the_program_allows(chain, allowed, environment, states, tmp_path, monkeypatch):
    """getattr(deque, "__init__"), then its call: neither happens, also after `add_safe_globals([getattr])`."""
    if environment:
        monkeypatch.setenv(environment, "1")
    attribute = b"\x80\x02c__builtin__\ngetattr\n(ccollections\ndeque\nX\x08\x00\x00\x00__init__tR"
    path = tmp_path / "x.pth"
    zipped_pickle(path, attribute + (b"." if chain == "attribute" else b"(K\x05tR."), states)
    before = set(torch.serialization.get_safe_globals())  # a list in no order
    with torch.serialization.safe_globals(list(allowed)):
        if chain == "attribute":
            held = checkpoints.read_file(path)
            assert type(held).__name__ == "StandIn" and held == held and not held
        else:  # the stand-in that getattr gave is no function that torch would call
            with pytest.raises(UserError, match="cannot read .*more than tensors and plain containers"):
                checkpoints.read_file(path)
        assert set(torch.serialization.get_safe_globals()) == {*before, *allowed}
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_containers_and_configs_are_read(zipped, states, tmp_path, monkeypatch):
    """Dicts and lists of other classes, keys of other classes; in torch's two formats."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = node(lr=0.1)
    config.__dict__["frozen"] = True
    content = {
        "model": states["encoder"], "epoch": 4, "args": argparse.Namespace(lr=1), "config": config,
        "history": collections.defaultdict(list, {"loss": [1.0]}), "last": collections.deque([1, 2]),
        Path("a"): {Path("b")}, "mean": np.float64(3), "array": np.arange(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = checkpoints.read(tmp_path / "x.pth")
    assert found.epoch == 4 and all(torch.equal(found.state[n], t) for n, t in states["encoder"].items())
    held = checkpoints.read_file(tmp_path / "x.pth")
    assert held["config"] == {"lr": 0.1} and type(held["config"]) is not node and held["history"] == {"loss": [1.0]}
    assert type(held["last"]).__name__ == type(held["array"]).__name__ == "StandIn"


def test_whole_models_are_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match="would call torch.nn.modules.linear.Linear"):
        checkpoints.read(tmp_path / "x.pth")


def test_numpys_other_functions_are_refused(tmp_path):
    for name in ("load", "memmap"):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Call(getattr(np, name), str(tmp_path / "y"))}))
        with pytest.raises(UserError, match=f"x.pkl is refused: reading it would call numpy.*{name}"):
            checkpoints.read(tmp_path / "x.pkl")
    assert not (tmp_path / "y").exists()


def test_records_of_the_fields_tools_are_read_as_inert(states, tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
    ran = []
    HistoryBuffer.__setstate__ = lambda self, state: ran.append(state)
    buffer = HistoryBuffer()
    buffer.values, buffer.mean = np.arange(3.0), Call(getattr, os, "getcwd")
    content = {"model": states["encoder"], "args": argparse.Namespace(lr=0.1), "message_hub": {"loss": buffer},
               "epoch": 4, "path": Path("x")}  # fmt: skip
    buffer.mean = Call(getattr, HistoryBuffer, "mean")
    torch.save(content, tmp_path / "x.pth")
    found = checkpoints.read(tmp_path / "x.pth")
    assert found.epoch == 4 and len(found.state) == 30 and not ran
    held = checkpoints.read_file(tmp_path / "x.pth")
    assert not isinstance(held["args"], argparse.Namespace) and not isinstance(held["path"], Path)
    assert type(held["message_hub"]["loss"]).__name__ == "StandIn"


# Our own files.


class Hostile:
    """Pickles to a call that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_and_hostile_files_are_refused_and_never_run(tmp_path):
    torch.save({"format": "semaim", "model": Hostile(tmp_path / "executed")}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="hostile.pth is not a semaim checkpoint: no file of tensors"):
        read_checkpoint(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()
    torch.save({"model": {"pos_embed": torch.zeros(1)}, "epoch": 3}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="mae.pth is not a semaim checkpoint: it holds model, epoch"):
        read_checkpoint(tmp_path / "mae.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pth")
    # A config inside a checkpoint names sizes, never what to build.
    call = {"type": "pathlib.Path.touch", "self": str(tmp_path / "executed")}
    for model in (call, {"type": "Pretraining", "network": call}):
        with pytest.raises(UserError, match="not pretraining by SemAIM"):
            model_from_checkpoint({"config": {"model": model}, "model": {}})
    assert not (tmp_path / "executed").exists()


def test_checkpoints_hold_plain_containers_only(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint holds no Hostile"):
        plain({"a": [Hostile(tmp_path)]})
    write_checkpoint({"format": "semaim", "model": {"w": torch.ones(2)}, "list": (1, "a", None)}, tmp_path / "a.pth")
    again = read_checkpoint(tmp_path / "a.pth")
    assert again["list"] == (1, "a", None) and again["model"]["w"].equal(torch.ones(2))
