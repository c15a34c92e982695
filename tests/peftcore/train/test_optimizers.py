"""Which optimiser trains; LoRA+, LoRA-FA and Riemannian preconditioning by their papers' formulas."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.optim import AdamW as BitsAndBytesAdamW
from peft.optimizers import create_riemannian_optimizer as hf_riemannian
from torch import nn
from transformers import TrainingArguments

from peftcore import ConfigError, LoraConfig, TrainingError, get_peft_model, get_peft_model_state_dict
from peftcore.injection.adapter_set import adapter_set
from peftcore.train import AdapterTrainer, FusedAdamW
from peftcore.train.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


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
    assert found[id(linear.lora_A_weight)] == (1e-3, 0.1)
    assert found[id(linear.lora_B_weight)] == (16e-3, 0.1)
    assert found[id(embedding.lora_A_weight)] == found[id(embedding.lora_B_weight)] == (1e-6, 0.1)
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
    assert not layer.lora_A_weight.requires_grad
    a, b = layer.lora_A_weight.detach().clone(), layer.lora_B_weight.detach().clone()
    x, y = torch.randn(32, 12), torch.randn(32, 8)
    loss = (model(x) - y).square().mean()
    loss.backward()
    gradient = layer.lora_B_weight.grad.clone()
    optimizer.step()
    projected = gradient @ torch.linalg.inv(a @ a.T) / 2**2
    torch.testing.assert_close(layer.lora_B_weight.grad, projected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        layer.lora_B_weight.detach(), b - 1e-2 * projected.sign(), rtol=1e-3, atol=1e-4
    )  # Adam, step 1
    assert torch.equal(layer.lora_A_weight, a)


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


def test_lorafa_projects_on_an_embedding_too() -> None:
    model = net(init_lora_weights=False)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    model(torch.arange(20)).square().mean().backward()
    layer = adapter_set(model).adapters("default")["0"]
    a, gradient = layer.lora_A_weight.detach(), layer.lora_B_weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(
        layer.lora_B_weight.grad, gradient @ torch.linalg.inv(a @ a.T) / 2**2, rtol=1e-3, atol=1e-5
    )


def test_loraplus_has_hf_pefts_groups_at_their_places() -> None:
    optimizer = create_loraplus_optimizer(net(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=4)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1e-6, 4.0, 4.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1, 0]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_steps_are_those_of_hf_peft(optimizer_class: type[torch.optim.Optimizer], use_dora: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8), nn.Linear(8, 8)).double()
    targets = ["0", "1"] if not use_dora else ["1"]
    options: dict[str, Any] = {"r": 3, "target_modules": targets, "use_dora": use_dora, "bias": "lora_only"}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).double()
    torch.manual_seed(1)
    ours = get_peft_model(base, LoraConfig(**options)).double()
    x = torch.arange(20)
    for model, create in ((theirs, hf_riemannian), (ours, create_riemannian_optimizer)):
        optimizer = create(model, optimizer_class, lr=0.1, reg=1e-2, weight_decay=0.1)
        assert isinstance(optimizer, optimizer_class)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    found, expected = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_a_riemannian_step_does_not_depend_on_how_the_product_is_split() -> None:
    torch.manual_seed(0)
    change, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    products = []
    for split in (torch.eye(3, dtype=torch.float64), change):
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(12, 8)).double(), config).double()
        layer: Any = adapter_set(model).adapters("default")["0"]
        with torch.no_grad():
            layer.set_factors(split @ layer.lora_A_weight, layer.lora_B_weight @ split.inverse())
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2, reg=0.0)
        model(x).square().mean().backward()
        optimizer.step()
        products.append(layer.lora_B_weight.detach() @ layer.lora_A_weight.detach())
    torch.testing.assert_close(products[1], products[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_riemannian_scales_half_precision_in_float32(dtype: torch.dtype) -> None:
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)).to(dtype), config, autocast_adapter_dtype=False)
    layer: Any = adapter_set(model).adapters("default")["0"]
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.0, reg=1e-4)
    layer.lora_A_weight.grad, layer.lora_B_weight.grad = torch.randn(3, 12).to(dtype), torch.randn(8, 3).to(dtype)
    a, g = layer.lora_A_weight.detach().float(), layer.lora_B_weight.grad.float()
    optimizer.step()
    assert layer.lora_B_weight.grad.dtype is dtype
    expected = g @ torch.linalg.inv(a @ a.T + 1e-4 * torch.eye(3))
    torch.testing.assert_close(layer.lora_B_weight.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_what_riemannian_refuses() -> None:
    model = net()
    for wrong, message in ((dict, "subclass of torch.optim.Optimizer"), (torch.optim.LBFGS, "requires a closure")):
        with pytest.raises((TypeError, ConfigError), match=message):
            create_riemannian_optimizer(model, wrong, lr=1e-3)
    with pytest.raises(ConfigError, match="reg must be at least 0; got -1"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=-1)
    with pytest.raises(ConfigError, match="takes no closure"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3).step(lambda: None)
    with pytest.raises(ConfigError, match="trains both lora_A and lora_B of a linear layer"):
        create_riemannian_optimizer(net(target_modules=["0"]), torch.optim.SGD, lr=1e-3)


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="on linear layers and embeddings"):
        create_lorafa_optimizer(net(target_modules=["1"], use_dora=True), lr=1e-2)
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
