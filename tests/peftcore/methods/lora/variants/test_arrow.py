"""Arrow: the router's output equals the weighted sum of the LoRAs that its paper defines."""

import copy
import pickle
from typing import Any

import pytest
import torch
from quantised_layers import quantised
from replicas import replicas
from torch import Tensor, nn

from peftcore import ArrowConfig, ConfigError, IA3Config, LoraConfig, MergeError, get_peft_model
from peftcore.errors import RoutingError
from peftcore.kernels.arrow import iterated_prototype


def routed(names: str = "abc", *, rank: int = 2, router: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a model with LoRAs of these names, and an active router over them."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 8))
    plain = {"r": rank, "target_modules": ["0"], "init_lora_weights": False}
    for number, name in enumerate(names.split() if " " in names else names):
        config = LoraConfig(**plain, lora_alpha=number + 1)
        if number:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    arrow = ArrowConfig(**{"rng_seed": 3, "top_k": 2, **options})
    model.add_adapter("router", LoraConfig(r=2, target_modules=["0"], arrow_config=arrow, **(router or {})))
    model.set_adapter("router")
    return model.eval()


def part(model: Any, name: str) -> Any:
    return model[0].adapters[name]


def expected(model: Any, x: Tensor, names: str, top_k: int, temperature: float, general: str = "") -> Tensor:
    """Return the output by the definition, one expert after another."""
    mean_a = sum(part(model, name).lora_A_weight for name in general) / max(1, len(general))
    mean_b = sum(part(model, name).lora_B_weight for name in general) / max(1, len(general))
    scores, changes = [], []
    for name in names:
        lora = part(model, name)
        a, b = lora.lora_A_weight - mean_a, lora.lora_B_weight - mean_b
        start = torch.randn(12, generator=torch.Generator().manual_seed(3))
        scores.append((x @ iterated_prototype(a, b, start)).abs())
        changes.append(lora.scaling * x @ (b @ a).T)
    score = torch.stack(scores, -1)
    score = score.masked_fill(score < score.topk(top_k, -1)[0][..., -1:], -torch.inf)
    weights = (score / temperature).softmax(-1)
    return model[0].base_layer(x) + (weights[..., None, :] * torch.stack(changes, -1)).sum(-1)


RANDOM: dict[str, Any] = {"r": 2, "init_lora_weights": False}
X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (2, 0.3), (3, 2.0)])
def test_the_output_is_that_of_the_definition(top_k: int, temperature: float) -> None:
    model = routed(top_k=top_k, router_temperature=temperature)
    for x in (X, X[0], X[0, 0]):
        torch.testing.assert_close(model(x), expected(model, x, "abc", top_k, temperature), rtol=1e-5, atol=1e-5)


