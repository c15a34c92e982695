"""The reference is the same model with other adapters, and the model is afterwards as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import tiny_llama
from tiny_pairs import adapted, log_prob, pairs
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peftcore import (
    AdapterNameError,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peftcore.train import PreferenceCollator, pair_log_probs, reference_acting, reference_model


def test_a_pairs_log_probabilities_are_those_of_its_answers_alone() -> None:
    rows, model = pairs(4), adapted().double().eval()
    found = pair_log_probs(model, PreferenceCollator(0)(rows))
    for i, row in enumerate(rows):
        for side, values, tokens in (
            ("chosen", found.chosen, found.chosen_tokens),
            ("rejected", found.rejected, found.rejected_tokens),
        ):
            expected = log_prob(model, row[f"{side}_input_ids"], row[f"{side}_labels"])
            torch.testing.assert_close(values[i], expected, rtol=1e-10, atol=1e-10)
            assert tokens[i] == len(row[f"{side}_input_ids"]) - row["prompt_length"]


def test_without_an_adapter_the_reference_is_the_base() -> None:
    rows, base = pairs(3), tiny_llama().double().eval()
    model = adapted(lora_dropout=0.5).double().train()
    with reference_acting(model):
        found = pair_log_probs(model, PreferenceCollator(0)(rows))
        assert not model.training and not found.chosen.requires_grad
    expected = torch.stack([log_prob(base, row["chosen_input_ids"], row["chosen_labels"]) for row in rows])
    torch.testing.assert_close(found.chosen, expected, rtol=1e-10, atol=1e-10)


def test_a_named_adapter_is_the_reference_where_training_started_from_one(tmp_path: Path) -> None:
    model = adapted().double()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "start")
    batch = PreferenceCollator(0)(pairs(3))
    start = pair_log_probs(model.eval(), batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default.weight" in name:
                parameter.mul_(2)
    moved = pair_log_probs(model, batch)
    with reference_acting(model, "start"):
        reference = pair_log_probs(model, batch)
    torch.testing.assert_close(reference.chosen, start.chosen.detach())
    assert not torch.allclose(moved.chosen, start.chosen)


@pytest.mark.parametrize("adapter", [None, "other"])
def test_everything_is_as_before_afterwards(adapter: str | None) -> None:
    model = adapted(lora_dropout=0.5).train()
    model.add_adapter("other", model.peft_config["default"])
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), reference_acting(model, adapter):
        assert model.active_adapters == ["default" if adapter is None else adapter]
        _ = 1 / 0
    assert model.active_adapters == ["default"] and torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.eval()(ids).logits, tiny_llama().eval()(ids).logits)


def test_an_unknown_reference_is_an_error_that_names_the_known() -> None:
    model = adapted()
    with (
        pytest.raises(AdapterNameError, match="Adapter ref does not exist; loaded: default"),
        reference_acting(model, "ref"),
    ):
        pass
    assert torch.is_grad_enabled()


# -- a model of its own ------------------------------------------------------------------------------------------------


METHODS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "pissa": LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"),
    "dora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "whole modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "biases": LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "tokens": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def randomised(config: Any) -> Any:
    """A model whose adapter is not at its start."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "attention_bias": True}))
    model = get_peft_model(llama, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize("name", METHODS)
def test_a_reference_model_stays_as_the_model_was_and_shares_its_base(name: str) -> None:
    model = randomised(METHODS[name]).train()
    reference = reference_model(model)
    assert model.training and not reference.training and not any(p.requires_grad for p in reference.parameters())
    start = logits(model.eval())
    torch.testing.assert_close(logits(reference), start, rtol=0, atol=0)
    mine = {id(parameter) for parameter in reference.parameters()}
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert not mine & {id(parameter) for parameter in trains}
    frozen = [p for path, p in model.named_parameters() if not p.requires_grad and ".adapters." not in path]
    assert frozen and all(id(parameter) in mine for parameter in frozen)
    for parameter in trains:
        parameter.data.add_(0.1)
    assert not torch.allclose(logits(model), start, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(reference), start, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(reference), start, rtol=0, atol=0)


def test_a_reference_model_does_not_follow_a_merge_or_an_unload() -> None:
    model = randomised(METHODS["lora"]).eval()
    reference, start = reference_model(model), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(reference), start, rtol=0, atol=0)
    model.unmerge_adapter()
    model.unload()
    torch.testing.assert_close(logits(reference), start, rtol=0, atol=0)


def test_a_reference_model_may_have_a_base_of_its_own() -> None:
    model = randomised(METHODS["lora"])
    reference = reference_model(model, share_base=False)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in reference.parameters()}


def test_a_reference_model_of_a_4_bit_base_copies_no_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=storage)
    model = get_peft_model(base, METHODS["lora"]).eval()
    reference = reference_model(model)
    torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=0)
    pairs_of_layers = zip(model.modules(), reference.modules(), strict=True)
    packed = [(one, other) for one, other in pairs_of_layers if type(one).__name__ == "Linear4bit"]
    assert packed and all(one.weight is other.weight for one, other in packed)
