"""Arrow: prototypes and weights equal the definitions of its paper."""

from typing import Any

import pytest
import torch
from routed_experts import X, adapted
from torch import nn

from peftcore import IA3Config, LoraConfig, get_peft_model
from peftcore.composition import Weighted
from peftcore.errors import RoutingError
from peftcore.routing import arrow_gate


def experts() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 8)).double()
    for number, name in enumerate("abc"):
        config = LoraConfig(r=2 + number, target_modules=["0"], init_lora_weights=False)
        model = model if number else get_peft_model(model, config, name)
        if number:
            model.add_adapter(name, config)
    return model.double().eval()


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_arrow_is_what_its_paper_says(top_k: int | None) -> None:
    model, x = experts(), torch.randn(5, 12, dtype=torch.float64)
    layer = model[0]
    with torch.no_grad():
        base, changes, scores = layer.base_layer(x), [], []
        for name in "abc":
            delta = layer.adapters[name].delta_weight()
            changes.append(x @ delta.T)
            scores.append((x @ torch.linalg.svd(delta)[2][0]).abs() / 0.5)
        score = torch.stack(scores, -1)
        if top_k is not None:
            score = score.masked_fill(score < score.topk(top_k, -1)[0][:, -1:], -torch.inf)
        expected = base + (score.softmax(-1)[:, None] * torch.stack(changes, -1)).sum(-1)
        gate = arrow_gate(["a", "b", "c"], top_k, temperature=0.5)
        torch.testing.assert_close(model(x, adapter_names=gate), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x, adapter_names=gate), expected, atol=1e-12, rtol=0)  # with gradients
    assert Weighted({"a": 1.0}) != gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arrow_takes_adapters_in_16_bits(dtype: torch.dtype) -> None:
    model, x, gate = experts().to(dtype), torch.randn(5, 12, dtype=dtype), arrow_gate(["a", "b", "c"])
    narrow = model(x, adapter_names=gate).double()
    torch.testing.assert_close(narrow, model.double()(x.double(), adapter_names=gate), atol=0.05, rtol=0.02)


def test_what_arrow_cannot_do_is_refused() -> None:
    with pytest.raises(RoutingError, match="temperature must be above 0, got 0"):
        arrow_gate(["a"], temperature=0)
    with pytest.raises(RoutingError, match="top_k must be from 1 to 1, got 2"):
        arrow_gate(["a"], top_k=2)
    model = experts()
    model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(RoutingError, match="Arrow needs low-rank adapters of linear layers; IA3 at 0 is none"):
        model(torch.randn(2, 12, dtype=torch.float64), adapter_names=arrow_gate(["a", "ia3"]))


def test_arrow_follows_weights_that_have_changed() -> None:
    model = adapted()
    gate = arrow_gate(["a", "b"])
    with torch.no_grad():
        before = model(X, adapter_names=gate)
        for path in (0, 2):
            adapter = model[path].adapters["a"]
            adapter.lora_A_weight.copy_(torch.randn_like(adapter.lora_A_weight))
        after = model(X, adapter_names=gate)
        torch.testing.assert_close(after, model(X, adapter_names=arrow_gate(["a", "b"])), atol=1e-12, rtol=0)
    assert not torch.allclose(before, after)
