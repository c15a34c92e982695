"""SLERP, model stock, sums and averages equal their formulas."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_formulas import check
from torch import Tensor

from peftcore import LoraConfig, get_peft_model
from peftcore.composition import Only, Stack
from peftcore.errors import RoutingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging import Recipe


def test_task_arithmetic_takes_away_what_has_a_negative_weight(model: Any, changes: Any) -> None:
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    check(model, changes, Recipe.task_arithmetic(0.3), weights, lambda d, w: 0.3 * (d[0] - 0.5 * d[1] + 2 * d[2]))


def test_the_average_of_an_adapter_with_itself_is_that_adapter(linears: Any, changes: Any) -> None:
    """Not half of it, whatever the weights."""
    model = linears(a={}, b={})
    model.load_state_dict(
        {k.replace(".a.", ".b."): v for k, v in model.state_dict().items() if ".a." in k}, strict=False
    )
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}):
        for recipe in (Recipe.linear(), Recipe.ties(density=1), Recipe.slerp(), Recipe.dare_ties(1.0)):
            check(model, changes, recipe, weights, lambda d, _w: d[0])
    check(model, changes, Recipe.model_stock(), {"a": 1, "b": 1}, lambda d, _w: d[0])


def test_linear(model: Any, changes: Any) -> None:
    check(model, changes, Recipe.linear(), {"a": 2.0, "b": 1.0}, lambda d, w: (2 * d[0] + d[1]) / 3)


def test_slerp_is_on_the_arc_between_the_two(model: Any, changes: Any) -> None:
    def formula(deltas: list[Tensor], _w: list[float]) -> Tensor:
        a, b = (d.flatten() for d in deltas)
        angle = torch.arccos(torch.dot(a, b) / (a.norm() * b.norm()))
        return (torch.sin(0.75 * angle) * deltas[0] + torch.sin(0.25 * angle) * deltas[1]) / torch.sin(angle)

    check(model, changes, Recipe.slerp(), {"a": 3.0, "b": 1.0}, formula)


def test_slerp_keeps_the_length_and_a_line_does_not(linears: Any, changes: Any) -> None:
    model = linears(a={}, b={})
    with torch.no_grad():
        for adapter in (*adapter_set(model).adapters("a").values(), *adapter_set(model).adapters("b").values()):
            adapter.lora_B_weight /= adapter.delta_weight().norm()
    model.add_merged("arc", {"a": 1, "b": 1}, Recipe.slerp())
    model.add_merged("line", {"a": 1, "b": 1}, Recipe.linear())
    for path in ("0", "1"):
        assert changes(model, "arc")[path].norm() == pytest.approx(1, abs=1e-12)
        assert changes(model, "line")[path].norm() < 0.9


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_model_stock(names: str, model: Any, changes: Any) -> None:
    with torch.no_grad():  # something in common, without which the mean cosine may be negative
        for path, a in adapter_set(model).adapters("a").items():
            for name in names[1:]:
                other = adapter_set(model).adapters(name)[path]
                other.lora_A_weight += 2 * a.lora_A_weight[: len(other.lora_A_weight)]
                other.lora_B_weight += 2 * a.lora_B_weight[:, : len(other.lora_A_weight)]

    def formula(deltas: list[Tensor], _w: list[float]) -> Tensor:
        flat = [d.flatten() for d in deltas]
        cosines = [torch.cosine_similarity(x, y, dim=0) for x, y in itertools.combinations(flat, 2)]
        mean, count = sum(cosines) / len(cosines), len(deltas)
        assert mean > 0.05
        return count * mean / (1 + (count - 1) * mean) * sum(deltas) / count

    check(model, changes, Recipe.model_stock(), dict.fromkeys(names, 1.0), formula)


def test_model_stock_of_opposites_is_the_base(linears: Any, changes: Any) -> None:
    model = linears(a={})
    model.add_merged("b", {"a": -1.0}, Recipe.task_arithmetic())
    model.add_merged("m", {"a": 1.0, "b": 1.0}, Recipe.model_stock())
    assert all(change.abs().max() < 1e-12 for change in changes(model, "m").values())


def test_a_sum_in_a_route_and_the_same_sum_merged(llama: Callable[..., Any]) -> None:
    """What is computed live and what is made of it once are one thing."""
    one: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model = get_peft_model(llama(), LoraConfig(r=2, **one), "a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, use_rslora=True, **one))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model.double().eval()
    mix, tokens = 0.7 * Only("a") - 0.5 * (Only("b") + 0.2 * Only("c")), torch.arange(14).view(2, 7)
    model.add_merged("m", mix, Recipe.task_arithmetic())
    live = model(tokens, adapter_names=mix).logits
    torch.testing.assert_close(model(tokens, adapter_names="m").logits, live, atol=1e-10, rtol=0)
    with pytest.raises(RoutingError, match="is not a weighted sum, and only those can be merged"):
        model.add_merged("n", Stack("a", {"b": 0.5}), Recipe.linear())
