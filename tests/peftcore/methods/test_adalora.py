"""What the AdaLoRA paper says: scores, budget, allocation, regulariser; and that it learns with plain calls."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example
from quantised_layers import quantised
from torch import nn

from peftcore import (
    AdaLoraConfig,
    ConfigError,
    PeftConfig,
    PeftModel,
    TrainingError,
    get_peft_model,
    set_peft_model_state_dict,
)
from peftcore.injection.adapter_set import adapter_set

EXAMPLE = Example(
    AdaLoraConfig,
    options={"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 12},
    theirs="AdaLoraConfig",
    parity={"plain": {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 16}},
    families=("gpt2", "llama", "t5"),
)


def config(**options: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 20, "deltaT": 1}
    return AdaLoraConfig(**{"target_modules": ["0", "1"], "lora_alpha": 8, **defaults, **options})


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7)).double(), config(**options))


def layers(model: Any) -> list[Any]:
    return list(adapter_set(model).adapters("default").values())


def train(model: Any, steps: int, first: int = 1, prune: bool = False) -> torch.optim.Optimizer:
    torch.manual_seed(1)
    x, y = torch.randn(64, 10, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(first, first + steps):
        loss = (model(x) - y).square().mean() + model.adapter_regularizer()
        loss.backward()
        optimizer.step()
        model.on_optimizer_step(step, optimizer if prune else None)
        optimizer.zero_grad()
    return optimizer


def test_budget_schedule() -> None:
    c, n = config(tinit=4, tfinal=6, total_step=30), 5
    assert [c.budget(t, n) for t in (1, 4)] == [30, 30]
    assert [c.budget(t, n) for t in (24, 27, 30, 99)] == [10] * 4
    for t in range(5, 24):
        assert c.budget(t, n) == 10 + int(20 * (1 - (t - 4) / (30 - 4 - 6)) ** 3)
    budgets = [c.budget(t, n) for t in range(1, 31)]
    assert budgets == sorted(budgets, reverse=True)


def test_scores_follow_the_paper() -> None:
    """Ī and Ū by hand over three steps, with the gradients that the allocator saw."""
    model = net(target_r=6)  # no pruning, only scores
    adapter = layers(model)[0]
    torch.manual_seed(3)
    mean = {
        n: torch.zeros_like(getattr(adapter, n)).float() for n in ("lora_A_weight", "lora_B_weight", "lora_E_weight")
    }
    spread = copy.deepcopy(mean)
    for step in (1, 2, 3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        for n in mean:
            p = getattr(adapter, n)
            now = (p.detach() * p.grad).float().abs()
            mean[n] = 0.85 * mean[n] + 0.15 * now
            spread[n] = 0.85 * spread[n] + 0.15 * (now - mean[n]).abs()
        model.on_optimizer_step(step)
    s = {n: mean[n] * spread[n] for n in mean}
    expected = s["lora_E_weight"][:, 0] + s["lora_B_weight"].mean(0) + s["lora_A_weight"].mean(1)
    torch.testing.assert_close(adapter.scores(), expected)


def test_the_budget_is_kept_exactly_and_masked_triplets_may_come_back() -> None:
    model = net()
    seen: list[list[bool]] = []
    torch.manual_seed(5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 21):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        model.on_optimizer_step(step)
        kept = torch.cat([a.kept for a in layers(model)])
        if step > 2:
            assert int(kept.sum()) == config().budget(step, 2)
            zero = torch.cat([a.lora_E_weight.flatten() == 0 for a in layers(model)])
            assert torch.equal(zero, ~kept)
        seen.append(kept.tolist())
    steps = itertools.pairwise(seen)
    came_back = any(now and not before for a, b in steps for before, now in zip(a, b, strict=True))
    assert came_back, "a masked triplet still gets gradients and may return"
    assert seen[-1] == seen[16], "after the final step the mask stays"


def test_the_final_budget_is_reached_though_its_step_was_skipped() -> None:
    """An overflow of fp16 or a resumed run may leave out the very step at which the budget becomes final."""
    model = net()
    train(model, 8)
    assert sum(int(a.kept.sum()) for a in layers(model)) > 4
    train(model, 1, first=19, prune=True)
    assert [sum(int(a.kept.sum()) for a in layers(model)), sum(len(a.lora_E_weight) for a in layers(model))] == [4, 4]
    kept = [a.kept.clone() for a in layers(model)]
    train(model, 1, first=20)
    assert all(torch.equal(a.kept, mask) for a, mask in zip(layers(model), kept, strict=True))


def test_a_step_looks_at_the_adapters_and_at_no_other_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    train(model, 3)

    def scan(*_: Any, **__: Any) -> Any:
        raise AssertionError("every parameter of the model is scanned")

    for name in ("named_parameters", "parameters", "named_modules", "modules"):
        monkeypatch.setattr(nn.Module, name, scan)
    for step in range(4, 21):
        model.on_optimizer_step(step)


def test_ties_do_not_prune_too_much() -> None:
    model = net(tinit=0, tfinal=0, total_step=5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # every score equal
    for step in (1, 2, 3, 4, 5):
        model.on_optimizer_step(step)
    kept = [int(a.kept.sum()) for a in layers(model)]
    assert sum(kept) == 4 and kept == [4, 0], "the earlier layer wins a tie; a layer may end with rank 0"
    x = torch.randn(2, 10, dtype=torch.float64)
    masked = model(x)
    layers(model)[1]._prune(torch.optim.SGD([layers(model)[1].lora_A_weight], lr=1.0))
    assert len(layers(model)[1].lora_E_weight) == 0
    torch.testing.assert_close(model(x), masked)


def test_regularizer_is_squared_and_averaged_over_matrices() -> None:
    model = net()
    terms = []
    for a in layers(model):
        eye = torch.eye(6, dtype=torch.float64)
        terms += [
            (a.lora_B_weight.T @ a.lora_B_weight - eye).norm() ** 2,
            (a.lora_A_weight @ a.lora_A_weight.T - eye).norm() ** 2,
        ]
    torch.testing.assert_close(model.adapter_regularizer(), 0.5 * torch.stack(terms).mean())
    assert net(orth_reg_weight=0.0).adapter_regularizer() is None


def test_saved_adapter_is_small_and_computes_the_same(tmp_path: Any) -> None:
    model = net()
    train(model, 20)
    x = torch.randn(5, 10, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7)).double()
    plain.load_state_dict(copy.deepcopy(model).unload().state_dict())
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(len(a.lora_E_weight) for a in layers(loaded)) == 4
    assert model.peft_config["default"].rank_pattern is None, "saving changes no configuration in memory"


def after_peft(steps: int = 20) -> Any:
    """HF peft's model, its allocator called by hand."""
    torch.manual_seed(0)
    options = {f.name: getattr(config(), f.name) for f in dataclasses.fields(config()) if f.name in PASSED}
    hf = peft.get_peft_model(nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7)), peft.AdaLoraConfig(**options))
    torch.manual_seed(1)
    x, y = torch.randn(64, 10), torch.randn(64, 7)
    optimizer = torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        (hf.base_model.model(x) - y).square().mean().backward()
        optimizer.step()
        hf.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return hf.eval()


