"""The fused path on several processes (gloo, CPU): DDP and FSDP2 give one process's loss and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_groups import together
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import step_of_one_process, steps

from peftcore import LoraConfig, get_peft_model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process of a group came to, by the way in which the model was wrapped."""
    return together(steps, tmp_path_factory.mktemp("group"), backend="gloo")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_equals_one_process(way: str, found: list[dict[str, Any]]) -> None:
    loss, gradients = step_of_one_process()
    for process in found:
        outcome = process[way]
        assert outcome["taken"] == [3, 1, 2, 1] * 2  # the fused path, with its shared inputs
        assert abs(outcome["loss"] - loss) < 1e-6  # transformers takes the loss in float32
        assert outcome["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(outcome["gradients"][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("before", [True, False], ids=["before adapters", "after"])
def test_names_that_a_user_lets_ddp_ignore_are_ignored_with_the_base(before: bool, tmp_path: Path) -> None:
    def ignore() -> None:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["1.running"])

    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    net[1].register_buffer("running", torch.zeros(1))
    if before:
        ignore()
    net = get_peft_model(net, LoraConfig(target_modules=["0"]))
    own = {"0.base_layer.weight", "0.base_layer.bias"}
    assert own <= set(net._ddp_params_and_buffers_to_ignore)
    if not before:
        ignore()
    assert own | {"1.running"} == set(net._ddp_params_and_buffers_to_ignore)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        ignored = DistributedDataParallel(net).parameters_to_ignore
    finally:
        dist.destroy_process_group()
    assert own | {"1.running"} == set(ignored)
    assert net.unload()._ddp_params_and_buffers_to_ignore == ["1.running"]
