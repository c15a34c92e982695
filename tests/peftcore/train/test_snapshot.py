"""A snapshot holds all that training changes, and can be restored any number of times."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.snapshot import Snapshot

ADALORA: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 20}


class Scaler:
    """The state of a loss scale."""

    def __init__(self) -> None:
        self.scale = 1024.0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


def training(method: str = "lora", scaler: Any = None) -> Any:
    """What a snapshot reads of a trainer: a model in training, its optimiser and schedule."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"target_modules": ["0", "1"], "init_lora_weights": False}
    config = LoraConfig(r=2, **common) if method == "lora" else AdaLoraConfig(**ADALORA, **common)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return SimpleNamespace(
        adapted_model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(scaler=scaler),
    )


def step(made: Any) -> None:
    """One optimiser step with the data of its number."""
    made.state.global_step += 1
    torch.manual_seed(made.state.global_step)
    made.adapted_model(torch.randn(8, 6)).square().mean().backward()
    made.optimizer.step()
    made.adapted_model.on_optimizer_step(made.state.global_step, made.optimizer)
    made.lr_scheduler.step()
    made.optimizer.zero_grad()


def everything(made: Any) -> dict[str, Tensor]:
    """Weights, adapter state, moments and learning rate, by name."""
    model, optimizer = made.adapted_model, made.optimizer
    state = {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"adapters/{name}": tensor.clone() for name, tensor in model.adapter_state().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{number}/{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    return state | {"lr": torch.tensor(made.lr_scheduler.get_last_lr())}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_restored_run_goes_on_as_if_nothing_had_been_in_between(method: str) -> None:
    made = training(method)
    for _ in range(2):
        step(made)
    snapshot, before = Snapshot.of(made), everything(made)
    assert snapshot.step == 2
    runs = []
    for _ in range(3):  # each from the same snapshot
        for _ in range(2):
            step(made)
        runs.append(everything(made))
        snapshot.restore(made)
        made.state.global_step = snapshot.step
        assert_equal(everything(made), before)
    assert any(not torch.equal(before[name], runs[0][name]) for name in before if "lora_A" in name)
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


def test_a_snapshot_shares_no_memory_with_the_run() -> None:
    made = training()
    step(made)
    snapshot = Snapshot.of(made)
    kept = copy.deepcopy(snapshot)
    step(made)
    snapshot.restore(made)
    step(made)
    assert_equal(snapshot.weights, kept.weights)
    for number, moments in snapshot.optimizer["state"].items():
        assert_equal(moments, kept.optimizer["state"][number])


def test_only_what_trains_is_copied_and_the_rest_stays_as_it_is() -> None:
    made = training()
    snapshot = Snapshot.of(made)
    assert all("lora_" in name for name in snapshot.weights) and len(snapshot.weights) == 4
    base = made.adapted_model[0].base_layer.weight
    with torch.no_grad():
        base.add_(1)
    changed = base.clone()
    snapshot.restore(made)
    assert torch.equal(base, changed)


def test_parameters_that_were_pruned_have_their_earlier_shape_again_and_no_gradient() -> None:
    made = training("adalora")
    step(made)
    snapshot = Snapshot.of(made)
    adapter: Any = adapter_set(made.adapted_model).adapters("default")["0"]
    parameter, values = adapter.lora_A_weight, adapter.lora_A_weight.detach().clone()
    parameter.data = parameter.data[:1].clone()
    parameter.grad = torch.ones(1, 6)
    snapshot.restore(made)
    assert adapter.lora_A_weight is parameter and torch.equal(parameter, values) and parameter.grad is None


def test_the_loss_scale_of_float16_is_restored() -> None:
    made = training(scaler=Scaler())
    snapshot = Snapshot.of(made)
    made.accelerator.scaler.scale = 1.0
    snapshot.restore(made)
    assert made.accelerator.scaler.scale == 1024.0
    assert Snapshot.of(training()).scaler is None
