"""The state of an adapter has HF PEFT's keys, and reads a directory's tensors by them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peftcore.config import PeftConfig
from peftcore.injection.adapter_set import adapter_set
from peftcore.storage.adapter_state import AdapterState, adapter_state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle warns on import
    import peft


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 12}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def state_of(config: PeftConfig, base: Any = None, name: str = "default") -> AdapterState:
    model = get_peft_model(base or llama(), config, name)
    return adapter_state_of(adapter_set(model), name)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


# -- keys -------------------------------------------------------------------------------------------------------------

Q = ["q_proj", "embed_tokens"]
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "lora": (LoraConfig, "LoraConfig", {"r": 2, "target_modules": Q}),
    "dora": (LoraConfig, "LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "ia3": (IA3Config, "IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": []}),
    "modules_to_save": (
        LoraConfig,
        "LoraConfig",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "token rows": (LoraConfig, "LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "vera, shared by all layers": (VeraConfig, "VeraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "prompt": (PromptTuningConfig, "PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_keys_and_shapes_are_those_of_hf_peft(case: str) -> None:
    ours, theirs, options = CASES[case]
    hf: Any = peft.get_peft_model(llama(), getattr(peft, theirs)(**copy.deepcopy(options)))
    expected = peft.get_peft_model_state_dict(hf, save_embedding_layers=False)
    found = state_of(ours(**options)).tensors()
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("parameters", [["0.weight"], ["0.weight", "0.factors"]])
def test_keys_of_biases_beside_raw_parameters_are_those_of_hf_peft(bias: str, parameters: list[str]) -> None:
    def base() -> nn.Module:
        layers = net()
        layers[0].factors = nn.Parameter(torch.zeros(6, 6))  # type: ignore[index]
        return layers

    options: dict[str, Any] = {"r": 2, "target_modules": ["1"], "target_parameters": parameters, "bias": bias}
    hf = peft.get_peft_model(base(), peft.LoraConfig(**options))  # type: ignore[arg-type]
    expected = set(peft.get_peft_model_state_dict(hf))
    assert f"base_model.model.0{'.base_layer' * len(parameters)}.bias" in expected
    assert state_of(LoraConfig(**options), base()).tensors().keys() == expected


def test_the_name_of_an_adapter_is_in_none_of_its_keys() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"], bias="lora_only")
    assert state_of(config, name="named").tensors().keys() == state_of(config).tensors().keys()


def test_a_raw_parameter_is_saved_below_the_module_that_holds_it() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(2, 4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->beo", x, self.up)

    state = state_of(LoraConfig(r=2, target_parameters=["experts.up"]), nn.ModuleDict({"experts": Experts()}))
    assert set(state.tensors()) == {f"base_model.model.experts.lora_{factor}.weight" for factor in "AB"}


def test_paths_and_prefixes_of_the_base_are_those_of_the_wrapped_modules() -> None:
    state = state_of(LoraConfig(target_modules=["0"], modules_to_save=["1"]), net())
    assert state.paths() == {"0", "1"}
    assert state.base_prefix("0") == "base_model.model.0.base_layer."
    assert state.base_prefix("elsewhere") == "base_model.model.elsewhere."
    prompt = state_of(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert prompt.base_prefix("model.embed_tokens") == "base_model.model.embed_tokens."


# -- trained biases ---------------------------------------------------------------------------------------------------


def test_a_trained_bias_is_below_the_base_layer_of_an_adapted_layer_only() -> None:
    state = state_of(LoraConfig(target_modules=["0"], bias="all"), net())
    assert state.bias_keys == ["base_model.model.0.base_layer.bias", "base_model.model.1.bias"]


def test_either_spelling_of_a_bias_is_read() -> None:
    state = state_of(LoraConfig(target_modules=["0"], bias="all"), net())
    own = state.tensors()
    other = {
        key.replace("0.base_layer.bias", "0.bias").replace("1.bias", "1.base_layer.bias"): tensor
        for key, tensor in own.items()
    }
    assert other.keys() != own.keys() and state.with_our_keys(other).keys() == own.keys()
    assert state.with_our_keys(own) is own


def test_of_two_spellings_of_one_bias_ours_is_read() -> None:
    state = state_of(LoraConfig(target_modules=["0"], bias="lora_only"), net())
    both = {"base_model.model.0.base_layer.bias": torch.ones(6), "base_model.model.0.bias": torch.zeros(6)}
    assert torch.equal(state.with_our_keys(both)["base_model.model.0.base_layer.bias"], torch.ones(6))


# -- keys that may be there or may be absent --------------------------------------------------------------------------


def test_copies_of_trained_modules_that_peft_saves_twice_are_not_read() -> None:
    plain = state_of(LoraConfig(target_modules=["0"], modules_to_save=["1"]), net())
    prefix = "base_model.model.1."
    assert plain.repeated() == {f"{prefix}modules_to_save.weight", f"{prefix}modules_to_save.bias"}
    biased = state_of(LoraConfig(target_modules=["0"], modules_to_save=["1"], bias="all"), net())
    assert biased.repeated() == plain.repeated() | {f"{prefix}original_module.bias"}
    assert not plain.repeated() & plain.tensors().keys()


def test_shared_tensors_are_at_the_top_and_may_be_absent_only_if_their_method_says_so() -> None:
    state = state_of(VeraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert {"base_model.vera_A", "base_model.vera_B"} <= state.tensors().keys() and state.optional() == set()
    assert state.shared is not None
    state.shared.optional = frozenset({"vera_A"})
    assert state.optional() == {"base_model.vera_A"}
    assert state_of(LoraConfig(target_modules=["q_proj"])).optional() == set()


# -- reading ----------------------------------------------------------------------------------------------------------


def test_reading_gives_every_part_the_saved_values() -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], bias="lora_only")
    source, target = (get_peft_model(net(), config) for _ in range(2))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    saved = {key: t.clone() for key, t in adapter_state_of(adapter_set(source), "default").tensors().items()}
    base = target[0].base_layer.weight.clone()
    state = adapter_state_of(adapter_set(target), "default")
    before = adapter_set(target).adapters("default")["0"].changes
    state.read(saved)
    found = adapter_state_of(adapter_set(target), "default").tensors()
    assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
    assert torch.equal(target[0].base_layer.weight, base)
    assert adapter_set(target).adapters("default")["0"].changes > before, "caches must notice"


def test_an_adapter_without_values_keeps_the_tensors_that_it_reads_once() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    adapter = adapter_set(model).adapters("default")["0"]
    adapter.is_unread = True
    for shares in (True, False):
        saved = {
            key: tensor.clone() for key, tensor in adapter_state_of(adapter_set(model), "default").tensors().items()
        }
        adapter_state_of(adapter_set(model), "default").read(saved)
        saved["base_model.model.0.lora_A.weight"].fill_(7)
        assert bool((adapter.lora_A_weight == 7).all()) == shares and not adapter.is_unread
        adapter.lora_A_weight.data = torch.zeros(2, 6)


def test_another_shape_fits_only_where_the_method_can_adjust() -> None:
    """PiSSA is saved with its start, as a LoRA of twice the rank."""
    key = "base_model.model.0.lora_A.weight"
    lora, pissa = (
        state_of(LoraConfig(r=2, target_modules=["0"], init_lora_weights=start), net()) for start in (True, "pissa")
    )
    assert [lora.fits(key, torch.zeros(rank, 6)) for rank in (2, 3, 4)] == [True, False, False]
    assert [pissa.fits(key, torch.zeros(rank, 6)) for rank in (2, 3, 4)] == [True, False, True]
    assert not lora.fits("unknown", torch.zeros(1))
