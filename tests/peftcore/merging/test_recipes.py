"""Each recipe gives what its paper's formula gives, computed here densely and one element or layer at a time."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import LoraConfig, get_peft_model
from peftcore.composition import Only, Stack
from peftcore.errors import RoutingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging import Recipe
from peftcore.merging.mixing import mixed
from peftcore.merging.sparsify import sparsified

FULL = 8
"""Rank that holds any ΔW of these layers."""


def largest(x: Tensor, count: int) -> Tensor:
    """x with all but its `count` largest elements set to zero, found by sorting."""
    bound = x.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(x.abs() >= bound, x, 0)


def check(model: Any, changes: Any, recipe: Recipe, weights: dict[str, float], formula: Any) -> None:
    """The combination is `formula` of each layer's changes, and a rank that holds all of it loses nothing."""
    report = model.add_merged("m", weights, recipe, rank=FULL)
    made = changes(model, "m")
    assert made and report.error < 1e-7
    for path, found in made.items():
        expected = formula([changes(model, name)[path] for name in weights], list(weights.values()))
        assert torch.allclose(found, expected, atol=1e-10), path
        assert expected.abs().max() > 1e-2
    model.delete_adapter("m")


@pytest.fixture
def model(linears: Any) -> Any:
    return linears(a={"lora_alpha": 6}, b={"r": 3, "use_rslora": True}, c={"r": 2})


def test_task_arithmetic_takes_away_what_has_a_negative_weight(model: Any, changes: Any) -> None:
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    check(model, changes, Recipe.task_arithmetic(0.3), weights, lambda d, w: 0.3 * (d[0] - 0.5 * d[1] + 2 * d[2]))


def test_the_average_of_an_adapter_with_itself_is_that_adapter(linears: Any, changes: Any) -> None:
    """Not half of it, whatever the weights."""
    model = linears(a={}, b={})
    model.load_state_dict(
        {k.replace("adapters.a.", "adapters.b."): v for k, v in model.state_dict().items() if ".a." in k}, strict=False
    )
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}):
        for recipe in (Recipe.linear(), Recipe.ties(density=1), Recipe.slerp(), Recipe.dare_ties(1.0)):
            check(model, changes, recipe, weights, lambda d, _w: d[0])
    check(model, changes, Recipe.model_stock(), {"a": 1, "b": 1}, lambda d, _w: d[0])


def test_linear(model: Any, changes: Any) -> None:
    check(model, changes, Recipe.linear(), {"a": 2.0, "b": 1.0}, lambda d, w: (2 * d[0] + d[1]) / 3)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 2.0, "b": 0.3, "c": 1.0}], ids=str)
def test_ties_of_the_paper(weights: dict[str, float], model: Any, changes: Any) -> None:
    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        kept = [largest(d, int(0.4 * d.numel())) for d in deltas]
        out = torch.zeros_like(kept[0])
        for place in itertools.product(*map(range, out.shape)):
            values = [float(k[place]) for k in kept]
            total = sum(v * x for v, x in zip(w, values, strict=True))
            agreeing = [(v, x) for v, x in zip(w, values, strict=True) if x * total > 0]
            if agreeing:
                out[place] = 0.7 * sum(v * x for v, x in agreeing) / sum(v for v, _ in agreeing)
        return out

    check(model, changes, Recipe.ties(density=0.4, scale=0.7), weights, formula)


def test_ties_takes_away_what_has_a_negative_weight(linears: Any, changes: Any) -> None:
    """The weight's sign stays: −2Δ divided by −2 would be Δ again."""
    check(linears(a={}), changes, Recipe.ties(density=1), {"a": -2.0}, lambda d, _w: -d[0])


