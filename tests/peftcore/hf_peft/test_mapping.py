from typing import Any

import peft
import pytest
from peftcore.mapping import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
)
from torch import nn

import peftcore
from peftcore import ConfigError, PeftType
from peftcore.registry import methods


def test_each_method_has_its_classes_under_pefts_names() -> None:
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(methods())
    for theirs in peft.PeftType:
        name = theirs.value
        assert PEFT_TYPE_TO_CONFIG_MAPPING[name].__name__ == peft.PEFT_TYPE_TO_CONFIG_MAPPING[theirs].__name__
        assert PEFT_TYPE_TO_TUNER_MAPPING[name].__name__ == peft.PEFT_TYPE_TO_TUNER_MAPPING[theirs].__name__


def test_each_method_has_pefts_prefix() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as THEIRS

    assert {name.value: PEFT_TYPE_TO_PREFIX_MAPPING[name.value] for name in THEIRS} == {
        name.value: prefix for name, prefix in THEIRS.items()
    }


def test_a_table_takes_the_enumeration_and_its_text() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is peftcore.LoraConfig
    assert "LORA" in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert "PROMPT_TUNING" not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    with pytest.raises(KeyError):
        PEFT_TYPE_TO_CONFIG_MAPPING["NO_SUCH"]


def test_each_task_has_its_class() -> None:
    assert set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == set(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)


def test_a_dictionary_becomes_a_configuration() -> None:
    assert get_peft_config({"peft_type": "LORA", "r": 3}).r == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="unknown option 'rank'"):
        get_peft_config({"peft_type": "LORA", "rank": 3})


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's own
def test_a_further_adapter_freezes_no_earlier_one_as_in_hf_peft() -> None:
    trainable = []
    for library in (peft, peftcore):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for name, targets, frozen in (("a", ["0"], False), ("b", ["0", "1"], True), ("c", ["0"], False)):
            config = library.LoraConfig(target_modules=targets, r=2, inference_mode=frozen)
            library.inject_adapter_in_model(config, model, name)
        layers: list[Any] = [model[0], model[1]]
        assert [layer.active_adapters for layer in layers] == [["c"], ["c"]]
        trainable.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert trainable[0] == trainable[1] == {f"0.lora_{factor}.{name}.weight" for factor in "AB" for name in "ac"}