def test_general_adapters_are_subtracted_and_no_adapter_changes() -> None:
    model = routed("a b gks_0 gks_1", use_gks=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    general = ["gks_0", "gks_1"]
    torch.testing.assert_close(model(X), expected(model, X, "ab", 2, 1.0, general), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    named = routed("abg", use_gks=True)
    part(named, "router").config.arrow_config["gks_adapter_names"] = ["g"]
    torch.testing.assert_close(named(X), expected(named, X, "ab", 2, 1.0, "g"), rtol=1e-5, atol=1e-5)
    without = routed("a b gks_0")
    torch.testing.assert_close(without(X), expected(without, X, "ab", 2, 1.0), rtol=1e-5, atol=1e-5)


def test_loras_that_come_and_go_change_what_the_router_chooses_from() -> None:
    model = routed("ab")
    model(X)
    model.add_adapter("c", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    torch.testing.assert_close(model(X), expected(model, X, "abc", 2, 1.0), rtol=1e-5, atol=1e-5)
    model.delete_adapter(["a", "b"])
    torch.testing.assert_close(model(X), expected(model, X, "c", 1, 1.0), rtol=1e-5, atol=1e-5)
    model.delete_adapter("c")
    with pytest.raises(RoutingError, match="Arrow at 0: there is no LoRA to route to"):
        model(X)


def test_weights_that_have_changed_are_followed_and_prototypes_are_kept() -> None:
    model = routed(rng_seed=None)
    first = model(X)
    state = torch.get_rng_state()
    assert torch.equal(model(X), first)
    with torch.no_grad():
        for lora in (part(model, "a"), part(model, "b")):
            lora.lora_A_weight.copy_(torch.randn(2, 12, generator=torch.Generator().manual_seed(5)))
    second = model(X)
    assert not torch.allclose(second, first)
    assert torch.equal(torch.get_rng_state(), state), "a new prototype begins at the vector of the last one"


def test_gradients_reach_the_experts_and_the_input() -> None:
    model, x = routed(), X.clone().requires_grad_()
    assert not any(p.requires_grad for p in model.parameters())
    part(model, "a").requires_grad_(True)
    with torch.inference_mode():
        model(X)
    model(x).square().sum().backward()
    assert part(model, "a").lora_A_weight.grad.abs().sum() > 0 and x.grad is not None
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(X), model(X))
    with torch.no_grad():
        part(copied, "a").lora_B_weight.zero_()
    assert not torch.equal(copied(X), model(X))


def test_a_replica_uses_its_own_loras() -> None:
    model = routed()
    layer, y = model[0], model(X)
    replica = replicas(layer)[0]
    with torch.no_grad():
        assert torch.equal(replica(X), y)
        for name in "abc":
            part(model, name).lora_B_weight.zero_()
        assert torch.equal(replica(X), y)


def test_rows_with_other_adapters_and_sums_of_the_router() -> None:
    model = routed()
    with torch.no_grad():
        mixed = model(X, adapter_names=["router", "a", "__base__"])
        torch.testing.assert_close(mixed[:1], expected(model, X[:1], "abc", 2, 1.0), rtol=1e-5, atol=1e-5)
        assert torch.equal(mixed[2:], model[0].base_layer(X[2:]))
        half = model(X, adapter_names={"router": 0.5})
    torch.testing.assert_close(half, (model(X) + model[0].base_layer(X)) / 2, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_routers_output() -> None:
    model = routed(router={"lora_dropout": 0.5})
    change = model(X) - model[0].base_layer(X)
    model.train()
    dropped = model(X) - model[0].base_layer(X)
    kept = dropped.abs() > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * change[kept], rtol=1e-4, atol=1e-5)


def test_half_types_compute_the_weights_in_the_type_of_the_loras() -> None:
    model = routed()
    y = model(X)
    model[0].base_layer.to(torch.bfloat16)
    half = model(X.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_compiled_model_routes_too() -> None:
    model = routed()
    y = model(X)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), y)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"alora_invocation_tokens": [1]}, {"bias": "lora_only"}],
    ids=str,
)
def test_a_variant_of_lora_is_no_expert(options: dict[str, Any]) -> None:
    model = routed("ab")
    model.add_adapter("c", LoraConfig(r=2, target_modules=["0"], **options))
    with pytest.raises(RoutingError, match="Arrow routes plain LoRAs; 'c' at 0 is a variant"):
        model(X)


def test_the_base_may_be_quantised() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(quantised("nf4")), LoraConfig(target_modules=["0"], **RANDOM), "a")
    model.add_adapter("router", LoraConfig(target_modules=["0"], arrow_config=ArrowConfig()))
    x = torch.randn(5, 64)
    with torch.no_grad():
        alone = model.eval()(x)
        model.set_adapter("router")
        torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-5)  # the only expert has the weight 1


def test_what_cannot_be_routed_is_refused() -> None:
    model = routed()
    with pytest.raises(MergeError, match="Arrow weights other LoRAs for each token"):
        model.merge_adapter()
    with pytest.raises(RoutingError, match="use_gks=True subtracts general adapters, and none is loaded"):
        routed(use_gks=True)(X)
    model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    torch.testing.assert_close(model(X), expected(model, X, "abc", 2, 1.0), rtol=1e-5, atol=1e-5)
    ranks = routed("a gks_0", use_gks=True)
    ranks.add_adapter("b", LoraConfig(r=3, target_modules=["0"]))
    with pytest.raises(RoutingError, match="use_gks=True needs LoRAs of one rank"):
        ranks(X)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arrow_config": {"top_k": 0}}, "top_k must be at least 1; got 0"),
        ({"arrow_config": {"router_temperature": 0.0}}, "router_temperature must be above 0"),
        ({"arrow_config": {"topk": 2}}, "arrow_config has no 'topk'; did you mean 'top_k'"),
        ({"arrow_config": {}, "use_dora": True}, "exclude each other"),
        ({"arrow_config": {}, "lora_bias": True}, "exclude each other"),
        ({"arrow_config": {}, "init_lora_weights": "pissa"}, "has no meaning with arrow_config"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**{"target_modules": ["0"], **options})


def test_a_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="arrow_config does not fit 0, a conv layer"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(target_modules=["0"], arrow_config=ArrowConfig()))