PASSED = {"init_r", "target_r", "tinit", "tfinal", "total_step", "deltaT", "target_modules", "lora_alpha"}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_directories_of_a_pruned_adapter_are_pefts_both_ways(tmp_path: Any) -> None:
    """`rank_pattern` holds a mask for each layer, and the tensors on disk are already that small."""
    hf, x = after_peft(), torch.randn(5, 10)
    hf.save_pretrained(tmp_path / "hf")
    saved: Any = PeftConfig.from_pretrained(tmp_path / "hf")
    assert sum(sum(mask) for mask in saved.rank_pattern.values()) == 4
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 7))
    state = {k.removeprefix("base_model.model."): v for k, v in hf.state_dict().items() if "base_layer" in k}
    plain.load_state_dict({k.replace("base_layer.", ""): v for k, v in state.items()})
    here = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "hf")
    torch.testing.assert_close(here(x), hf(x), rtol=1e-5, atol=1e-5)
    assert sorted(len(a.lora_E_weight) for a in layers(here)) == sorted(map(sum, saved.rank_pattern.values()))

    ours = get_peft_model(copy.deepcopy(plain), config())
    train_in_float32(ours)
    ours.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(there(x), ours(x), rtol=1e-5, atol=1e-5)
    assert (ours(x) - plain(x)).abs().max() > 1e-3


def train_in_float32(model: Any) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(64, 10), torch.randn(64, 7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 21):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.on_optimizer_step(step)
        optimizer.zero_grad()


def test_pruning_shrinks_tensors_and_moments_and_changes_nothing_computed() -> None:
    masked, pruned = net(), net()
    train(masked, 17)  # the step at which the budget is final
    optimizer = train(pruned, 17, prune=True)
    x = torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-6, atol=1e-6)
    assert sum(len(a.lora_E_weight) for a in layers(pruned)) == 4
    for a in layers(pruned):
        assert optimizer.state[a.lora_A_weight]["exp_avg"].shape == a.lora_A_weight.shape
    train(pruned, 3, first=18, prune=True)  # goes on training


