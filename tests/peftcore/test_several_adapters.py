"""Several adapters in one model: what is active, trains and is left after each call, compared with HF PEFT."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore.errors import AdapterNameError, MergeError

Step = Callable[[Any, Any], Any]
"""A call: (library, model)."""


def lora(library: Any, *targets: str, **options: Any) -> Any:
    return library.LoraConfig(r=2, target_modules=list(targets or ("0",)), init_lora_weights=False, **options)


def net(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    return library.get_peft_model(plain, lora(library, **options), "first")


def add(name: str, *targets: str, **options: Any) -> Step:
    return lambda library, model: model.add_adapter(name, lora(library, *targets, **options))


def call(method: str, *args: Any, **options: Any) -> Step:
    return lambda _, model: getattr(model, method)(*args, **options)


def activate(*names: str) -> Step:
    return lambda _, model: model.base_model.set_adapter(list(names))


def trained(model: Any) -> set[str]:
    """Return the names of the adapters of which a parameter trains."""
    names = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {part for parts in names for part in parts if part in ("first", "second", "third")}


def state(model: Any) -> dict[str, Any]:
    layer = model.base_model.model[0]
    return {
        "active": list(model.active_adapters),
        "loaded": sorted(model.peft_config),
        "trained": trained(model),
        "merged": list(getattr(layer, "merged_adapters", [])),
    }


SCRIPTS: dict[str, list[Step]] = {
    "an added adapter waits for set_adapter": [
        add("second"),
        call("set_adapter", "second"),
        call("set_adapter", "first"),
    ],
    "set_adapter for inference": [add("second"), call("set_adapter", "second", inference_mode=True)],
    "an added copy of a module waits, too": [
        add("second", modules_to_save=["2"]),
        call("set_adapter", "second"),
        call("set_adapter", "first"),
    ],
    "deleting the active one": [
        add("second"),
        add("third"),
        call("delete_adapter", "first"),
        call("delete_adapter", "second"),
    ],
    "deleting an inactive one": [add("second"), call("delete_adapter", "second")],
    "deleting one of two active ones": [add("second"), activate("first", "second"), call("delete_adapter", "first")],
    "deleting the last one": [call("delete_adapter", "first")],
    "deleting one whose module is trained in full": [
        add("second", modules_to_save=["2"]),
        call("set_adapter", "second"),
        call("delete_adapter", "second"),
    ],
    "deleting beside a merged one": [add("second"), call("merge_adapter"), call("delete_adapter", "second")],
    "set_adapter unmerges": [add("second"), call("merge_adapter"), call("set_adapter", "second")],
    "freezing and thawing": [
        add("second"),
        call("set_requires_grad", ["first", "second"], requires_grad=True),
        call("set_requires_grad", "first", requires_grad=False),
    ],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_each_call_leaves_what_it_leaves_in_peft(script: list[Step]) -> None:
    ours, theirs = net(peftcore), net(peft)
    for step in script:
        with warnings.catch_warnings(record=True) as our_warnings:
            warnings.simplefilter("always")
            step(peftcore, ours)
        with warnings.catch_warnings(record=True) as their_warnings:
            warnings.simplefilter("always")
            step(peft, theirs)
        assert bool(our_warnings) == bool(their_warnings), [str(w.message) for w in [*our_warnings, *their_warnings]]
        if not theirs.peft_config:
            assert not ours.peft_config and ours.active_adapters == []
            return
        assert state(ours) == state(theirs)


REFUSED: dict[str, tuple[list[Step], Step]] = {
    "deleting a merged one": ([call("merge_adapter")], call("delete_adapter", "first")),
    "deleting an unknown one": ([], call("delete_adapter", "nope")),
    "two copies of one module": (
        [add("second", modules_to_save=["2"]), add("third", modules_to_save=["2"])],
        activate("second", "third"),
    ),
    "a name that is taken": ([], add("first")),
    "an unknown option": ([], lambda library, _: library.LoraConfig(rang=3)),
}


@pytest.mark.parametrize("before, refused", REFUSED.values(), ids=list(REFUSED))
def test_the_same_calls_are_refused_by_the_same_class_of_error(before: list[Step], refused: Step) -> None:
    kinds = []
    for library in (peft, peftcore):
        model = net(library)
        for step in before:
            step(library, model)
        was = state(model)
        with pytest.raises(Exception) as caught:
            refused(library, model)
        kinds.append(type(caught.value))
        assert state(model) == was
    assert any(issubclass(kinds[1], parent) for parent in kinds[0].__mro__[:-3]), kinds


def test_outputs_after_set_adapter_are_those_of_the_active_one_alone() -> None:
    model, x = net(peftcore), torch.randn(3, 6)
    model.add_adapter("second", lora(peftcore))
    with model.route("second"):
        alone = model(x)
    model.merge_adapter(["first"])
    with pytest.warns(UserWarning, match=r"\['first'\] were merged into the base, and are unmerged now"):
        model.set_adapter("second")
    assert torch.equal(model(x), alone)


def test_adding_an_adapter_leaves_the_merged_one_merged_unlike_in_peft() -> None:
    ours, theirs, x = net(peftcore), net(peft), torch.randn(3, 6)
    with torch.no_grad():
        before = ours(x)
        for library, model in ((peftcore, ours), (peft, theirs)):
            model.merge_adapter()
            merged = model(x)
            context = pytest.warns(UserWarning, match="Unmerging") if library is peft else contextlib.nullcontext()
            with context:
                model.add_adapter("second", lora(library))
            torch.testing.assert_close(model(x), merged)
    assert (state(ours)["merged"], state(theirs)["merged"]) == (["first"], [])
    ours.unmerge_adapter()
    with torch.no_grad():
        assert torch.equal(ours(x), before)


def test_nothing_is_deleted_if_one_of_several_cannot_be() -> None:
    model = net(peftcore)
    model.add_adapter("second", lora(peftcore))
    model.merge_adapter(["first"])
    with pytest.raises(MergeError, match=r"\['first'\] are merged"):
        model.delete_adapter(["second", "first"])
    assert list(model.peft_config) == ["first", "second"]


def test_rows_of_an_embedding_train_for_one_active_adapter() -> None:
    plain = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6))
    config = {row: lora(peftcore, "1", trainable_token_indices={"0": [row]}) for row in (1, 2)}
    model = peftcore.get_peft_model(plain, config[1], "first")
    model.add_adapter("second", config[2])
    model.add_adapter("third", config[1])
    model.set_adapter(["first", "second"])
    with pytest.raises(AdapterNameError, match=r"\['first', 'third'\] each train row 1 of 0"):
        model.set_adapter(["first", "third"])
    assert model.active_adapters == ["first", "second"]


def test_the_wrapper_of_a_whole_module_has_pefts_attributes() -> None:
    for library in (peft, peftcore):
        model = net(library)
        model.add_adapter("second", lora(library, modules_to_save=["2"]))
        wrapper = model.base_model.model[2]
        assert wrapper.active_adapters == [] and list(wrapper.modules_to_save) == ["second"]
        assert wrapper.modules_to_save.second.weight.requires_grad is False
        model.set_adapter("second")
        assert wrapper.active_adapters == ["second"] and wrapper.modules_to_save["second"].weight.requires_grad
        assert wrapper.original_module.weight.shape == (6, 6) and wrapper.disable_adapters is False


def test_second_adapters_with_trained_biases_are_a_difference() -> None:
    """PEFT refuses them, because its biases belong to the base; here each adapter has its own."""
    with pytest.raises(ValueError, match="bias"):
        net(peft, bias="all").add_adapter("second", lora(peft, bias="all"))
    model, x = net(peftcore, bias="all"), torch.randn(3, 6)
    before = model(x)
    model.add_adapter("second", lora(peftcore, bias="all"))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name and name.endswith("bias"):
                parameter.add_(1)
    model.set_adapter("first")
    assert torch.equal(model(x), before)
