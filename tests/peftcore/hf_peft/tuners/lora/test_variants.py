"""aLoRA's positions are those that HF PEFT finds, and a model accepts them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftcore
from peftcore import AdapterNameError, ConfigError, LoraConfig, get_peft_model
from peftcore.hf_peft.tuners.lora.variants import (
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft
    from peft.tuners.lora import variants as theirs

IDS = torch.tensor([[7, 8, 1, 7, 8, 2], [1, 7, 9, 8, 7, 8], [8, 7, 1, 2, 3, 7], [5, 5, 5, 5, 5, 5]])


class Net(nn.Module):
    """A model whose forward does not name its tokens `input_ids`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.proj = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj(self.embed(tokens))


def net() -> Any:
    config = LoraConfig(target_modules=["proj"], r=2, alora_invocation_tokens=[7, 8], init_lora_weights=False)
    return get_peft_model(Net(), config)


def configs(package: Any) -> dict[str, Any]:
    tokens = {"a": [7, 8], "b": [5], "plain": None}
    return {name: package.LoraConfig(alora_invocation_tokens=own) for name, own in tokens.items()}


@pytest.mark.parametrize("names", [None, ["a", "__base__", "b", "b"], ["plain", "a", "a", "plain"]])
@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_the_same_offsets_as_with_hf_peft(names: list[str] | None) -> None:
    oracle: Any = theirs.calculate_alora_offsets
    found = calculate_alora_offsets(configs(peftcore), "a", IDS, adapter_names=names)
    assert found == oracle(configs(peft), "a", IDS, adapter_names=names)
    assert any(found) and None in found


def test_what_has_no_offsets() -> None:
    assert calculate_alora_offsets(configs(peftcore), "a", None) == []
    assert calculate_alora_offsets(configs(peftcore), "plain", IDS) == [None] * 4
    with pytest.raises(AdapterNameError, match="no adapter 'c'"):
        calculate_alora_offsets(configs(peftcore), "c", IDS)
    with pytest.raises(ConfigError, match="one name for each of the 4 rows; got 1"):
        calculate_alora_offsets(configs(peftcore), "a", IDS, ["a"])


def test_the_offsets_act_in_a_model_with_other_names() -> None:
    model = net()
    arguments = get_alora_offsets_for_forward(model, IDS)
    assert arguments == get_alora_offsets_for_generate(model, IDS) == {"alora_offsets": [3, 2, None, None]}
    assert get_alora_offsets_for_generate(model, IDS[0]) == {"alora_offsets": [3]}
    adapted, base = model(IDS, **arguments), Net()(IDS)
    assert torch.equal(adapted[0, :3], base[0, :3]) and not torch.allclose(adapted[0, 3:], base[0, 3:])


def test_offsets_that_are_given_or_not_needed_stay() -> None:
    model = net()
    assert get_alora_offsets_for_forward(model, IDS, alora_offsets=[1]) == {"alora_offsets": [1]}
    assert get_alora_offsets_for_generate(model, input_ids=IDS, alora_offsets=[1])["alora_offsets"] == [1]
    plain = get_peft_model(Net(), LoraConfig(target_modules=["proj"], r=2))
    assert get_alora_offsets_for_forward(plain, IDS, use_cache=False) == {"use_cache": False}


def test_embeddings_alone_warn() -> None:
    model = net()
    with pytest.warns(UserWarning, match="inputs_embeds has no token ids"):
        assert get_alora_offsets_for_forward(model, inputs_embeds=torch.zeros(1, 2, 4)) == {"alora_offsets": None}
    with pytest.warns(UserWarning, match="there are no input_ids"):
        assert get_alora_offsets_for_generate(model, max_length=3) == {"max_length": 3, "alora_offsets": None}
