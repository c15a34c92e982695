"""MiCA: the minor singular vectors, a B that never trains, and parity with HF PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter, lora, net_and_input
from method_example import randomise
from torch import nn

from peftcore import ConfigError, LoraConfig, PeftModel, TargetError, get_layer_status, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


@pytest.mark.parametrize("layer", ["linear", "conv1d of gpt2", "embedding"])
def test_b_spans_the_smallest_singular_values_and_the_model_starts_at_its_base(layer: str) -> None:
    net, x = net_and_input(layer)
    base = net(x)
    net = lora(net, init_lora_weights="mica")
    part = adapter(net)
    u, values, _ = torch.linalg.svd(part.base.read())
    assert torch.equal(net(x), base) and not part.lora_A_weight.any()
    minor = u[:, len(values) - 2 : len(values)]
    torch.testing.assert_close(part.lora_B_weight @ part.lora_B_weight.T, minor @ minor.T, rtol=1e-5, atol=1e-5)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_b_never_trains() -> None:
    net, x = net_and_input("linear")
    net = lora(net, init_lora_weights="mica")
    only_a = ["0.lora_A.default.weight"]
    assert trained(net) == only_a
    net(x).square().sum().backward()
    assert adapter(net).lora_B_weight.grad is None and adapter(net).lora_A_weight.grad.any()
    net.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    for switch in (
        lambda: net.set_adapter("default"),
        lambda: net.set_requires_grad("default"),
        lambda: net[0].set_adapter("default"),
    ):
        net.set_requires_grad(["default", "plain"], False)
        switch()
        assert trained(net) == only_a, switch
    assert net[0].frozen_peft_weight_names == {"default": ("lora_B",)}
    assert get_layer_status(net)[0].requires_grad["default"] == "irregular"  # as in HF PEFT


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_start_and_files_are_pefts(layer: str, tmp_path: Path) -> None:
    def net() -> Any:
        return net_and_input(layer)[0].float()

    x = net_and_input(layer)[1]
    x = x.float() if x.is_floating_point() else x
    options: dict[str, Any] = {"r": 3, "target_modules": ["0"], "init_lora_weights": "mica"}
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(**options))
    ours = get_peft_model(net(), LoraConfig(**options))
    wrapped = theirs.base_model.model[0]
    b = wrapped.lora_embedding_B["default"] if layer == "embedding" else wrapped.lora_B["default"].weight
    assert torch.equal(adapter(ours).lora_B_weight, b)
    randomise(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert trained(ours) == ["0.lora_embedding_A.default" if layer == "embedding" else "0.lora_A.default.weight"]
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="exceeds the weight's 5 singular vectors"):
        lora(net_and_input("linear")[0], r=6, init_lora_weights="mica")
    with pytest.raises(TargetError, match="fits linear layers and embeddings; exclude the conv ones"):
        lora(net_and_input("conv")[0], init_lora_weights="mica")
    with pytest.raises(ConfigError, match="exclude each other"):
        LoraConfig(init_lora_weights="mica", use_dora=True)
