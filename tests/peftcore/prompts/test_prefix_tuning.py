"""Prefix tuning: learned keys and values before those of each attention."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, attach, both_ways, build

import peftcore
from peftcore import PeftModel, get_peft_model
from peftcore.errors import CheckpointError, ConfigError
from peftcore.prompts.prefix_tuning import PrefixTuningConfig

CAUSAL: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "t5"])
def test_parity(family: str, projection: bool, tmp_path: Path) -> None:
    """With transformers 5.24 PEFT finds that no other model takes a cache; encoders are compared with the formula."""
    options: dict[str, Any] = {
        "num_virtual_tokens": 3,
        "task_type": FAMILIES[family][1],
        "prefix_projection": projection,
        "encoder_hidden_size": 8 if projection else None,
    }
    both_ways(family, peft.PrefixTuningConfig(**options), PrefixTuningConfig(**options), tmp_path)


def test_zero_start() -> None:
    for projection in (False, True):
        config = PrefixTuningConfig(**CAUSAL, init_weights="zero", prefix_projection=projection)
        learner = get_peft_model(build("llama"), config).prompt_encoder["default"]
        assert not learner.encoded().any()


def test_projection_is_two_layers_with_tanh() -> None:
    config = PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=5)
    learner = attach("llama", config).double().prompt_encoder["default"]
    first, _, second = learner.transform
    assert first.weight.shape == (5, 16)
    expected = torch.tanh(learner.vectors @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(learner.encoded(), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_peft_saves_no_encoder_to_train_on_with(tmp_path: Path) -> None:
    hf = peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(**CAUSAL, prefix_projection=True))
    hf.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="training cannot continue"):
        PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(build("llama"), tmp_path).parameters())


@pytest.mark.parametrize("options, words", [({"init_weights": "one"}, "init_weights must be one of")])
def test_configurations_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrefixTuningConfig(num_virtual_tokens=2, **options)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("projection", [True, False])
def test_the_encoder_says_whether_it_projects_as_in_hf_peft(projection: bool) -> None:
    options: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "prefix_projection": projection}
    for lib in (peftcore, peft):
        model: Any = lib.get_peft_model(build("llama"), lib.PrefixTuningConfig(**options))
        assert model.prompt_encoder["default"].prefix_projection is projection
