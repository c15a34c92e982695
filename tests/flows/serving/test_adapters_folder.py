"""Adapters of a folder, some of which DVC has to pull."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.runtime.project import dvc
from flows.serving.adapters_folder import register_adapters
from peftcore import LoraConfig, get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.routing import AdapterStore


def _small() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8))


@pytest.mark.usefixtures("forked_dvc")
def test_adapters_of_a_remote_are_pulled_when_one_is_asked_for(tmp_path: Path) -> None:
    root, remote, folder = tmp_path / "repository", tmp_path / "remote", tmp_path / "repository" / "adapters"
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "--quiet")
    dvc(root, "remote", "add", "--quiet", "--default", "here", str(remote))
    model = _small()
    for number, name in enumerate(("here", "sql", "chat", "lost")):
        own = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"]))
        torch.nn.init.constant_(own[0].adapters["default"].lora_B_weight, 1.0 + number)
        own.save_pretrained(folder / name)
        if name != "here":
            dvc(root, "add", "--quiet", f"adapters/{name}")
    dvc(root, "push", "--quiet", "adapters/sql.dvc", "adapters/chat.dvc")
    shutil.rmtree(root / ".dvc" / "cache")
    for name in ("sql", "chat", "lost"):
        shutil.rmtree(folder / name)
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["0"])).eval()
    store = AdapterStore(model)
    assert register_adapters(store, folder) == ["here", "chat", "lost", "sql"]
    assert not (folder / "sql").exists()
    x = torch.ones(1, 8)
    with store.route(["sql"]):
        found = model(x)
    assert (folder / "sql" / "adapter_config.json").is_file() and not (folder / "chat").exists()
    with store.route(["here"]):
        assert not torch.equal(model(x), found)
    with pytest.raises(CheckpointError, match=r"lost\.dvc.*dvc push"):
        store.acquire("lost")
    assert store.statistics()["failures"] == 1 and store.acquire("chat").name
    with pytest.raises(ConfigError, match="holds no adapters"):
        register_adapters(store, remote)
