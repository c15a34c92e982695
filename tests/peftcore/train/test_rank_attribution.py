"""The drop of a loss is shared out among singular directions, and nothing of it is lost."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.model_loss import ModelLossCheck
from peftcore.train.rank_attribution import attribute_loss, mean_loss, scaled, to_singular_directions


def batches(count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    made = torch.randint(1, 40, (count, 2, 9))
    return [{"input_ids": ids, "labels": ids} for ids in made]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 40,
    }
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).double()
    made: Any = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        for adapter in lora(made).values():
            adapter.lora_B_weight.mul_(6)
    return made


def lora(model: Any) -> dict[str, Any]:
    return adapter_set(model).of_method("default")  # type: ignore[return-value]


def test_the_rewritten_factors_are_the_singular_triplets_of_the_same_change(model: Any) -> None:
    for adapter in lora(model).values():
        before = adapter.delta_weight()
        values = to_singular_directions(adapter)
        torch.testing.assert_close(adapter.delta_weight(), before)
        torch.testing.assert_close(values, torch.linalg.svdvals(before)[:3])
        gram = adapter.lora_A_weight @ adapter.lora_A_weight.T
        torch.testing.assert_close(gram, torch.diag(values / adapter.scaling), rtol=1e-8, atol=1e-10)


class Two(nn.Module):
    """Two linear layers and a squared error: L(t) is of degree 4, for which the rule of two points is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, goal: Tensor) -> Any:
        return SimpleNamespace(loss=(self.second(self.first(x)) - goal).square().mean())


def test_credits_add_up_to_the_drop_of_the_loss() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False)
    model: Any = get_peft_model(Two().double(), config)
    data = [{"x": torch.randn(4, 7).double(), "goal": torch.randn(4, 5).double()} for _ in range(2)]
    for adapter in lora(model).values():
        to_singular_directions(adapter)
    with scaled(lora(model), 0.0):
        before = mean_loss(model, data, ModelLossCheck())
    drop = before - mean_loss(model, data, ModelLossCheck())
    shares = attribute_loss(model, lora(model), data, ModelLossCheck(), lambda: None)
    assert abs(drop) > 1e-3
    assert sum(share.sum().item() for share in shares.values()) == pytest.approx(drop, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_credit_is_the_loss_gradient_along_its_direction(model: Any) -> None:
    """For a small change L(t) is straight, so each credit is −⟨G, σuvᵀ⟩ with the whole gradient of W."""
    with torch.no_grad():
        for adapter in lora(model).values():
            adapter.lora_B_weight.mul_(1e-8)
    for adapter in lora(model).values():
        to_singular_directions(adapter)
    data = batches(1)
    shares = attribute_loss(model, lora(model), data, ModelLossCheck(), lambda: None)
    for adapter in lora(model).values():
        adapter.base.layer.weight.requires_grad_(True)
    model(**data[0]).loss.backward()
    for path, adapter in lora(model).items():
        gradient = adapter.base.layer.weight.grad
        expected = -adapter.scaling * torch.einsum(
            "or,oi,ri->r", adapter.lora_B_weight, gradient, adapter.lora_A_weight
        )
        torch.testing.assert_close(shares[path], expected.detach(), rtol=1e-3, atol=1e-15)


def test_credits_weigh_batches_by_their_supervised_tokens(model: Any) -> None:
    """One batch of all rows, and the same rows in batches of unequal size, are one data set."""
    ids = torch.cat([batch["input_ids"] for batch in batches(3)])
    parts = [{"input_ids": part, "labels": part} for part in ids.split([1, 5])]
    whole = [{"input_ids": ids, "labels": ids}]
    one, other = (attribute_loss(model, lora(model), data, ModelLossCheck(), lambda: None) for data in (whole, parts))
    for path, share in one.items():
        torch.testing.assert_close(other[path], share)
