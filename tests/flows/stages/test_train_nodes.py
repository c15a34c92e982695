"""train on two nodes: two launchers that meet on 127.0.0.1 train what one process trains, and only node 0 writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows.params import Params
from flows.paths import Paths
from flows.stages import train

ROOT = Path(__file__).parents[3]
SECONDS = 300
EXACT = {"storage": "none", "compute_dtype": "float32"}
"""Of the base, so that an order of sums does not show."""

pytestmark = pytest.mark.proof


def start(root: Path, rank: int, address: str) -> "subprocess.Popen[str]":
    node = {"PEFTCORE_NODE_RANK": str(rank), "PEFTCORE_MAIN_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.stages.train"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=os.environ | node, stdout=pipe, stderr=pipe, text=True)


def train_on_two_nodes(first: Paths, second: Path) -> list[tuple[int, str]]:
    """(exit status, what it said) of the nodes in these two folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [start(root, rank, address) for rank, root in enumerate((first.root, second))]
    said = [node.communicate(timeout=SECONDS)[1] for node in nodes]
    return [(node.returncode, words) for node, words in zip(nodes, said, strict=True)]


@pytest.fixture
def second(prepared: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another machine's folder, with the same base and data."""
    folder = tmp_path_factory.mktemp("second") / "root"
    shutil.copytree(prepared.root, folder)
    return folder


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_nodes_train_what_one_process_trains(
    prepared: Paths, second: Path, tiny_params: Callable[..., Params], launcher: str
) -> None:
    shared: dict[str, Any] = {"method": {"r": 4, "lora_dropout": 0.0}, "quantization": EXACT}
    train.run(tiny_params(train={"batch_size": 2, "gradient_accumulation": 2}, **shared), prepared)
    alone = load_file(prepared.adapter / "adapter_model.safetensors")
    steps = json.loads(prepared.training_summary.read_text())["steps"]
    params = tiny_params(train={"batch_size": 2, "nodes": 2, "launcher": launcher}, **shared).model_dump_json()
    prepared.params.write_text(params)
    (second / "params.yaml").write_text(params)
    (second / "checkpoints").symlink_to(prepared.checkpoints, target_is_directory=True)
    before = sorted(second.rglob("*"))
    (status, said), (other_status, other_said) = train_on_two_nodes(prepared, second)
    assert (status, other_status) == (0, 0), said + other_said
    assert said.count("train: 100%") == 1 and "train:" not in other_said
    found = load_file(prepared.adapter / "adapter_model.safetensors")
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert json.loads(prepared.training_summary.read_text())["steps"] == steps
    assert sorted(second.rglob("*")) == before


def test_nodes_that_share_no_checkpoints_are_refused(
    prepared: Paths, second: Path, tiny_params: Callable[..., Params]
) -> None:
    params = tiny_params(train={"batch_size": 2, "nodes": 2}, quantization=EXACT).model_dump_json()
    for root in (prepared.root, second):
        (root / "params.yaml").write_text(params)
    for status, said in train_on_two_nodes(prepared, second):
        assert status == 1
        assert said.count("error: ") == 1 and "error: the nodes do not share" in said
