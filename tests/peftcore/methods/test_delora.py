"""What the DeLoRA paper says of its bound, and what DeLoRA must refuse."""

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from method_example import Example
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.methods.delora import DeloraConfig

EXAMPLE = Example(
    DeloraConfig,
    options={"r": 4, "delora_lambda": 3},
    theirs="DeloraConfig",
    parity={
        "plain": {"r": 4, "delora_lambda": 2},
        "random": {"r": 4, "init_weights": False},
        "biases": {"r": 4, "bias": "delora_only"},
        "patterns": {
            "r": 4,
            "rank_pattern": {"q_proj": 2, "query": 6},
            "lambda_pattern": {r"layers\.1\..*down_proj": 3, "query": 2},
        },
    },
    families=("llama", "bert", "t5"),
)


def random_net(outputs: int = 5, inputs: int = 6, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, outputs)).double()
    weight = net[0].weight.detach().clone()
    return get_peft_model(net, DeloraConfig(target_modules=["0"], init_weights=False, **options)), weight


def test_the_papers_formula() -> None:
    net, weight = random_net(r=3, delora_lambda=7)
    adapter = net[0].adapters["default"]
    a, b = adapter.delora_A, adapter.delora_B
    change = sum(7 / 3 * torch.outer(b[:, k], a[k]) / (b[:, k].norm() * a[k].norm()) for k in range(3))
    expected = weight + change * weight.norm(dim=0)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), x @ expected.T + net[0].base_layer.bias, rtol=1e-12, atol=1e-12)


def test_lambda_bounds_the_change_however_large_its_factors_are() -> None:
    net, weight = random_net(r=3, delora_lambda=2)
    adapter = net[0].adapters["default"]
    before = adapter.delta_weight().detach()
    with torch.no_grad():
        adapter.delora_A.mul_(1000)
        adapter.delora_B.mul_(1000)
    torch.testing.assert_close(adapter.delta_weight(), before, rtol=1e-10, atol=1e-10)
    assert (before / weight.norm(dim=0)).norm() <= 2


def test_lengths_are_those_of_the_base_without_merges_and_are_saved(tmp_path) -> None:
    net, weight = random_net(r=3)
    net.merge_adapter()
    net.add_adapter("other", DeloraConfig(r=3, target_modules=["0"]))
    other = net[0].adapters["other"]
    torch.testing.assert_close(other.w_norm, weight.norm(dim=0))
    with torch.no_grad():
        other.w_norm.mul_(2)
    net.save_pretrained(tmp_path, selected_adapters=["other"])
    net.load_adapter(tmp_path / "other", "again")
    assert torch.equal(net[0].adapters["again"].w_norm, other.w_norm)


def test_starts_at_zero_and_can_leave_it() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 5)), DeloraConfig(target_modules=["0"]))
    adapter = net[0].adapters["default"]
    assert adapter.delta_weight().abs().max() == 0 and adapter.delora_lambda.item() == 15
    net(torch.randn(4, 6)).square().sum().backward()
    assert adapter.delora_B.grad.abs().max() > 0


def test_dropout_acts_while_training_only_and_keeps_the_mean() -> None:
    net, _ = random_net(outputs=4, inputs=64, r=4, module_dropout=0.4)
    x = torch.randn(1, 64, dtype=torch.float64)
    assert_dropout_keeps_the_mean(net, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"module_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "delora_only"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeloraConfig(**options)
