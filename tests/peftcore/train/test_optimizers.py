"""Which optimiser trains; LoRA+ and LoRA-FA by their papers' formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW as BitsAndBytesAdamW
from torch import nn
from transformers import TrainingArguments

from peftcore import ConfigError, LoraConfig, TrainingError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.train import AdapterTrainer, FusedAdamW
from peftcore.train.optimizers import create_lorafa_optimizer, create_loraplus_optimizer


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8))
    return get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0", "1"], **options}))


def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    return {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_loraplus_rates() -> None:
    model = net(bias="lora_only")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, eps=1e-6
    )
    embedding, linear = adapter_set(model).adapters("default").values()
    found = rates(optimizer)
    assert found[id(linear.lora_A)] == (1e-3, 0.1)
    assert found[id(linear.lora_B)] == (16e-3, 0.1)
    assert found[id(embedding.lora_A)] == found[id(embedding.lora_B)] == (1e-6, 0.1)
    assert found[id(adapter_set(model).biases("default")["1"].bias)] == (16e-3, 0.0)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert optimizer.param_groups[0]["eps"] == 1e-6


def test_lorafa_freezes_a_and_projects_the_gradient_of_b() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 8)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    )
    layer = adapter_set(model).adapters("default")["0"]
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    assert not layer.lora_A.requires_grad
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    x, y = torch.randn(32, 12), torch.randn(32, 8)
    loss = (model(x) - y).square().mean()
    loss.backward()
    gradient = layer.lora_B.grad.clone()
    optimizer.step()
    projected = gradient @ torch.linalg.inv(a @ a.T) / 2**2
    torch.testing.assert_close(layer.lora_B.grad, projected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.detach(), b - 1e-2 * projected.sign(), rtol=1e-3, atol=1e-4)  # Adam, step 1
    assert torch.equal(layer.lora_A, a)


def test_lorafa_learns() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), LoraConfig(r=3, target_modules=["0"]))
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    x = torch.randn(64, 12)
    y = x @ torch.randn(12, 8)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="on linear layers"):
        create_lorafa_optimizer(net(), lr=1e-2)
    with pytest.raises(ConfigError, match="needs LoRA factors"):
        model = net()
        model.set_adapter([])
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)


# -- in the trainer --------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, **options: Any) -> AdapterTrainer:
    fixed: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "weight_decay": 0.1}
    return AdapterTrainer(model=model, args=TrainingArguments(**fixed, **options))


def test_the_trainers_fused_adamw_takes_one_call_and_keeps_its_groups(tmp_path: Path) -> None:
    model = net(bias="lora_only")
    made = trainer(model, tmp_path, learning_rate=3e-3, adam_beta2=0.98, adam_epsilon=1e-7)
    optimizer = made.create_optimizer()
    assert isinstance(optimizer, FusedAdamW) and made.optimizer is optimizer
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-7)
    found = rates(optimizer)
    assert found[id(adapter_set(model).biases("default")["1"].bias)] == (3e-3, 0.0)
    assert sorted(found.values()) == [(3e-3, 0.0)] + [(3e-3, 0.1)] * 4


@pytest.mark.parametrize(("name", "bits"), [("adamw_bnb_8bit", 8), ("adamw_torch", 32)])
def test_another_optimiser_is_the_one_that_was_asked_for(tmp_path: Path, name: str, bits: int) -> None:
    optimizer = trainer(net(), tmp_path, optim=name).create_optimizer()
    assert type(optimizer) is (BitsAndBytesAdamW if bits == 8 else torch.optim.AdamW)


@pytest.mark.parametrize(
    ("name", "instead"), [("paged_adamw_32bit", "adamw_torch_fused"), ("paged_adamw_8bit", "adamw_bnb_8bit")]
)
def test_paging_without_cuda_is_an_error_before_training(tmp_path: Path, name: str, instead: str) -> None:
    with pytest.raises(TrainingError, match=f"training runs on cpu; choose {instead}"):
        trainer(net(), tmp_path, optim=name)
