"""New adapters whose targets name the layers that experts had before transformers 5."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import IDS, mixtral, qwen
from safetensors.torch import load_file

import peftcore
from peftcore import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # HF PEFT looks at modules alone
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # HF PEFT reads it
@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3", "gate"], r".*\.(q_proj|w1|w3)"])
def test_new_targets_that_name_former_layers_of_experts_mean_what_they_mean_in_hf_peft(
    targets: list[str] | str, tmp_path: Path
) -> None:
    directories = {}
    for library in (peft, peftcore):
        model = mixtral()
        torch.manual_seed(1)
        model = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=targets))
        model.add_adapter("second", library.LoraConfig(r=2, target_modules=targets))
        directories[library] = tmp_path / library.__name__
        model.save_pretrained(directories[library])
    for part in (".", "second"):
        theirs, ours = (load_file(d / part / "adapter_model.safetensors") for d in directories.values())
        assert any("experts" in key for key in ours)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    loaded = [lib.PeftModel.from_pretrained(mixtral(), directories[peftcore])(IDS).logits for lib in (peft, peftcore)]
    torch.testing.assert_close(*loaded)


def test_patterns_of_former_layers_move_to_the_parameters_without_a_warning() -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"w1": 3, "w3": 3}, "alpha_pattern": {"w1": 12, "w3": 12}}
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=["w1", "w3"], **patterns))
    config = model.peft_config["default"]
    assert set(config.rank_pattern.values()) == {6} and set(config.alpha_pattern.values()) == {24}
    assert set(model.adapter_ranks().values()) == {6}


def test_new_targets_of_experts_keep_the_layers_beside_them() -> None:
    model = get_peft_model(qwen(), LoraConfig(target_modules=["down_proj"], rank_pattern={"down_proj": 3}))
    ranks = {path.removeprefix("model.layers.0.mlp."): rank for path, rank in model.adapter_ranks().items()}
    assert ranks == {"experts.down_proj": 3, "shared_expert.down_proj": 3}


def test_target_parameters_have_precedence_over_the_former_layers_of_experts() -> None:
    config = LoraConfig(target_modules=["q_proj", "w2"], target_parameters=["experts.down_proj"])
    assert get_peft_model(mixtral(), config).peft_config["default"].target_parameters == ["experts.down_proj"]


@pytest.mark.filterwarnings("ignore:alpha_pattern.* match no adapted layer:RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "w1"]},
        {"target_modules": ["q_proj", "w1", "w3"], "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "w1", "w3"], "alpha_pattern": {"w1": 3}},
        {"target_modules": ["q_proj", "w1", "w3"], "use_dora": True},
        {"target_modules": ["q_proj", "w2"], "init_lora_weights": "pissa"},
    ],
)
def test_new_targets_of_experts_that_no_parameter_can_take_the_place_of(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="the experts are left out"):
        model = get_peft_model(mixtral(), LoraConfig(**options))
    assert list(model.adapter_ranks()) == ["model.layers.0.self_attn.q_proj"]


def test_a_plain_model_takes_the_former_names_too() -> None:
    config = LoraConfig(r=2, target_modules=["w1", "w3", "gate"])
    model = inject_adapter_in_model(config, mixtral())
    adapted = get_peft_model(mixtral(), config)
    assert get_peft_model_state_dict(model).keys() == {
        key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(adapted)
    }
    assert model.peft_config["default"].target_parameters
