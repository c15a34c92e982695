"""FSDP version 1 with use_orig_params=True, which puts plain tensors in the place of parameters during a forward."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract_cases import EXAMPLES, cases_of
from method_example import randomise
from net import Net
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peftcore import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peftcore.injection.adapter_set import adapter_set

LAYERS: dict[str, tuple[str, Any, Any]] = {
    "Linear": ("linear", lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    "Conv2d": ("conv", lambda: nn.Conv2d(6, 8, 3), lambda: torch.randn(2, 6, 9, 9)),
    "Embedding": ("embedding", lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (3, 5))),
    "LayerNorm": ("norm", lambda: nn.LayerNorm(12), lambda: torch.randn(3, 5, 12)),
}
CASES = cases_of(LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of FSDP on a CPU


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_same_under_fsdp(net: Any, x: Tensor) -> None:
    """Outputs and gradients of an adapted net are the same once it is wrapped, and they are not the base's."""
    for adapter in adapter_set(net).adapters("default").values():
        adapter.eval()  # Poly draws its mixture anew in each training forward
    with net.disable_adapter():
        base = net(x)
    y = net(x)
    assert (y - base).abs().max() > 1e-3
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    wrapped = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    z = wrapped(x)
    torch.testing.assert_close(z, y)
    z.square().sum().backward()
    found = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(found) == len(gradients)
    for name, gradient in found.items():
        assert gradient is not None, name
        wanted = gradients[name.replace("_fsdp_wrapped_module.", "")]
        torch.testing.assert_close(gradient.view_as(wanted), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), y)


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("method, layer", CASES)
def test_layers(method: str, layer: str, recomputes: bool) -> None:
    torch.manual_seed(0)
    _, make, inputs = LAYERS[layer]
    net = get_peft_model(Net(make(), recomputes), EXAMPLES[method].make(layer, target_modules=["target"]))
    randomise(net, EXAMPLES[method].spread)
    assert_same_under_fsdp(net, inputs())


class Experts(nn.Module):
    """Two matrices as one raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_all = nn.Parameter(torch.randn(2, 8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bti->bto", self.weight_of_all, x)


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "checkpointed"])
def test_raw_parameters(recomputes: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=[], target_parameters=["target.weight_of_all"], init_lora_weights=False)
    net = get_peft_model(Net(Experts(), recomputes), config)
    randomise(net, 0.3)
    assert_same_under_fsdp(net, torch.randn(3, 5, 12))


def test_the_state_dict_of_a_wrapped_model_is_that_of_the_model() -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))

    options: dict[str, Any] = {"r": 2, "target_modules": ["0"], "modules_to_save": ["1"], "init_lora_weights": False}
    net = get_peft_model(base(), LoraConfig(**options))
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(net).items()}
    wrapped = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    state_dict = get_peft_model_state_dict(wrapped)
    assert state_dict.keys() == before.keys()
    for key, tensor in state_dict.items():
        assert torch.equal(tensor, before[key]), key
    other = FullyShardedDataParallel(
        get_peft_model(base(), LoraConfig(**options)), use_orig_params=True, device_id=torch.device("cpu")
    )
    x = torch.randn(2, 4)
    assert set_peft_model_state_dict(other, state_dict) == ([], [])
    torch.testing.assert_close(other(x), wrapped(x))


def test_lora_with_a_bias_of_its_own() -> None:
    torch.manual_seed(0)
    net = get_peft_model(Net(nn.Linear(12, 8), False), LoraConfig(r=2, target_modules=["target"], lora_bias=True))
    randomise(net, 0.1)
    assert_same_under_fsdp(net, torch.randn(3, 5, 12))
