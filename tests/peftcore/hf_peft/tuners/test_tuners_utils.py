import pytest
from peftcore.tuners.tuners_utils import check_target_module_exists, inspect_matched_modules
from torch import nn

from peftcore import LoraConfig, TargetError, get_peft_model


def test_a_path_is_selected_by_names_without_the_excluded_ones_and_in_the_chosen_blocks() -> None:
    config = LoraConfig(target_modules=["q"], exclude_modules=["head.q"], layers_to_transform=[1])
    paths = ("layers.1.q", "layers.0.q", "layers.1.k", "head.q")
    assert [path for path in paths if check_target_module_exists(config, path)] == ["layers.1.q"]


def test_the_modules_of_a_model_are_matched_or_not() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LoraConfig(target_modules=["0"]))
    assert inspect_matched_modules(model.base_model) == {"matched": ["0"], "unmatched": ["1"]}
    with pytest.raises(TargetError, match="'other' is not an adapter of layers"):
        inspect_matched_modules(model.base_model, "other")
