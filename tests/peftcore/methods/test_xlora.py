"""X-LoRA on whole models: parity with HF PEFT, both ways, and saving."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from method_example import Example, randomise
from parity_log import agree
from safetensors.torch import save_file
from xlora_models import build, config, llama, mixed, tokens, trained_loras

from peftcore import CheckpointError, ConfigError, LoraConfig, PeftModel, get_peft_model
from peftcore.methods.xlora import XLoraConfig

EXAMPLE = Example(XLoraConfig, options={"hidden_size": 32, "adapters": {"0": "unread"}}, whole_model=True)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise and deep": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 16, "softmax_temperature": 0.5},
    "deep without dropout": {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0},
    "no softmax": {"enable_softmax": False, "global_scaling_weight": 0.5},
    "top k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "scaling_pass_value": 0.25},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family, case", [*(("llama", case) for case in CASES), ("mistral", "plain"), ("qwen2", "plain")]
)
def test_parity_both_ways(family: str, case: str, tmp_path: Path) -> None:
    options, loras = CASES[case], trained_loras(tmp_path / "loras", family)
    theirs = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=dict(loras), **options)
    hf = peft.get_peft_model(build(family), theirs).eval()
    randomise(hf, 0.5)
    hf.save_pretrained(tmp_path / "hf")
    # PEFT 0.21.2 leaves out the classifier's layers whose number is the name that it gives to a LoRA
    whole = {key: tensor for key, tensor in hf.state_dict().items() if "internal_xlora_classifier" in key}
    save_file(whole, tmp_path / "hf" / "adapter_model.safetensors")
    expected = hf(input_ids=tokens()).logits
    here = PeftModel.from_pretrained(build(family), tmp_path / "hf")
    assert (expected - build(family)(tokens()).logits).abs().max() > 1e-2
    agree(here(tokens()).logits, expected, "XLORA", family, made_by="peft")

    model = mixed(loras, family, **options)
    model.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    agree(model(tokens()).logits, there(input_ids=tokens()).logits, "XLORA", family, made_by="peftcore")


@pytest.mark.filterwarnings("ignore")
def test_the_methods_of_hf_pefts_model(tmp_path: Path) -> None:
    loras = trained_loras(tmp_path / "loras", "llama")
    model: Any = mixed(loras, layerwise_scalings=True)
    model.save_pretrained(tmp_path / "mixture")
    there: Any = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "mixture").eval()
    changes: list[tuple[str, Any]] = [
        ("set_topk_lora", 2),
        ("set_global_scaling_weight", 0.5),
        ("set_scaling_pass_value", 0.3),
        ("set_scaling_pass_value", None),
        ("set_topk_lora", None),
    ]
    for name, value in changes:
        getattr(model, name)(value)
        getattr(there, name)(value)
        before = model(tokens()).logits
        torch.testing.assert_close(before, there(input_ids=tokens()).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.get_latest_scalings(), there.get_latest_scalings())
    config = model.peft_config["default"]
    assert (config.top_k_lora, config.global_scaling_weight, config.scaling_pass_value) == (None, 0.5, 1 / 3)
    assert model.get_global_scaling_weight() == there.get_global_scaling_weight() == 0.5
    with pytest.raises(ConfigError, match="top_k_lora must be 1 to 3; got 4"):
        model.set_topk_lora(4)
    assert not hasattr(get_peft_model(llama(), LoraConfig()), "set_topk_lora")


def test_save_and_load_keeps_the_classes_in_order(loras: dict[str, str], tmp_path: Path) -> None:
    names = {"10": loras["1"], "9": loras["0"], "11": loras["2"]}
    assert [str(d) for d in config(names).directories()] == list(loras.values())
    model = mixed(names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert "target_modules" not in (tmp_path / "adapter_config.json").read_text()


def test_loras_that_were_moved_are_named_by_adapters(loras: dict[str, str], tmp_path: Path) -> None:
    model = mixed(loras)
    model.save_pretrained(tmp_path / "mixture")
    moved = {name: str(shutil.copytree(place, tmp_path / f"moved-{name}")) for name, place in loras.items()}
    config = tmp_path / "mixture" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(Path(loras["0"]).parent), "/nowhere"))
    (tmp_path / "mixture" / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="nowhere"):
        PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "mixture", adapters=moved)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert loaded.peft_config["default"].adapters == moved
    loaded.delete_adapter("default")
    loaded.load_adapter(tmp_path / "mixture", "again", adapters=moved)
    loaded.set_adapter("again")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_adapters_is_an_option_of_xlora_only(loras: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="adapters is an option of X-LoRA; the adapter is LORA"):
        PeftModel.from_pretrained(llama(), loras["0"], adapters=loras)
    with pytest.raises(ConfigError, match="adapters is an option of X-LoRA"):
        get_peft_model(llama(), LoraConfig()).load_adapter(loras["0"], "other", adapters=loras)
