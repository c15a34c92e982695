"""What the AdaMSS paper says: clusters of a weight's rows train small factors of its singular directions."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from method_example import Example, randomise
from torch import nn

import peftcore
from peftcore import CheckpointError, ConfigError, MissingExtraError, PeftModel, get_peft_model
from peftcore.methods.adamss import AdamssConfig

EXAMPLE = Example(
    AdamssConfig,
    options={"r": 4, "num_subspaces": 3},
    theirs="AdamssConfig",
    parity={
        "plain": {"r": 8, "num_subspaces": 3, "subspace_rank": 2},
        "dynamic ranks": {"r": 8, "use_dynamic_rank": True, "svd_threshold": 0.5, "subspace_rank": 3, "random_seed": 4},
    },
    families=("llama", "bert"),
)
ASA = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 7, "mask_interval": 2}


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    given = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["0", "2"], **options}
    return get_peft_model(base().double() if model is None else model, AdamssConfig(**given))


def test_each_cluster_changes_its_own_rows_within_the_singular_directions() -> None:
    net = adapted()
    weight = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    randomise(net, 0.5)
    adapter = net[0].adapters["default"]
    right = adapter.adamss_newB
    assert right.shape == (6, 13)
    torch.testing.assert_close(right @ right.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    kept = torch.linalg.svdvals(weight)[:6].square().sum()
    torch.testing.assert_close((weight @ right.T).square().sum(), kept, rtol=5e-2, atol=0)
    rows = adapter.places.argsort().split([len(b) for b in adapter.adamss_B])
    change = torch.zeros_like(weight)
    for a, b, chosen in zip(adapter.adamss_A, adapter.adamss_B, rows, strict=True):
        assert a.shape[0] == b.shape[1] == min(2, len(chosen))
        change[chosen] = b @ a @ right
    assert torch.cat(rows).sort().values.tolist() == list(range(20))
    torch.testing.assert_close(adapter.delta_weight(), change[:, :12], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.bias_change(), change[:, 12], rtol=1e-12, atol=1e-12)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = x @ (weight + change)[:, :12].T + (weight + change)[:, 12]
    torch.testing.assert_close(net[0](x), expected, rtol=1e-12, atol=1e-12)


def test_the_clusters_depend_on_the_seed_alone() -> None:
    places = []
    for draws in range(2):
        model = base().double()
        torch.rand(draws)
        places.append(adapted(model, random_seed=5)[0].adapters["default"].places)
    assert torch.equal(*places)


def test_loading_draws_nothing(tmp_path: Path) -> None:
    net = adapted(use_dynamic_rank=True)
    net.save_pretrained(tmp_path)
    plain, state = net.unload(), torch.get_rng_state()
    PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_threshold_lowers_the_ranks() -> None:
    ranks = [
        [
            len(a)
            for a in adapted(subspace_rank=4, use_dynamic_rank=True, svd_threshold=t)[0].adapters["default"].adamss_A
        ]
        for t in (1e-6, 0.5, 1.0)
    ]
    assert sum(ranks[0]) > sum(ranks[1]) and ranks[2] == [1] * 4


def test_another_base_with_other_clusters_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    other = base().double()
    nn.init.normal_(other[0].weight)
    with pytest.raises(CheckpointError, match="adamss_B"):
        PeftModel.from_pretrained(other, tmp_path)


def test_options_that_peft_lacks_are_saved_as_paths(tmp_path: Path) -> None:
    net = adapted(target_modules=r"\d", exclude_modules=["1", "2"])
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["0"]


def test_a_base_without_values_takes_clusters_from_a_state_dict_but_no_directory(tmp_path: Path) -> None:
    net = adapted()
    randomise(net, 0.5)
    net.save_pretrained(tmp_path)
    other = adapted(base().double().to("meta"))
    other.load_state_dict(net.state_dict(), assign=True)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(other(x), net(x))
    with pytest.raises(ConfigError, match="ADAMSS: 0 has no values yet to cluster its rows by; load the base first"):
        PeftModel.from_pretrained(base().to("meta"), tmp_path)


# -- adaptive subspaces -----------------------------------------------------------------------------------------------


def train(model: Any, step: Any, steps: int = 8) -> list[list[bool]]:
    """Train with SGD; return which parameters of the adapter train after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(1)
    seen = []
    for number in range(steps):
        model(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        step(number)
        optimizer.zero_grad()
        seen.append([p.requires_grad for p in parameters])
    return seen


def test_the_same_clusters_freeze_as_with_peft() -> None:
    options = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["0", "2"], **ASA}
    frozen, outputs = [], []
    for library in (peftcore, peft):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = library.get_peft_model(base(), library.AdamssConfig(**options))
        frozen.append(train(model, model.base_model.update_and_allocate))
        outputs.append(model(torch.ones(2, 12)))
    assert frozen[0] == frozen[1]
    counts = [sum(flags) // 2 for flags in frozen[0]]
    assert counts[:2] == [8, 8] and 1 <= counts[-1] <= 3 and counts == sorted(counts, reverse=True)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_training_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    whole = adapted(base(), **ASA)
    train(whole, lambda number: whole.on_optimizer_step(number + 1), steps=3)
    state, twin = whole.adapter_state(), copy.deepcopy(whole)
    assert any("adamss_B.0" in key for key in state)
    for adapter in (twin[0].adapters["default"], twin[2].adapters["default"]):
        adapter.importance = {}
        adapter.requires_grad_(True)
    twin.load_adapter_state(state)
    left = [train(m, lambda n, m=m: m.on_optimizer_step(n + 4), steps=2) for m in (whole, twin)]
    assert left[0] == left[1] and not all(left[0][-1])


def test_the_schedule_falls_from_all_to_the_target() -> None:
    options: dict[str, Any] = {"asa_target_subspaces": 4, "init_warmup": 10, "final_warmup": 20}
    config = AdamssConfig(use_asa=True, asa_schedule_exponent=1, **options)
    assert [config.trained_subspaces(step, 24) for step in (10, 15, 20)] == [24, 14, 4]


def test_options_of_parts_that_are_off_warn() -> None:
    with pytest.warns(UserWarning, match="mask_interval .* use_asa=True"):
        adapted(mask_interval=5)


def test_options_of_asa_may_be_none() -> None:
    names = ["asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta"]
    options: dict[str, Any] = dict.fromkeys([*names, "asa_uncertainty_beta", "asa_schedule_exponent"])
    assert AdamssConfig(**options) == AdamssConfig()
    assert not AdamssConfig(**options).without_effect()
    assert AdamssConfig.from_dict(peft.AdamssConfig(**options).to_dict()) == AdamssConfig()


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.errors.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"AdaMSS needs sklearn; .*peftcore\[adamss\]"):
        adapted()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"init_weights": "zero"}, "'orthogonal' or None; got 'zero'"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "below final_warmup=9; got 9"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval must be a positive integer; got 0"),
        ({"use_asa": True, "asa_schedule_exponent": 0.0}, "asa_schedule_exponent must be above 0; got 0.0"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamssConfig(**options)
