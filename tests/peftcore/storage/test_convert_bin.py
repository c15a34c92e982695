"""A pickle becomes safetensors, in a process of its own, and only if it holds tensors."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_server import HubServer, use
from torch import nn

from peftcore import CheckpointError, LoraConfig, PeftModel, get_peft_model
from peftcore.storage.convert_bin import convert_bin, main


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
    return tmp_path / "pickled"


def test_the_command_of_the_error_message_converts(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a pickle can run code") as refused:
        PeftModel.from_pretrained(net(), pickled)
    command = re.search(r"python (-m \S+ \S+) NEW_DIRECTORY", str(refused.value))
    assert command is not None
    new = tmp_path / "new"
    subprocess.run([sys.executable, *command[1].split(), str(new)], check=True, capture_output=True)
    x = torch.randn(2, 6)
    theirs = peft.PeftModel.from_pretrained(net(), str(pickled))
    torch.testing.assert_close(PeftModel.from_pretrained(net(), new)(x), theirs(x))
    assert sorted(file.name for file in new.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_pickle_of_the_hub(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer().running() as server:
        use(server, tmp_path / "cache", monkeypatch)
        server.add("user/adapter", pickled, "old", inside="a/")
        new = convert_bin("user/adapter", tmp_path / "new", subfolder="a", revision="old")
    PeftModel.from_pretrained(net(), new)


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_what_is_no_state_dict_is_refused(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = pickled / "adapter_model.bin"
    for content, message in ((Runs(), "holds more than tensors"), ([torch.zeros(1)], "is not a state dict of tensors")):
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=message):
            convert_bin(pickled, tmp_path / "new")
    weights.write_bytes(b"not a pickle")
    with pytest.raises(SystemExit, match=r"error: .*is damaged"):
        main([str(pickled), str(tmp_path / "new")])
    weights.unlink()
    get_peft_model(net(), LoraConfig(target_modules=["0"])).save_pretrained(pickled)
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.bin to convert"):
        convert_bin(pickled, tmp_path / "new")
    with pytest.raises(CheckpointError, match="exists already; give a new directory"):
        convert_bin(pickled, pickled)
    assert not Path("ran").exists() and not (tmp_path / "new").exists()
