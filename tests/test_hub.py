"""Pushing to the hub and reading from it by the real commands, on a stand-in of the hub (`hub_stand_in.py`)."""

import json

import pytest
import torch
from commands import tool
from hub_stand_in import hub
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load, load_file

from semaim import checkpoints
from semaim.checkpoints import pushing
from semaim.errors import UserError


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Nothing of the user's login, cache or network."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.slow
def test_an_encoder_is_pushed_and_read_again_by_the_commands(pretrained, network, tmp_path, monkeypatch):
    checkpoints.export(pretrained, tmp_path / "local")
    with hub() as there:
        env = {**network, "HF_ENDPOINT": there.address, "HF_TOKEN": "hf_writer"}
        to_hub = ("lab/tiny", "--to", "hf-hub", "--license", "apache-2.0", "--private")
        done = tool("checkpoint.py", "export", pretrained, *to_hub, **env)
        assert done.returncode == 0, done.stderr
        assert (
            f"pushed {there.address}/lab/tiny/commit/" in done.stdout and "hf_writer" not in done.stdout + done.stderr
        )
        steps = [it for it in there.asked if it in ("create", "info", "preupload", "lfs", "put", "commit")]
        assert steps == ["create", "info", "preupload", "lfs", "put", "commit"]
        pushed = there.repositories["lab/tiny"]
        assert pushed.private and sorted(pushed.files) == ["README.md", "config.json", "model.safetensors"]
        local = load_file(tmp_path / "local/model.safetensors")
        remote = load(pushed.files["model.safetensors"])
        assert remote.keys() == local.keys() and all(torch.equal(remote[name], local[name]) for name in local)
        assert json.loads(pushed.files["config.json"]) == json.loads((tmp_path / "local/config.json").read_text())
        card = ModelCard(pushed.files["README.md"].decode())
        assert (
            card.data.license == "apache-2.0" and "timm.create_model('hf-hub:lab/tiny', pretrained=True)" in card.text
        )

        # By a process of its own, through the hub's cache: the library, then a command.
        done = tool("checkpoint.py", "inspect", "hf-hub:lab/tiny", **env)
        assert done.returncode == 0 and "width 32, depth 2, patch 8" in done.stdout, done.stderr
        (cached,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
        assert cached.parent.name == pushed.commit
        read = load_file(cached)
        assert read.keys() == local.keys() and all(torch.equal(read[name], local[name]) for name in local)
        # A second push is a second commit; a public one of that name is not taken for private.
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=there.address))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        first = pushed.commit
        (tmp_path / "local/README.md").write_text("no head")
        assert pushing.push(tmp_path / "local", "lab/tiny", private=True).endswith(pushed.commit)
        assert pushed.commit != first and pushed.files["README.md"] == b"no head"
        pushed.private = False
        with pytest.raises(UserError, match="lab/tiny is there already and public: leave --private out"):
            pushing.push(tmp_path / "local", "lab/tiny", private=True)


def test_no_token_no_right_and_no_network_are_one_line(network, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(
        UserError, match="no token of the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN"
    ):
        pushing.push(tmp_path / "folder", "lab/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    for name in ("tiny", "lab/tiny/x", "lab/ti ny", "lab/--", "/x", ""):
        with pytest.raises(UserError, match=r"OWNER/REPO|Repo id must") as error:
            pushing.push(tmp_path / "folder", name)
        assert "\n" not in str(error.value)

    def fails(token, address):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address))
        with pytest.raises(UserError) as error:
            pushing.push(tmp_path / "folder", "lab/tiny")
        monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
        assert token not in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    with hub() as there:
        assert "cannot push to lab/tiny: the token has no right to write there" in fails("hf_reader", there.address)
        assert "the hub does not know the token" in fails("hf_unknown", there.address)
        assert not there.repositories
    assert "cannot push to lab/tiny: " in fails("hf_writer", "http://127.0.0.1:9")  # nobody answers
