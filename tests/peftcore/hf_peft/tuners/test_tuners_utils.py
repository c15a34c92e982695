import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft.tuners import tuners_utils as of_peft
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as their_key_prefixes
from peftcore.tuners.tuners_utils import (
    BaseTuner,
    check_adapters_to_merge,
    check_target_module_exists,
    inspect_matched_modules,
    onload_layer,
)
from peftcore.tuners.tuners_utils import _filter_state_dict_by_key_prefixes as filtered
from peftcore.tuners.tuners_utils import _find_minimal_target_modules as find_minimal
from peftcore.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as key_prefixes
from peftcore.tuners.tuners_utils import _maybe_include_all_linear_layers as with_linear_layers
from quiet_training import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore import AdapterNameError, LoraConfig, TargetError, get_peft_model
from peftcore.hf_peft.tuners import tuners_utils


def test_a_path_is_selected_by_names_without_the_excluded_ones_and_in_the_chosen_blocks() -> None:
    config = LoraConfig(target_modules=["q"], exclude_modules=["head.q"], layers_to_transform=[1])
    paths = ("layers.1.q", "layers.0.q", "layers.1.k", "head.q")
    assert [path for path in paths if check_target_module_exists(config, path)] == ["layers.1.q"]


def test_the_modules_of_a_model_are_matched_or_not() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LoraConfig(target_modules=["0"]))
    assert inspect_matched_modules(model.base_model) == {"matched": ["0"], "unmatched": ["1"]}
    with pytest.raises(TargetError, match="'other' is not an adapter of layers"):
        inspect_matched_modules(model.base_model, "other")


def test_the_shortest_names_of_some_modules() -> None:
    names = find_minimal(["m.0.q", "m.1.q", "head.q"], ["m.0.k", "m.1.k"])
    assert names == {"q"}
    assert find_minimal({"m.0.q", "m.1.q"}, {"head.q"}) == {"0.q", "1.q"}
    assert find_minimal(["q"], ["head.q"]) == {"q"}  # the end of another path: no name can tell them apart


@pytest.mark.parametrize(
    ("wanted", "others", "message"),
    [
        ([], [], "at least one; got"),
        ("q", [], "must be paths of modules"),
        (["q", ""], [], "the model's own path"),
        (["q", "k"], ["k"], r"\['k'\] are in target_modules and in other_module_names"),
    ],
)
def test_modules_that_cannot_be_named_are_refused(wanted: Any, others: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        find_minimal(wanted, others)


def test_all_linear_becomes_paths() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert with_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules == {"0", "2"}
    config = LoraConfig(target_modules=["2"])
    assert with_linear_layers(config, model) is config


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"lora_base": nn.Linear(3, 3), "tokens": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})


def prefixes_of(library: Any, prefixes: Callable[..., set[str]], name: str | None) -> set[str]:
    model = library.get_peft_model(
        net(),
        library.LoraConfig(
            r=2, target_modules=["lora_base"], modules_to_save=["head"], trainable_token_indices={"tokens": [1]}
        ),
    )
    return prefixes(model, name)


@pytest.mark.parametrize("name", [None, "default"])
def test_the_beginnings_of_the_keys_of_adapters_are_those_of_hf_peft(name: str | None) -> None:
    ours = prefixes_of(peftcore, key_prefixes, name)
    theirs = prefixes_of(peft, their_key_prefixes, name)
    assert ours and ours <= theirs  # HF PEFT's also has those of modules without tensors, such as dropout
    state = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["lora_base"])).state_dict()
    assert set(filtered(state, ours)) == {key for key in state if ".lora_A." in key or ".lora_B." in key}


def test_shared_tensors_and_plain_models_have_beginnings_too() -> None:
    vera = get_peft_model(net(), peftcore.VeraConfig(r=2, target_modules=["head"]))
    assert {"base_model.vera_A.default", "base_model.vera_B.default"} <= key_prefixes(vera, "default")
    plain = peftcore.inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), net())
    assert key_prefixes(plain) == {"head.lora_A", "head.lora_B"}
    with pytest.raises(AdapterNameError, match="Adapter other does not exist"):
        key_prefixes(plain, "other")


