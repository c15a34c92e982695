"""`peft.utils.constants`: HF PEFT's values."""

import pytest
import torch
from peft.utils import constants as of_peft

from peftcore.hf_peft.utils import constants


@pytest.mark.parametrize(
    "name", [name for name in constants.__all__ if name != "bloom_model_postprocess_past_key_value"]
)
def test_the_values_are_those_of_peft(name: str) -> None:
    assert getattr(constants, name) == getattr(of_peft, name)


def test_bloom_gets_its_prefixes_in_pefts_layout() -> None:
    prefixes = (torch.randn(4, 2, 3, 5, 6),)  # keys and values of two layers: rows, heads, tokens, features
    ours, theirs = (module.bloom_model_postprocess_past_key_value(prefixes) for module in (constants, of_peft))
    assert len(ours) == len(theirs) == 2
    for layer, layer_of_peft in zip(ours, theirs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(layer, layer_of_peft, strict=True))


def test_tables_of_targets_are_attributes_and_other_names_are_not() -> None:
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    with pytest.raises(AttributeError, match="NO_SUCH_MAPPING"):
        constants.NO_SUCH_MAPPING  # noqa: B018
