"""What the OSF paper says: the largest singular directions stay, and the others train beside them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import ConfigError, OSFConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

EXAMPLE = Example(
    OSFConfig,
    options={"effective_rank": 4},
    theirs="OSFConfig",
    parity={
        "half": {},
        "count": {"effective_rank": 24},
        "share and patterns": {"effective_rank": 0.75, "rank_pattern": {r"layers\.1\.": 0.5, "query": 28}},
    },
    families=("llama", "bert", "t5"),
    spread=0.1,
)
KEPT = 3
SHAPES = pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 6)], ids=str)


def net(shape: tuple[int, int] = (8, 6), **options: Any) -> tuple[Any, Tensor]:
    """Return a layer of this weight shape with OSF, and its weight."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    weight = base[0].weight.detach().clone()
    return get_peft_model(base, OSFConfig(**{"target_modules": ["0"], "effective_rank": KEPT, **options})), weight


def train(model: Any, steps: int = 20) -> None:
    x = torch.randn(10, model[0].in_features, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()


@SHAPES
def test_training_keeps_the_largest_singular_directions(shape: tuple[int, int]) -> None:
    """A step of gradient descent moves U and V, but never into U_h and V_h: W' still maps V_h to S_h U_h."""
    model, weight = net(shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    train(model)
    adapter = model[0].adapters["default"]
    assert (adapter.delta_weight().norm() / weight.norm()) > 0.05
    close = {"rtol": 1e-5, "atol": 1e-5}  # the start is computed in float32, as in PEFT
    trained = adapter.merged_weight(weight)
    torch.testing.assert_close(u[:, :KEPT].T @ trained @ v[:KEPT].T, torch.diag(s[:KEPT]), **close)
    torch.testing.assert_close(u[:, :KEPT].T @ adapter.osf_U_low, torch.zeros(KEPT, 3, dtype=torch.float64), **close)
    torch.testing.assert_close(adapter.osf_V_low @ v[:KEPT].T, torch.zeros(3, KEPT, dtype=torch.float64), **close)


@SHAPES
def test_gradients_are_the_plain_ones_without_their_part_in_the_kept_directions(shape: tuple[int, int]) -> None:
    model, weight = net(shape)
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    randomise(model, 0.1)
    adapter, x = model[0].adapters["default"], torch.randn(4, shape[1], dtype=torch.float64)
    model(x).square().sum().backward()
    plain = [p.detach().clone().requires_grad_() for p in (adapter.osf_U_low, adapter.osf_S_low, adapter.osf_V_low)]
    change = (plain[0] * plain[1]) @ plain[2] - (adapter.start_U * adapter.start_S) @ adapter.start_V
    (x @ (weight + change).T + model[0].base_layer.bias).square().sum().backward()
    of_u, of_s, of_v = (p.grad for p in plain)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(adapter.osf_U_low.grad, of_u - u[:, :KEPT] @ (u[:, :KEPT].T @ of_u), **close)
    torch.testing.assert_close(adapter.osf_S_low.grad, of_s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.osf_V_low.grad, of_v - (of_v @ v[:KEPT].T) @ v[:KEPT], **close)


def test_training_gives_pefts_weights() -> None:
    options: dict[str, Any] = {"effective_rank": 0.5, "rank_pattern": {"lin1": 2}, "target_modules": ["lin0", "lin1"]}
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("lin0", nn.Linear(10, 20))
    base.add_module("lin1", nn.Linear(20, 12))
    base.double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OSFConfig(**options))
    ours = get_peft_model(base, OSFConfig(**options))
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(4):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(6, 10, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    expected = peft.get_peft_model_state_dict(theirs)
    for key, tensor in ours.get_adapter_state_dict().items():
        torch.testing.assert_close(tensor, expected[f"base_model.model.{key}"], rtol=1e-10, atol=1e-10)


def test_a_change_that_16_bits_can_hold_is_not_lost_between_two_large_products() -> None:
    """ΔW = U S V − U₀ S₀ V₀ is small beside its parts, whose rounding in bfloat16 would be larger than ΔW."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    model: Any = get_peft_model(base, OSFConfig(target_modules=["0"], effective_rank=8))
    x = torch.randn(20, 64).bfloat16()
    adapter = model[0].adapters["default"]
    zero = torch.zeros(20, 64).bfloat16()
    assert torch.equal(adapter.after(x, zero), zero)
    randomise(model, 1e-4)
    wanted = x.float() @ adapter.delta_weight().T
    assert (adapter.after(x, zero).float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"effective_rank": None}, [5, 6]),
        ({"effective_rank": 4}, [4, 4]),
        ({"effective_rank": 0.3}, [3, 3]),
        ({"effective_rank": 1.0, "rank_pattern": {"in1": 1, "lin": 0.5}}, [5, 1]),
    ],
)
def test_the_rank_is_a_count_or_a_share_and_patterns_are_searched_for(options: dict[str, Any], kept: list[int]) -> None:
    base = nn.ModuleDict({"lin0": nn.Linear(10, 20), "lin1": nn.Linear(20, 13)})
    model: Any = get_peft_model(base, OSFConfig(target_modules=["lin0", "lin1"], **options))
    assert [model[name].effective_rank["default"] for name in base] == kept
    assert [len(model[name].adapters["default"].osf_S_low) for name in base] == [10 - kept[0], 13 - kept[1]]


def test_a_layer_whose_directions_all_stay_is_a_warning_and_can_be_saved(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 2))
    with pytest.warns(UserWarning, match="effective_rank=2 keeps all directions of 1, so nothing trains there"):
        model = get_peft_model(copy.deepcopy(base), OSFConfig(target_modules=["0", "1"], effective_rank=4))
    randomise(model, 0.1)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    with pytest.warns(UserWarning, match="nothing trains there"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), model(x)) and not torch.equal(model(x), base(x))


def test_the_start_is_that_of_the_base_without_merges() -> None:
    model, _ = net()
    randomise(model, 0.3)
    model.merge_adapter()
    model.add_adapter("other", OSFConfig(target_modules=["0"], effective_rank=KEPT))
    first, other = model[0].adapters["default"], model[0].adapters["other"]
    assert torch.equal(first.start_U, other.start_U) and torch.equal(first.start_S, other.start_S)


def test_default_targets() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), OSFConfig())
    assert model.peft_config["default"].target_modules == {"0", "2"}
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    llama = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)), OSFConfig())
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert llama.peft_config["default"].target_modules == projections


def test_an_option_without_effect_in_peft_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="target_svd_config has no effect, as in HF PEFT; give rank_pattern"):
        OSFConfig(target_svd_config={"0.weight": 3})


@pytest.mark.parametrize("rank", [0, -2, True])
def test_impossible_ranks(rank: Any) -> None:
    for options in ({"effective_rank": rank}, {"rank_pattern": {"0": rank}}):
        with pytest.raises(ConfigError, match=r"positive|must be"):
            OSFConfig(**options)


def test_parameters_have_the_names_by_which_scripts_group_them_for_the_optimizer() -> None:
    model, _ = net()
    base = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 8)), peft.OSFConfig(target_modules=["0"], effective_rank=KEPT)
    )
    for part in ("U_low", "S_low", "V_low"):
        ours, theirs = ([p.shape for n, p in one.named_parameters() if part in n] for one in (model, base))
        assert ours == theirs and ours
