"""Hooks on an output head: it computes supervised positions only, or their losses, and is as before afterwards."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import LoraConfig, TrainingError, get_peft_model
from peftcore.detection.head import LogitTransform
from peftcore.layers.forward_paths import contiguous_input
from peftcore.train.head_hooks import HeadHooks, flat_indices, plain_linear

WIDTH, VOCABULARY = 4, 7
MASK = torch.tensor([[False, True, False], [True, False, True]])
TARGETS = torch.tensor([3, 0, 6])


class Model(nn.Module):
    """A head behind given hidden states, with what a model may do to the head's product."""

    def __init__(self, scale: float = 1.0, calls: int = 1, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.head: Any = nn.Linear(WIDTH, VOCABULARY, bias).double()
        self.scale, self.calls = scale, calls

    def forward(self, hidden: Tensor) -> Any:
        for _ in range(self.calls):
            logits = self.head(hidden)
        return SimpleNamespace(logits=logits * self.scale)


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, WIDTH, dtype=torch.float64)


def own_losses(model: Model, hidden: Tensor) -> Tensor:
    """Losses from all logits."""
    return F.cross_entropy(model(hidden).logits[MASK], TARGETS, reduction="none")


# -- positions --------------------------------------------------------------------------------------------------------


def test_indices_count_the_virtual_tokens_before_the_text() -> None:
    assert flat_indices(MASK, torch.zeros(2, 3, WIDTH)).tolist() == [1, 3, 5]
    assert flat_indices(MASK, torch.zeros(2, 5, WIDTH)).tolist() == [3, 7, 9]  # two virtual tokens
    with pytest.raises(TrainingError, match="logits of 1 positions for 3 labels"):
        flat_indices(MASK, torch.zeros(2, 1, WIDTH))


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_without_targets_the_head_computes_the_supervised_rows(hidden: Tensor) -> None:
    model = Model(scale=3.0)
    hooks = HeadHooks(model.head, MASK, None, None)
    found = hooks.result(hooks.run(model, {"hidden": hidden}))
    assert found is not None and found.losses is None
    torch.testing.assert_close(found.logits, model(hidden).logits[MASK])


@pytest.mark.parametrize("bias", [False, True])
def test_with_a_known_transform_losses_and_gradients_need_no_logits(bias: bool, hidden: Tensor) -> None:
    model = Model(scale=3.0, bias=bias)
    parameters = list(model.parameters())
    hooks = HeadHooks(model.head, MASK, TARGETS, LogitTransform(scale=3.0))
    output = hooks.run(model, {"hidden": hidden.requires_grad_()})
    assert output.logits.shape == (1, 0, VOCABULARY)
    found, expected = hooks.result(output), own_losses(model, hidden)
    assert found is not None and found.losses is not None
    torch.testing.assert_close(found.losses.double(), expected)
    slopes = torch.autograd.grad(found.losses.sum(), [hidden, *parameters])
    for ours, theirs in zip(slopes, torch.autograd.grad(expected.sum(), [hidden, *parameters]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_probes_are_the_first_and_the_last_supervised_row_times_growing_factors(hidden: Tensor) -> None:
    model = Model(bias=False)
    hooks = HeadHooks(model.head, MASK, TARGETS, None, probes=True)
    output = hooks.run(model, {"hidden": hidden})
    ends = F.linear(hidden[MASK][[0, -1]], model.head.weight)
    assert hooks.product is not None and not hooks.product.requires_grad
    torch.testing.assert_close(hooks.product, torch.cat([ends * factor for factor in (1, 8, 64, 512)]))
    torch.testing.assert_close(output.logits[0], hooks.product)


def test_a_head_that_is_called_twice_gives_no_result(hidden: Tensor) -> None:
    model = Model(calls=2)
    hooks = HeadHooks(model.head, MASK, None, None)
    assert hooks.result(hooks.run(model, {"hidden": hidden})) is None


@pytest.mark.parametrize("shape", [(6, WIDTH), (3, 3, WIDTH)], ids=["flattened", "other rows"])
def test_states_that_are_not_rows_of_the_batch_are_left_alone(shape: tuple[int, ...]) -> None:
    model = Model()
    hooks, states = HeadHooks(model.head, MASK, None, None), torch.randn(shape, dtype=torch.float64)
    output = hooks.run(model, {"hidden": states})
    assert torch.equal(output.logits, model(states).logits) and hooks.result(output) is None


def test_the_hooks_are_removed_after_an_error_too(hidden: Tensor) -> None:
    model = Model()

    def fail(*_: Any) -> None:
        assert model.head._forward_pre_hooks
        raise OSError("disk")

    with model.head.register_forward_hook(fail), pytest.raises(OSError, match="disk"):
        HeadHooks(model.head, MASK, TARGETS, None, probes=True).run(model, {"hidden": hidden})
    assert not model.head._forward_pre_hooks and not model.head._forward_hooks


def test_a_head_of_another_type_than_its_input_computes_by_itself() -> None:
    """Without autocast its own forward is an error, and not a silent cast."""
    model = Model()
    hooks = HeadHooks(model.head, MASK, TARGETS, LogitTransform())
    with pytest.raises(RuntimeError, match="dtype"):
        hooks.run(model, {"hidden": torch.randn(2, 3, WIDTH)})
    assert hooks.losses is None


# -- which heads are one product --------------------------------------------------------------------------------------


def test_a_linear_layer_is_its_own_product_unless_something_else_takes_part() -> None:
    linear = nn.Linear(WIDTH, VOCABULARY)
    assert plain_linear(linear) is linear
    for register in (linear.register_forward_hook, linear.register_full_backward_hook):
        with register(lambda *_: None):
            assert plain_linear(linear) is None
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert plain_linear(linear) is None

    class Scaled(nn.Linear):
        pass

    assert plain_linear(Scaled(WIDTH, VOCABULARY)) is None and plain_linear(nn.Identity()) is None


def test_an_adapted_head_is_a_product_while_its_adapters_are_disabled() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(WIDTH, VOCABULARY)), LoraConfig(target_modules=["0"]))
    head = model[0]
    assert plain_linear(head) is None
    with model.disable_adapter():
        assert plain_linear(head) is head.base_layer
        with head.register_forward_hook(lambda *_: None):
            assert plain_linear(head) is None


def test_a_head_that_trains_whole_is_the_product_of_its_current_copy() -> None:
    net = nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, VOCABULARY)})
    model: Any = get_peft_model(net, LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    head = model["head"]
    assert plain_linear(head) is head.copies["default"]
    with model.disable_adapter():
        assert plain_linear(head) is head.base_layer
    with head.base_layer.register_forward_pre_hook(contiguous_input), model.disable_adapter():
        assert plain_linear(head) is head.base_layer, "this hook changes no value"
    with head.base_layer.register_forward_pre_hook(lambda *_: None), model.disable_adapter():
        assert plain_linear(head) is None
