"""VeLoRA: LoRA's forward pass, the gradient of a compressed input, less memory, and parity with HF PEFT."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter
from method_example import randomise
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, PeftModel, VeloraConfig, get_peft_model, set_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0"]}
GROUPS = {"num_groups": 5, "scale": 0.5}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8))


def inputs(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 12)


def velora(**options: Any) -> Any:
    config = LoraConfig(**OPTIONS, velora_config=VeloraConfig(**{**GROUPS, "init_type": "random", **options}))
    return get_peft_model(net(), config)


@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_that_of_lora(training: bool) -> None:
    model, plain, x = velora().train(training), get_peft_model(net(), LoraConfig(**OPTIONS)), inputs()
    randomise(model, 0.3)
    with torch.no_grad():
        for name in ("lora_A_weight", "lora_B_weight"):
            getattr(adapter(plain), name).copy_(getattr(adapter(model), name))
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.eval().merge_and_unload()(x), plain(x))


def test_the_gradient_of_a_is_that_of_the_rebuilt_input() -> None:
    model, x = velora(), inputs().requires_grad_()
    randomise(model, 0.3)
    part = adapter(model)
    v = part.lora_velora_embed
    torch.testing.assert_close(v.norm(), torch.tensor(1.0))
    model(x).square().sum().backward()
    gradient = 2 * model(x).detach() @ part.lora_B_weight.detach() * part.scaling  # of h
    filled = torch.cat([x.detach(), torch.zeros(2, 5, 3)], -1).view(2, 5, 5, 3)
    rebuilt = ((filled @ v)[..., None] * v).flatten(-2)[..., :12] * 0.5
    expected = torch.einsum("btr,bti->ri", gradient, rebuilt)
    torch.testing.assert_close(part.lora_A_weight.grad, expected, rtol=1e-5, atol=1e-5)
    weight = net()[0].weight + part.delta_weight()
    torch.testing.assert_close(x.grad, 2 * model(x).detach() @ weight, rtol=1e-4, atol=1e-4)


def test_training_keeps_less_than_the_input() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(512, 8)), LoraConfig(**OPTIONS, velora_config=VeloraConfig(num_groups=4))
    )
    x, kept = torch.randn(64, 512), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.shape[0] == len(x) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert 0 < kept < x.numel() / 8


@pytest.mark.parametrize("init_type", ["random", "batch_average", "batch_average_once"])
def test_start_gradients_and_files_are_pefts(init_type: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(**OPTIONS, velora_config=peft.VeloraConfig(**GROUPS, init_type=init_type))
    theirs: Any = peft.get_peft_model(net(), config)
    following = torch.rand(1)
    torch.manual_seed(3)
    ours = velora(init_type=init_type)
    assert torch.equal(torch.rand(1), following)
    layer = theirs.base_model.model[0]
    assert torch.equal(ours[0].lora_velora_embed["default"], layer.lora_velora_embed["default"])
    randomise(theirs, 0.3)
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    for seed in (1, 2):
        x = inputs(seed)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(ours[0].lora_A["default"].weight.grad, a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[0].lora_velora_embed["default"], layer.lora_velora_embed["default"])
        assert ours[0].lora_velora_initialized["default"] is True
    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftModel.from_pretrained(net(), tmp_path / "theirs")
    assert torch.equal(read[0].lora_velora_embed["default"], layer.lora_velora_embed["default"])
    read.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_groups": 0}, "`num_groups` should be positive, got 0."),
        ({"scale": 0.0}, "`scale` should be positive, got 0.0."),
        ({"init_type": "mean"}, "`init_type` must be one of batch_average_once, batch_average, random; got 'mean'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        VeloraConfig(**options)