def test_magnitude_pruning_over_the_whole_change_of_a_layer(model: Any, changes: Any) -> None:
    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        return sum((v * largest(d, int(0.25 * d.numel())) for d, v in zip(deltas, w, strict=True)), torch.zeros(()))

    check(model, changes, Recipe.magnitude_prune(0.25), {"a": 1.0, "b": -0.5}, formula)


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.1])
def test_breadcrumbs_drop_both_ends(gamma: float, model: Any, changes: Any) -> None:
    """Also where γ drops nothing: a slice [n:-0] would keep nothing at all."""

    def formula(deltas: list[Tensor], w: list[float]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta, v in zip(deltas, w, strict=True):
            order = delta.abs().flatten().argsort(descending=True).tolist()
            top = int(gamma * delta.numel())
            kept = torch.zeros_like(delta).flatten()
            for place in order[top : top + int(0.6 * delta.numel())]:
                kept[place] = delta.flatten()[place]
            total += v * kept.view_as(delta)
        return 0.5 * total

    check(model, changes, Recipe.breadcrumbs(0.6, gamma, scale=0.5), {"a": 1.0, "b": 2.0}, formula)


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
            adapter.lora_B /= adapter.delta_weight().norm()
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
                other.lora_A += 2 * a.lora_A[: len(other.lora_A)]
                other.lora_B += 2 * a.lora_B[:, : len(other.lora_A)]

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


# -- chance ----------------------------------------------------------------------------------------------------------


def test_dare_keeps_elements_at_random_and_divides_by_the_density() -> None:
    x = torch.arange(1.0, 20_001, dtype=torch.float64).view(100, 200)
    for density in (0.1, 0.5):
        found = sparsified(x, Recipe.dare_linear(density), torch.Generator().manual_seed(0))
        kept = found != 0
        assert torch.allclose(found[kept], x[kept] / density, rtol=1e-6)
        assert abs(kept.double().mean() - density) < 0.02
        assert abs(found.mean() / x.mean() - 1) < 0.05, "the expected change must be the whole one"


def test_della_keeps_large_elements_of_a_row_likelier_and_divides_by_the_chance() -> None:
    """p from density − ε to density + ε by the place in its own row, whatever the other rows hold."""
    row = torch.linspace(1, 2, 11, dtype=torch.float64)[torch.randperm(11, generator=torch.Generator().manual_seed(0))]
    x = torch.stack([row * -(10.0**exponent) for exponent in range(4)] * 5000)
    found = sparsified(x, Recipe.della(0.5, 0.3), torch.Generator().manual_seed(0))
    chance = 0.2 + 0.6 * (row - 1)
    share = (found != 0).double().mean(0)
    assert (share - chance).abs().max() < 0.02
    kept = found != 0
    assert torch.allclose(found[kept], (x / chance)[kept], rtol=1e-6)
    one = torch.ones(1000, 1)
    assert abs(sparsified(one, Recipe.della(0.5, 0.3), torch.Generator().manual_seed(0)).mean() - 1) < 0.1


@pytest.mark.parametrize("recipe", [Recipe.dare_ties(0.6, 0.5), Recipe.della(0.6, 0.2, 0.5)], ids=["dare", "della"])
def test_chance_comes_before_the_election(recipe: Recipe) -> None:
    torch.manual_seed(0)
    x = [torch.randn(8, 12, dtype=torch.float64) for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    again = torch.Generator().manual_seed(3)
    kept = [sparsified(own, recipe, again) for own in x]
    found = mixed(x, weights, recipe, torch.Generator().manual_seed(3))
    weighed = torch.stack([w * k for w, k in zip(weights, kept, strict=True)])
    agrees = weighed.sign() == weighed.sum(0).sign()
    n = (torch.tensor(weights).view(3, 1, 1) * agrees * (weighed != 0)).sum(0)
    expected = torch.where(n > 0, 0.5 * (weighed * agrees).sum(0) / n.clamp_min(1e-9), 0)
    assert torch.allclose(found, expected, atol=1e-7)


def test_a_seed_gives_the_same_and_another_seed_another(model: Any, changes: Any) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        torch.manual_seed(seed + len(name))
        model.add_merged(name, {"a": 1.0, "b": 1.0}, Recipe.dare_linear(0.5, seed=seed), rank=FULL)
    x, y, z = (changes(model, name)["0"] for name in "xyz")
    assert torch.equal(x, y) and not torch.allclose(x, z)
    torch.random.set_rng_state(before)


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
