"""The method contract: what an adapter does by default, and what its base class keeps track of."""

import copy
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model, registry
from peftcore.adapter import Adapter, Shared
from peftcore.bases import base_weight
from peftcore.injection.adapter_set import adapter_set

EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model}
CONFIG = LoraConfig(target_modules=["0"])


class Dense(Adapter):
    """A method that trains all of ΔW: the least that a method must define."""

    def __init__(self, layer: nn.Module):
        super().__init__(CONFIG, base_weight(layer), "0")
        self.change = nn.Parameter(torch.ones(self.base.out_features, self.base.in_features))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.change)

    def delta_weight(self) -> Tensor:
        return self.change


class Signs(Shared):
    """A constant that is computed, and never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.make_constants()

    def make_constants(self) -> None:
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0]), persistent=False)


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_by_default_the_output_is_that_of_the_merged_weight() -> None:
    layer = nn.Linear(4, 3)
    adapter = Dense(layer)
    x, weight = torch.randn(5, 4), layer.weight.detach().clone()
    assert adapter.before(x) is x
    expected = nn.functional.linear(x, adapter.merged_weight(weight), layer.bias)
    torch.testing.assert_close(adapter.after(x, layer(x)), expected)
    assert torch.equal(adapter.merged_weight(weight), weight + 1) and torch.equal(weight, layer.weight)
    assert torch.equal(adapter.forward_weight(weight), weight + 1)
    assert torch.equal(adapter.merge_into(weight.clone()), weight + 1)
    adapter.prepare_to_read()
    assert not adapter.change.any()


def test_the_default_output_has_the_type_of_the_activations() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    adapter, x = Dense(layer), torch.randn(5, 4).bfloat16()
    assert adapter.change.dtype == torch.float32 and adapter.after(x, layer(x)).dtype == torch.bfloat16


def test_a_method_must_define_its_start_and_its_change() -> None:
    class Nothing(Adapter):
        pass

    adapter = Nothing(CONFIG, base_weight(nn.Linear(4, 3)), "0")
    with pytest.raises(NotImplementedError, match="Nothing must define reset_parameters"):
        adapter.reset_parameters()
    with pytest.raises(NotImplementedError, match="Nothing must define delta_weight, merged_weight or exact_factors"):
        adapter.merged_weight(torch.zeros(3, 4))


def test_a_change_of_the_bias_is_the_difference_that_merging_makes() -> None:
    class Shifted(Dense):
        shift: float = 0.5

        def merged_bias(self, bias: Tensor | None) -> Tensor | None:
            return torch.full((3,), self.shift) if bias is None else bias + self.shift

    change = Shifted(nn.Linear(4, 3)).bias_change()
    assert change is not None
    torch.testing.assert_close(change, torch.full((3,), 0.5, dtype=torch.float64), rtol=0, atol=1e-7)
    without = Shifted(nn.Linear(4, 3, bias=False)).bias_change()
    assert without is not None and torch.equal(without, torch.full((3,), 0.5))
    none = Shifted(nn.Linear(4, 3))
    none.shift = 0.0
    assert none.bias_change() is None
    assert Dense(nn.Linear(4, 3)).bias_change() is None


# -- what the base class keeps track of -------------------------------------------------------------------------------


def test_every_attribute_that_is_set_counts_as_a_change() -> None:
    adapter = Dense(nn.Linear(4, 3))
    counts = [adapter.changes]
    for change in (
        lambda: setattr(adapter, "scaling", 2.0),
        lambda: setattr(adapter, "change", nn.Parameter(torch.zeros(3, 4))),
        adapter.eval,
        adapter.mark_changed,
    ):
        change()
        counts.append(adapter.changes)
    assert counts == sorted(set(counts))
    adapter.after(torch.randn(2, 4), torch.randn(2, 3))
    assert adapter.changes == counts[-1]


def test_a_new_adapter_does_not_count_the_layer_as_its_own_submodule() -> None:
    layer = nn.Linear(4, 3)
    adapter = Dense(layer)
    assert [name for name, _ in adapter.named_parameters()] == ["change"] and not list(adapter.children())
    assert adapter.shared is None and adapter.trained_bias is None


def test_constants_are_computed_again_after_the_meta_device() -> None:
    with torch.device("meta"):
        shared = Signs()
    assert shared.signs.is_meta
    shared.to_empty(device="cpu")
    assert torch.equal(shared.signs, torch.tensor([1.0, -1.0, 1.0]))
    shared.signs.mul_(2)
    shared.double()  # a cast keeps the values
    assert torch.equal(shared.signs, torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64))


def test_constants_are_not_saved_and_saved_values_are_copied_in() -> None:
    shared = Signs()
    own = shared.scale
    assert set(shared.checkpoint_tensors()) == {"scale"} and not shared.checkpoint_tensors()["scale"].requires_grad
    shared.load_checkpoint_tensors({"scale": torch.tensor([3.0, 4.0, 5.0])})
    assert shared.scale is own and own.tolist() == [3, 4, 5]


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_an_adapter_saves_its_own_parameters_and_not_the_shared_ones() -> None:
    adapter = Dense(nn.Linear(4, 3))
    adapter.shared = Signs()
    assert adapter.checkpoint_keys() == {"change": "change"}
    assert adapter.repeated_keys() == {"scale"}
    assert adapter.fits("change", torch.zeros(3, 4)) and not adapter.fits("change", torch.zeros(4, 3))


def test_only_a_placeholder_takes_over_the_memory_of_a_saved_tensor() -> None:
    saved = torch.randn(3, 4)
    for unread, given, shares in (
        (False, saved, False),
        (True, saved, True),
        (True, saved.double(), False),
        (True, saved.T.contiguous().T, False),
    ):
        adapter = Dense(nn.Linear(4, 3))
        adapter.is_unread, own = unread, adapter.change
        with torch.no_grad():
            adapter.load_checkpoint_tensors({"change": given})
        assert adapter.change is own and torch.equal(own, saved)
        assert (own.data_ptr() == given.data_ptr()) == shares


def test_parameters_of_submodules_are_saved_by_their_paths() -> None:
    class Nested(Dense):
        def __init__(self, layer: nn.Module):
            super().__init__(layer)
            self.inner = nn.Linear(2, 2, bias=False)

    adapter = Nested(nn.Linear(4, 3))
    other = copy.deepcopy(adapter)
    with torch.no_grad():
        adapter.inner.weight.add_(1)
        other.load_checkpoint_tensors(adapter.checkpoint_tensors())
    assert set(adapter.checkpoint_tensors()) == {"change", "inner.weight"}
    assert torch.equal(other.inner.weight, adapter.inner.weight)


# -- names and printing -----------------------------------------------------------------------------------------------


def test_the_old_name_of_a_weight_space_forward_still_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="Old: `through_weight` is now `weight_space_forward`"):

        class Old(Dense):
            through_weight = True

    assert Old.weight_space_forward
    adapter = Dense(nn.Linear(4, 3))
    with pytest.warns(DeprecationWarning, match="weight_space_forward"):
        adapter.through_weight = True
    assert adapter.weight_space_forward


def test_printing_shows_the_rank_of_the_layer_itself() -> None:
    options = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "use_dora": True}
    net = get_peft_model(
        nn.Sequential(nn.Linear(12, 8)), LoraConfig(target_modules=["0"], rank_pattern={"0": 2}, **options)
    )
    assert "r=2, lora_alpha=16, lora_dropout=0.1, use_dora=True" in repr(net)


@pytest.mark.parametrize("method", [name for name in EXAMPLES if name not in ("BEFT", "LN_TUNING")])
def test_printing_a_model_shows_each_adapters_options(method: str) -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(12, 8)), EXAMPLES[method].make(target_modules=["0"]))
    assert "=" in adapter_set(net).adapters("default")["0"].extra_repr()


# -- dropout ----------------------------------------------------------------------------------------------------------

WITH_DROPOUT = [method for method, example in EXAMPLES.items() if registry.methods()[method].adapter.dropout_option]


def changed_layer(method: str) -> nn.Module:
    """A linear layer with dropout 0.5 and adapter parameters that are far from zero; in training mode."""
    adapter_class = registry.methods()[method].adapter
    config = EXAMPLES[method].make(target_modules=["0"], **{adapter_class.dropout_option: 0.5})
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)
    randomise(model, 0.5)
    return model.train()


def test_the_methods_with_dropout_of_their_input_are_those_of_hf_peft() -> None:
    assert {*WITH_DROPOUT} & {*registry.PeftType} == {
        *(
            "ADALORA",
            "DEFT",
            "DELORA",
            "FROD",
            "GRALORA",
            "HIRA",
            "LORA",
            "MISS",
            "PSOFT",
            "PVERA",
            "RANDLORA",
            "SUPERTUNING",
            "TINYLORA",
            "UNILORA",
            "VBLORA",
            "VERA",
        ),
    }


@pytest.mark.parametrize("method", WITH_DROPOUT)
def test_code_that_changes_every_dropout_module_changes_the_adapters_too(method: str) -> None:
    model, x = changed_layer(method), torch.randn(5, 12)
    (dropout,) = (module for module in model.modules() if isinstance(module, nn.Dropout))
    expected = model.eval()(x)
    assert not torch.allclose(model.train()(x), expected)
    model.eval()
    dropout.train()  # predictions with dropout, to see their spread
    dropout.p = 0.0  # TRL switches dropout off in this way
    torch.testing.assert_close(model(x), expected)
    dropout.p = 0.5
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("method", WITH_DROPOUT)
def test_the_layer_shows_its_dropout_as_hf_pefts_does(method: str) -> None:
    option = registry.methods()[method].adapter.dropout_option
    layer: Any = changed_layer(method).get_submodule("0")
    assert getattr(layer, option)["default"].p == 0.5
    config = EXAMPLES[method].make(target_modules=["0"], **{option: 0.0})
    plain: Any = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config).get_submodule("0")
    assert isinstance(getattr(plain, option)["default"], nn.Identity)
