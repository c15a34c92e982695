"""HF PEFT's tables of default targets: scripts read them, and set entries."""

import importlib
from typing import Any

import peft.utils
import pytest
from torch import nn
from transformers import BertConfig, BertModel

import peftcore
from peftcore import IA3Config, LoraConfig, TargetError, get_peft_model

NAME = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"
FEEDFORWARD = "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "of-my-own"}
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)


def table(method: str, module: str = "peftcore.utils") -> Any:
    return getattr(importlib.import_module(module), NAME.format(method))


@pytest.mark.parametrize(("method", "model_type"), [("LORA", "opt"), ("IA3", "gpt2"), ("LNTUNING", "llama")])
def test_a_table_has_the_entries_of_hf_peft(method: str, model_type: str) -> None:
    theirs = getattr(peft.utils, NAME.format(method))
    assert model_type in table(method) and set(table(method)[model_type]) == set(theirs[model_type])


def test_a_table_has_one_object_in_every_module() -> None:
    for module in ("peftcore.utils.constants", "peftcore.tuners.lora", "peftcore.tuners.lora.model"):
        assert table("LORA", module) is table("LORA")
    assert table("DELORA", "peftcore.tuners.delora.model") is table("DELORA") is not table("LORA")


def test_an_unknown_model_type_has_no_entry() -> None:
    assert "no-such-model" not in table("LORA") and table("LORA").get("no-such-model") is None
    with pytest.raises(KeyError, match="no-such-model"):
        table("LORA")["no-such-model"]
    assert "no-such-model" not in list(table("LORA"))
    with pytest.raises(AttributeError, match="has no attribute 'TRANSFORMERS_MODELS_TO_ROT13_TARGET"):
        table("ROT13")


@pytest.mark.parametrize("targets", [["first"], "fir.*"])
def test_an_entry_takes_the_place_of_the_default(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError):
        get_peft_model(Net(), LoraConfig())
    monkeypatch.setitem(table("LORA"), "of-my-own", targets)
    model = get_peft_model(Net(), LoraConfig())
    assert model.targeted_module_names == ["first"]
    assert model.peft_config["default"].target_modules == (targets if isinstance(targets, str) else set(targets))
    assert get_peft_model(Net(), LoraConfig(target_modules=["second"])).targeted_module_names == ["second"]
    with pytest.raises(TargetError):
        get_peft_model(Net(), peftcore.IA3Config())
    monkeypatch.undo()
    with pytest.raises(TargetError):
        get_peft_model(Net(), LoraConfig())


def feedforward(module: str = "peftcore.utils") -> Any:
    return getattr(importlib.import_module(module), FEEDFORWARD)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "t5"])
def test_the_table_of_feedforward_modules_has_the_entries_of_hf_peft(model_type: str) -> None:
    assert feedforward()[model_type] == getattr(peft.utils, FEEDFORWARD)[model_type]
    assert feedforward("peftcore.tuners.ia3.model") is feedforward("peftcore.utils.constants") is feedforward()


def test_an_entry_of_feedforward_modules_takes_the_place_of_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_inputs(**options: Any) -> list[bool]:
        model = get_peft_model(Net(), IA3Config(**options))
        return [model.get_submodule(path).is_feedforward for path in model.targeted_module_names]

    assert scaled_inputs(target_modules=["first", "second"]) == [False, False]
    monkeypatch.setitem(feedforward(), "of-my-own", ["second"])
    assert scaled_inputs(target_modules=["first", "second"]) == [False, True]
    assert scaled_inputs(target_modules=["first", "second"], feedforward_modules=["first"]) == [True, False]
    assert scaled_inputs(target_modules=["first"]) == [False]
    assert scaled_inputs(target_modules=".*nd") == [True]


def test_an_entry_for_one_of_two_layers_of_a_name_matches_that_layer_alone() -> None:
    """BERT has an `output.dense` in the block and in the attention; IA3 adapts the first."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    targets, names = table("IA3")["bert"], feedforward()["bert"]
    model = get_peft_model(BertModel(BertConfig(**sizes)), IA3Config(target_modules=targets, feedforward_modules=names))
    scaled = [path for path in model.targeted_module_names if model.get_submodule(path).is_feedforward]
    assert scaled == ["encoder.layer.0.output.dense"] and len(model.targeted_module_names) == 3
