"""`initialize_from_data` for all data-driven initialisations."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from observed_lora import TOKENS, batches, llama, lora

from peftcore import ConfigError, LoraConfig, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.start_from_data import initialize_from_data

pytestmark = pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")  # EVA or CorDA by defaults


@pytest.mark.parametrize(
    "start, options",
    [
        ("corda", {}),
        ("corda", {"corda_config": {"corda_method": "kpm"}}),
        ("lora_ga", {}),
        ("lora_ga", {"lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "random", "scale": "unit"}}),
    ],
)
def test_what_is_taken_out_of_the_base_changes_no_output(start: str, options: dict[str, Any], tmp_path: Any) -> None:
    base = llama()(TOKENS).logits
    model = lora(start, **options)
    initialize_from_data(model, batches(), progress=False)
    torch.testing.assert_close(model(TOKENS).logits, base, rtol=1e-4, atol=1e-5)
    layers = adapter_set(model).adapters("default")
    assert all(a.lora_A_weight.abs().max() > 0 and a.lora_B_weight.abs().max() > 0 for a in layers.values())
    with torch.no_grad():
        for a in layers.values():
            a.lora_B_weight.mul_(10)
    adapted = model(TOKENS).logits
    assert not torch.allclose(adapted, base, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)  # plain LoRA of twice the rank: no data is needed to read it
    assert loaded.peft_config["default"].r == 8
    torch.testing.assert_close(loaded(TOKENS).logits, adapted, rtol=1e-4, atol=1e-5)
    again = lora(start, **options)
    again.load_adapter_weights(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, adapted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.unload()(TOKENS).logits, base, rtol=0, atol=0)


def test_quantised_bases_can_be_looked_at_too() -> None:
    model = llama()
    for block in model.model.layers:
        made = bnb.nn.Linear4bit(16, 16, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        made.load_state_dict(block.self_attn.q_proj.state_dict())
        block.self_attn.q_proj = made.to("cpu")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lora_ga")).train()
    base = model(TOKENS).logits
    initialize_from_data(model, batches(2), progress=False)
    torch.testing.assert_close(model(TOKENS).logits, base, rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_changes_nothing() -> None:
    model = lora("eva")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="no batch"):
        initialize_from_data(model, [], progress=False)
    with pytest.raises(ConfigError, match="give batches with labels"):
        initialize_from_data(lora("lora_ga"), [{"input_ids": TOKENS}], progress=False)
    with pytest.raises(ConfigError, match="needs no data for its initialisation"):
        initialize_from_data(lora("gaussian"), batches(), progress=False)
    with pytest.raises(ConfigError, match="unknown"):
        initialize_from_data(lora("corda", corda_config={"corda_methd": "ipm"}), batches(), progress=False)
    with pytest.raises(ConfigError, match="at most 8"):
        initialize_from_data(lora("lora_ga", r=9, target_modules=["q_proj"]), batches(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
