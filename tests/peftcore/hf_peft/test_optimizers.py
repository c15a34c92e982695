import pytest
import torch
from peftcore.optimizers import (
    LoraFAOptimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from torch import nn

from peftcore import ConfigError, LoraConfig, get_peft_model


@pytest.fixture
def model() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(4, 5)), LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))


def test_lora_plus_gives_b_a_higher_rate(model: nn.Module) -> None:
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert [group["lr"] for group in optimizer.param_groups if group["params"]] == [1e-3, 16e-3]


def test_lora_fa_freezes_a_and_checks_the_stated_options(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"r=4, but adapter 'default' has r=2; the scaling of each layer is used"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises(ConfigError, match="use_rslora=True"):
        create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3, use_rslora=True)
    assert isinstance(create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3), LoraFAOptimizer)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_B.default.weight"]


def test_riemannian_preconditioning_takes_any_optimiser(model: nn.Module) -> None:
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.1, momentum=0.9)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (1e-3, 0.9)