def test_keys_are_matched_in_whole_segments() -> None:
    state = dict.fromkeys(["a", "a.b", "a.bc", "ab", "x.a"], 0)
    assert list(filtered(state, {"a"})) == ["a", "a.b", "a.bc"]
    assert list(filtered(state, {"a.b"})) == ["a.b"]


@dataclass
class Options:
    layers: int = 2


@pytest.mark.parametrize("config", [Options(), {"layers": 2}, types.SimpleNamespace(to_dict=lambda: {"layers": 2})])
def test_the_configuration_of_a_model_is_a_dictionary(config: Any) -> None:
    model = nn.Linear(1, 1)
    assert BaseTuner.get_model_config(model) == {"model_type": "custom"}
    model.config = config
    assert BaseTuner.get_model_config(model) == {"layers": 2}


def test_adapters_of_a_layer_that_are_not_merged_yet() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    layer = model.get_submodule("0")
    assert check_adapters_to_merge(layer) == ["default"]
    model.merge_adapter(["default"])
    with pytest.warns(
        UserWarning, match=r"Already following adapters were merged: default\. Now merged as well: other"
    ):
        assert check_adapters_to_merge(layer, ["default", "other"]) == ["other"]
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        assert check_adapters_to_merge(layer, ["default"]) == []
    with pytest.raises(TypeError, match="must be a list of names"):
        check_adapters_to_merge(layer, "default")


def test_a_layers_offloaded_weight_is_there_inside_and_changes_are_kept() -> None:
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    before = base[0].base_layer.weight.detach().clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    layer: Any = base[0]
    assert layer.base_layer.weight.is_meta
    with onload_layer(layer), torch.no_grad():
        assert torch.equal(layer.base_layer.weight, before)
        layer.base_layer.weight.mul_(2)
    assert layer.base_layer.weight.is_meta
    with onload_layer(layer):
        assert torch.equal(layer.base_layer.weight, 2 * before)
    plain = nn.Linear(2, 2)
    with onload_layer(plain):
        assert not plain.weight.is_meta


LAYERS = [
    nn.Linear(3, 5),
    nn.Conv1d(2, 4, 3),
    nn.Conv2d(2, 4, 3),
    nn.Embedding(7, 3),
    nn.MultiheadAttention(4, 2),
    Conv1D(5, 3),
    nn.ReLU(),
]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_sizes_of_a_layer_are_those_of_peft(layer: nn.Module) -> None:
    assert tuners_utils._get_in_out_features(layer) == of_peft._get_in_out_features(layer)


def test_a_module_is_found_in_a_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    for module in (of_peft, tuners_utils):
        assert module.find_parameter_name_by_module(model, model[1][0]) == "1.0"
        assert module.find_parameter_name_by_module(model, nn.ReLU()) == ""
        assert module.get_device_map(model) == {"": torch.device("cpu")}
    model.hf_device_map = {"0": 0}  # type: ignore[assignment]
    assert tuners_utils.get_device_map(model) == of_peft.get_device_map(model) == {"0": 0}


def test_blocks_are_replicated_as_in_peft() -> None:
    outputs, counts = [], []
    for module in (of_peft, tuners_utils):
        torch.manual_seed(0)
        model = tiny_llama().double().eval()
        module.replicate_layers(model, [(0, 2), (1, 2)])
        counts.append(
            (len(model.model.layers), model.config.num_hidden_layers, sum(p.numel() for p in model.parameters()))
        )
        outputs.append(model(torch.arange(4)[None]).logits)
    assert counts[0] == counts[1] and counts[1][0] == 3
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", ["q.lora_A.default.weight", "q.ia3_l.default", "default", "q.weight", "q.default.x.y"])
def test_the_adapters_name_leaves_a_key_as_in_peft(key: str) -> None:
    ours, theirs = (module._remove_adapter_name_from_state_dict_key for module in (tuners_utils, of_peft))
    assert ours(key, "default") == theirs(key, "default")
