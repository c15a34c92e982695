"""`peftcore push` uploads an adapter; no network: a local server."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, use
from torch import nn
from typer.testing import CliRunner, Result

from flows.cli import app
from peftcore import LoraConfig, PeftConfig, get_peft_model


def peftcore(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    adapter = tmp_path / "adapter"
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"])).save_pretrained(adapter)
    (adapter / "optimizer.pt").write_bytes(b"stays here")
    with HubServer().running() as server:
        use(server, tmp_path / "cache", monkeypatch)
        refused = peftcore("push", str(adapter), "me/adapter")
        assert refused.exit_code == 1 and "error: me/adapter: " in refused.stderr and "hf auth login" in refused.stderr
        monkeypatch.setenv("HF_TOKEN", server.token)
        done = peftcore("push", str(adapter), "me/adapter", "--private", "-m", "first", "--tag", "mine")
        assert done.exit_code == 0, done.stderr
        repository = server.repositories["me/adapter"]
        assert done.stdout.strip() == f"{server.url}/me/adapter/commit/{repository.branches['main']}"
        assert repository.private and repository.messages[-1] == "first"
        files = repository.files()
        assert sorted(files) == ["README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"]
        assert b"- mine" in files["README.md"]
        assert PeftConfig.from_pretrained("me/adapter").ranks() == [3]
        document = json.loads(peftcore("push", str(adapter), "me/adapter", "--revision", "next", "--json").stdout)
        assert document["commit"] == repository.branches["next"]
        pull = peftcore("push", str(adapter), "me/adapter", "--create-pr")
        assert pull.stdout.strip() == f"{server.url}/me/adapter/discussions/1"
    empty = peftcore("push", str(tmp_path), "me/adapter")
    assert empty.exit_code == 1 and "give the directory that save_pretrained wrote" in empty.stderr
    assert peftcore("push", str(tmp_path / "absent"), "me/adapter").exit_code == 2
