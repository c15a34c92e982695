"""Without gradients, outputs follow the adapters' weights, however these were changed: each state is compared with the
same model computed with gradients, which keeps nothing between forwards."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from method_example import randomise
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model, inject_adapter_in_model, refresh_adapters
from peftcore._util.fingerprint import Fingerprint, unchanging_weights
from peftcore.compiled.checksum import compiled
from peftcore.composition import Gate
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora.variants import dora
from peftcore.routing.gates import arrow_gate
from peftcore.train.adamw import FusedAdamW

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


ROWS = ["a", "b", None, "a", "b"]


def adapted(bias: bool = True, **options: Any) -> Any:
    """A linear layer with two frozen adapters, of which "a" acts."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], inference_mode=True, **options)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(16, 16, bias=bias)), config, "a")
    model.add_adapter("b", config)
    for name in ("a", "b"):
        model.set_requires_grad(name, True)
        randomise(model, 0.3)
        model.set_requires_grad(name, False)
    return model.eval()


def adapter_of(model: Any, name: str = "a") -> Any:
    return adapter_set(model).adapters(name)["0"]


def outputs(model: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """Without gradients, and with."""
    with torch.no_grad():
        fast = model(X, **given)
    return fast, model(X, **given).detach()


def trained(model: Any, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """One step, the adapter frozen before and after."""
    model.set_requires_grad("a", True)
    optimizer = make(adapter_of(model).parameters())
    model(X).square().sum().backward()
    optimizer.step()
    model.set_requires_grad("a", False)
    model.zero_grad()


def replaced(model: Any) -> None:
    adapter_of(model).lora_B_weight = nn.Parameter(torch.randn(16, 4), requires_grad=False)


def assigned(model: Any) -> None:
    adapter = adapter_of(model)
    adapter.load_state_dict({name: 2 * value for name, value in adapter.state_dict().items()}, assign=True)


def swapped(model: Any) -> None:
    adapter = adapter_of(model)
    torch.utils.swap_tensors(adapter.lora_B_weight, nn.Parameter(torch.randn(16, 4), requires_grad=False))


def pointed_elsewhere(model: Any) -> None:
    adapter_of(model).lora_B_weight.data = torch.randn(16, 4)


def pointed_elsewhere_often(model: Any) -> None:
    """As gradient-free search does; memory that was freed is given out again."""
    for _ in range(20):
        parameter = adapter_of(model).lora_B_weight
        parameter.data = parameter.data * 1.1


def scaled(model: Any) -> None:
    adapter_of(model).scaling *= 3


def replaced_whole(model: Any) -> None:
    other = copy.deepcopy(adapter_of(model))
    with torch.no_grad():
        other.lora_B_weight.mul_(2.0)
    model.set_submodule("0.adapters.a", other)


def edited_and_evaluated(model: Any) -> None:
    adapter_of(model).lora_B_weight.data.mul_(2.0)
    model.eval()


def edited_and_refreshed(model: Any) -> None:
    adapter_of(model).lora_B_weight.data.mul_(2.0)
    model.refresh_adapters()


def edited_and_made_trainable(model: Any) -> None:
    adapter_of(model).lora_B_weight.data.mul_(2.0)
    model.set_requires_grad("a", True)


def sharpened(model: Any) -> None:
    with torch.no_grad():
        adapter_of(model).lora_B_weight.mul_(2.0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch's fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "our AdamW": lambda p: FusedAdamW(p, lr=0.1),
    "torch's fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "bitsandbytes' AdamW": lambda p: bnb.optim.AdamW8bit(p, lr=0.1, min_8bit_size=1),
    "bitsandbytes' Lion": lambda p: bnb.optim.Lion8bit(p, lr=0.1, min_8bit_size=1),
}
CHANGES: dict[str, Callable[[Any], None]] = {
    **{name: lambda model, make=make: trained(model, make) for name, make in OPTIMIZERS.items()},
    "a new parameter": replaced,
    "load_state_dict(assign=True)": assigned,
    "swap_tensors": swapped,
    ".data =": pointed_elsewhere,
    ".data = many times": pointed_elsewhere_often,
    "scaling": scaled,
    "set_submodule": replaced_whole,
    ".data in place, eval()": edited_and_evaluated,
    ".data in place, refresh_adapters()": edited_and_refreshed,
    ".data in place, then trainable": edited_and_made_trainable,
    "in place": sharpened,
}


@pytest.mark.parametrize("given", [{}, {"adapter_names": ROWS}], ids=["active", "by rows"])
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_follow_a_change(change: str, given: dict[str, Any]) -> None:
    model = adapted()
    before, general = outputs(model, **given)
    torch.testing.assert_close(before, general)
    for _ in range(3):  # each epoch trains, freezes and evaluates
        CHANGES[change](model)
        after, general = outputs(model, **given)
        rounding = 1e-6 * general.abs().max().clamp(min=10).item()  # some changes make large sums of small parts
        torch.testing.assert_close(after, general, rtol=1e-5, atol=rounding)
        assert not torch.allclose(after, before, atol=1e-3)
        before = after


def test_functional_call_computes_with_what_it_is_given() -> None:
    model = adapted()
    before = outputs(model)[0]
    given = {name: 2 * value for name, value in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        inside = torch.func.functional_call(model, given, (X,))
    torch.testing.assert_close(inside, torch.func.functional_call(model, given, (X,)))
    assert not torch.allclose(inside, before, atol=1e-3)
    torch.testing.assert_close(outputs(model)[0], before)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "scaling"])  # of which directions know nothing
def test_arrow_follows_a_change(change: str) -> None:
    model, gate = adapted(), arrow_gate(["a", "b"], temperature=0.05)
    with torch.no_grad():
        before = model(X, adapter_names=gate)
    CHANGES[change](model)
    with torch.no_grad():
        after, fresh = model(X, adapter_names=gate), model(X, adapter_names=arrow_gate(["a", "b"], temperature=0.05))
    torch.testing.assert_close(after, fresh)
    assert not torch.allclose(after, before, atol=1e-4)


def test_prototypes_go_with_their_adapter() -> None:
    model, gate = adapted(), arrow_gate(["a", "b"])
    with torch.no_grad():
        model(X, adapter_names=gate)
    adapter = weakref.ref(adapter_of(model, "b"))
    model.delete_adapter("b")
    gc.collect()
    assert adapter() is None and len(_prototypes(gate)) == 1


def _prototypes(gate: Gate) -> Any:
    weigh: Any = gate.gating
    return weigh.prototypes


@pytest.fixture
def stacked_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each stack that is made."""
    from peftcore.composition import stacked
    from peftcore.layers import decoding_by_row

    monkeypatch.setattr(decoding_by_row, "computes", lambda dtype: False)  # compiled code reads the adapters themselves
    seen: list[int] = []
    original = stacked.stack
    monkeypatch.setattr(stacked, "stack", lambda *given: seen.append(1) or original(*given))
    return seen


def test_weights_are_stacked_once_until_they_change(stacked_anew: list[int]) -> None:
    model = adapted()
    with torch.no_grad():
        for trainable in (False, True):
            model.set_requires_grad("a", trainable)
            stacked_anew.clear()
            for _ in range(3):
                model(X, adapter_names=ROWS)
            assert len(stacked_anew) == 1
        adapter_of(model).lora_B_weight.data.mul_(2.0)
        model(X, adapter_names=ROWS)
        assert len(stacked_anew) == 2


def test_one_active_adapter_is_never_stacked(stacked_anew: list[int]) -> None:
    outputs(adapted())
    assert not stacked_anew


def test_elements_that_cannot_be_compared_are_trusted_in_a_scope_only() -> None:
    parameter = nn.Parameter(torch.ones(4, 6).T)  # stored by columns
    module = nn.Module()
    module.weight = parameter
    fingerprint = Fingerprint([module])
    assert not fingerprint.holds() and fingerprint.holds(trusts_learning=True)
    with unchanging_weights():
        inside = Fingerprint([module])
        assert inside.holds()
    assert not inside.holds()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_edit_of_every_element_through_data_is_noticed(dtype: torch.dtype) -> None:
    module = nn.Linear(7, 5).to(dtype)
    fingerprint = Fingerprint([module])
    assert fingerprint.holds()
    module.weight.data.add_(torch.full_like(module.weight, 0.25))
    assert not fingerprint.holds()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("kept_by", ["checksum", "fingerprint"])
def test_the_lengths_of_dora_follow_a_change(
    kept_by: str, change: str, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept_by == "fingerprint":
        monkeypatch.setattr(dora, "checksum", lambda *_: None)
    model = adapted(use_dora=True, bias=False)
    model.set_requires_grad("a", trainable)
    before, general = outputs(model)
    torch.testing.assert_close(before, general)
    for _ in range(2):
        CHANGES[change](model)
        after, general = outputs(model)
        torch.testing.assert_close(after, general, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after, before, atol=1e-3)
        before = after


@pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")
@pytest.mark.parametrize("name", ["lora_A_weight", "lora_B_weight", "lora_magnitude_vector_weight"])
def test_the_lengths_of_dora_follow_one_element_that_changes_through_data(name: str) -> None:
    model = adapted(use_dora=True, bias=False)
    before, _ = outputs(model)
    adapter_of(model).get_parameter(name).data.flatten()[5] += 10
    after, general = outputs(model)
    torch.testing.assert_close(after, general, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_the_lengths_of_dora_follow_the_base_and_copies() -> None:
    model = adapted(use_dora=True, bias=False)
    outputs(model)
    with torch.no_grad():
        model[0].base_layer.weight.mul_(3.0)
    torch.testing.assert_close(*outputs(model))
    copied = copy.deepcopy(model)
    sharpened(copied)
    torch.testing.assert_close(*outputs(copied))
    torch.testing.assert_close(*outputs(model))


def test_a_step_between_forward_and_backward_is_an_error_as_with_other_optimisers() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([a, b], lr=0.1)
    (a * b).sum().backward()
    loss = (a * b).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_plain_models_are_refreshed_by_the_function() -> None:
    torch.manual_seed(0)
    model = inject_adapter_in_model(
        LoraConfig(target_modules=["0"], init_lora_weights=False, inference_mode=True),
        nn.Sequential(nn.Linear(16, 16)),
    ).eval()
    before = outputs(model)[0]
    adapter_of(model, "default").lora_B_weight.data.mul_(2.0)
    refresh_adapters(model)
    after, general = outputs(model)
    torch.testing.assert_close(after, general)
    assert not torch.allclose(after, before, atol=1e-3)


def test_copies_have_fingerprints_of_their_own() -> None:
    model = adapted()
    before = outputs(model)[0]
    twin = copy.deepcopy(model)
    scaled(twin)
    assert not torch.allclose(outputs(twin)[0], before, atol=1e-3)
    torch.testing.assert_close(outputs(model)[0], before)


def test_weights_that_count_no_changes_are_never_trusted() -> None:
    model = adapted()
    with torch.inference_mode():
        adapter_of(model).lora_B_weight = nn.Parameter(torch.ones(16, 4), requires_grad=False)
        before = model(X)
        adapter_of(model).lora_B_weight.mul_(2.0)
        assert not torch.allclose(model(X), before, atol=1e-3)
    assert not Fingerprint([adapter_of(model)]).holds()
