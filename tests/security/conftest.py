"""What attacks are tried on: a tiny adapted model and its folder, and the repository that the pipeline's tests have."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import LoraConfig, get_peft_model


def _pipeline_fixtures() -> Any:
    """The fixtures that tests/flows/conftest.py gives its own tests."""
    path = Path(__file__).parents[1] / "flows" / "conftest.py"
    spec = importlib.util.spec_from_file_location("fixtures_of_the_pipeline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_flows = _pipeline_fixtures()
isolated_git, forked_dvc, results = _flows.isolated_git, _flows.forked_dvc, _flows.results
project, template, registered, registered_template = (
    _flows.project, _flows.template, _flows.registered, _flows.registered_template
)  # fmt: skip


def net() -> nn.Module:
    """Two linear layers, which a LoRA of rank 2 adapts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.fixture
def bare() -> nn.Module:
    """A model that has no adapter yet."""
    return net()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a good adapter for `bare`."""
    folder = tmp_path / "adapter"
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """{file: its bytes} of such a folder."""
    folder = tmp_path_factory.mktemp("good")
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"])).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def good_tensors(good_folder: dict[str, bytes]) -> bytes:
    """Its weights."""
    return good_folder["adapter_model.safetensors"]