@pytest.mark.parametrize("stop", [1, 7, 18])
def test_training_state_resumes_the_allocator(stop: int, tmp_path: Any) -> None:
    whole = net()
    train(whole, stop)
    state = {k: v.clone() for k, v in whole.adapter_state().items()}
    whole.save_pretrained(tmp_path)
    resumed = net()
    resumed.load_adapter_state(state)
    for model in (whole, resumed):
        train(model, 3, first=stop + 1)  # fresh optimisers for both: the allocator alone is compared
    for a, b in zip(layers(whole), layers(resumed), strict=True):
        assert (
            torch.equal(a.kept, b.kept)
            and torch.equal(a.lora_A_weight, b.lora_A_weight)
            and torch.equal(a.lora_E_weight, b.lora_E_weight)
        )


def test_a_target_above_the_start_keeps_every_triplet_as_hf_peft_does_without_allocation() -> None:
    with pytest.warns(UserWarning, match="target_r=8 exceeds init_r=4"):
        options = AdaLoraConfig(init_r=4, target_r=8, total_step=10)
    assert {options.budget(step, 2) for step in range(11)} == {8}


def test_impossible_options() -> None:
    with pytest.raises(ConfigError, match="below total_step=10"):
        AdaLoraConfig(tinit=5, tfinal=5, total_step=10)
    with pytest.raises(TrainingError, match="total_step"):
        net(total_step=None).on_optimizer_step(1)
    with pytest.raises(ConfigError, match="0 is a convolution with groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), AdaLoraConfig(target_modules=["0"]))


def test_options_of_lora_without_effect_say_so() -> None:
    with pytest.warns(
        UserWarning, match="init_lora_weights='pissa' has no effect, because AdaLoRA always starts at zero"
    ):
        AdaLoraConfig(init_lora_weights="pissa", total_step=9)
    with pytest.warns(UserWarning, match="r=10 has no effect; set init_r"):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), config(r=10, target_modules=["0"], init_r=3, target_r=2))
    adapter = adapter_set(model).adapters("default")["0"]
    assert adapter.rank == 3 and "init_r=3" in repr(model) and " r=" not in repr(model)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 2, padding=1), nn.Linear(3, 4)], ids=["Conv2d", "Linear"])
def test_a_convolution_computes_what_peft_does(layer: nn.Module) -> None:
    options: dict[str, Any] = {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["0"]}
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peft.AdaLoraConfig(**options, init_lora_weights=False)
    )
    ours = get_peft_model(nn.Sequential(layer), AdaLoraConfig(**options))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    x = torch.randn(2, 3, 5, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(
        ours[0].get_delta_weight("default"), theirs.base_model.model[0].get_delta_weight("default")
    )


@pytest.mark.parametrize("storage", ["nf4", "nf4+double", "int8"])
@pytest.mark.parametrize("pruned", [False, True])
def test_merges_into_a_quantised_base_masked_and_pruned(storage: str, pruned: bool) -> None:
    """Into what is stored afterwards goes dequant(W) + ΔW, rounded as that storage rounds; unmerging is exact."""
    torch.manual_seed(0)
    base = nn.Sequential(quantised(storage))
    model = get_peft_model(base, config(target_modules=["0"], init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 18):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        model.on_optimizer_step(step, optimizer if pruned else None)
    (adapter,) = layers(model)
    assert len(adapter.lora_E_weight) == (2 if pruned else 6) and int(adapter.kept.sum()) == 2
    wanted = adapter.base.read().float() + adapter.delta_weight().detach()
    before = {name: value.clone() for name, value in base.state_dict().items() if isinstance(value, torch.Tensor)}
    model.merge_adapter()
    error = (adapter.base.read() - wanted).abs().max() / wanted.abs().max()
    assert error < (0.02 if storage == "int8" else 0.2) < (adapter.delta_weight().abs().max() / wanted.abs().max())
    model.unmerge_adapter()
    after = {name: value for name, value in base.state_dict().items() if name in before}
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_pruning_takes_moments_of_eight_bits_along() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(2048, 8), nn.Linear(8, 2048))
    model = get_peft_model(wide, config())
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 21):
        model(torch.randn(4, 2048)).square().mean().backward()
        optimizer.step()
        model.on_optimizer_step(step, optimizer)
        optimizer.zero_grad()
    assert sum(len(a.lora_E_weight) for a in layers(model)) == 4
    for a in layers(model):
        for name in ("lora_A_weight", "lora_B_weight", "lora_E_weight"):
            assert optimizer.state[getattr(a, name)]["state1"].shape == getattr(a, name).shape


def test_a_convolution_means_what_it_means_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(2, 6, 9, 9)
    options = {"init_r": 4, "target_r": 2, "total_step": 10}
    agrees_with_peft(layer, x, "AdaLoraConfig", AdaLoraConfig, options, tmp_path)
