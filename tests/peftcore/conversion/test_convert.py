"""Any mergeable adapter becomes a plain LoRA of its model, or a directory that HF PEFT reads."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import OTHERS, TOKENS, llama, random_adapter
from torch import nn

from peftcore import (
    ConfigError,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    conversion,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftcore.conversion import add_as_lora, convert_to_lora, save_as_lora
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


@pytest.mark.parametrize("method", OTHERS)
def test_any_mergeable_method_becomes_a_lora_of_its_model(method: str) -> None:
    config, rank = OTHERS[method]
    model = random_adapter(config)
    expected = model(TOKENS).logits
    report = add_as_lora(model, "default", "plain", rank=rank)
    assert report.error < 1e-5 and max(report.errors.values()) < 1e-5 and max(report.ranks.values()) <= rank
    assert torch.equal(model(TOKENS).logits, expected)  # the new one does not act yet
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(TOKENS).logits - expected).abs().max() > 3e-4


@pytest.mark.filterwarnings("ignore:.*is a plain LoRA already")
def test_training_the_adapter_later_leaves_the_lora_as_it_was() -> None:
    model = random_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    expected = model(TOKENS).logits
    add_as_lora(model, "default", "plain")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter += 1.0
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 3}),
        LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", r=3, alpha_pattern={"q_proj": 2}),
        LoraConfig(target_modules=["embed_tokens", "lm_head"], r=3),
        VeraConfig(target_modules=["q_proj", "down_proj"], r=5),
    ],
    ids=["rslora", "pissa", "embedding", "vera"],
)
def test_low_rank_methods_convert_exactly_and_hf_peft_reads_them(config: PeftConfig, tmp_path: Path) -> None:
    model = random_adapter(config)
    report = save_as_lora(tmp_path, model)
    assert PeftConfig.from_pretrained(tmp_path).inference_mode
    assert report.error == 0 and set(report.errors.values()) == {0}
    with torch.no_grad():
        expected = model(TOKENS).logits
        here = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)


def test_saved_modules_come_along_in_the_model() -> None:
    model = random_adapter(
        LoHaConfig(target_modules=["q_proj"], r=2, modules_to_save=["model.norm"], init_weights=False)
    )
    expected = model(TOKENS).logits
    add_as_lora(model, "default", "plain", tolerance=1e-6)
    model.set_adapter("plain")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_saved_modules_come_along_beside_layers_that_never_changed() -> None:
    model = get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"], r=2, modules_to_save=["model.norm"])).eval()
    torch.nn.init.ones_(model.get_submodule("model.norm").modules_to_save["default"].weight)
    config, tensors = convert_to_lora(model, rank=2)
    new = get_peft_model(llama(), config).eval()
    assert not set_peft_model_state_dict(new, tensors).unexpected_keys
    assert torch.equal(new(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ConfigError, match="every layer of this LOHA adapter has rank 0"):
        convert_to_lora(get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"], r=2)), rank=2)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("rank", [3, 0.9])
def test_the_same_change_as_with_hf_peft(rank: float, tmp_path: Path) -> None:
    config = LoHaConfig(target_modules=["q_proj", "down_proj"], r=3, alpha=24, init_weights=False)
    random_adapter(config).save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    our_config, our_tensors = convert_to_lora(ours, rank=rank)
    their_config, their_tensors = peft.convert_to_lora(theirs, rank=rank)
    for option in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "inference_mode"):
        assert getattr(our_config, option) == getattr(their_config, option), option
    assert our_tensors.keys() == their_tensors.keys()
    for key in our_tensors:
        assert our_tensors[key].shape == their_tensors[key].shape
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            change = our_tensors[other] @ our_tensors[key]
            torch.testing.assert_close(change, their_tensors[other] @ their_tensors[key], rtol=1e-4, atol=1e-6)


def test_a_given_rank_puts_the_scaling_into_b() -> None:
    model = random_adapter(LoraConfig(target_modules=["q_proj"], r=3, lora_alpha=7, use_rslora=True))
    config, tensors = convert_to_lora(model, rank=5)
    assert (config.r, config.lora_alpha) == (5, 5) and set(config.rank_pattern.values()) == {3}
    for path, adapter in adapter_set(model).adapters("default").items():
        a, b = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(b @ a, adapter.delta_weight())
    new = get_peft_model(llama(), config)
    assert not set_peft_model_state_dict(new, tensors).unexpected_keys
    assert new.get_nb_trainable_parameters()[0] == sum(tensor.numel() for tensor in tensors.values())
    torch.testing.assert_close(new.eval()(TOKENS).logits, model(TOKENS).logits)


def test_every_layer_has_its_own_rank_for_a_share() -> None:
    model = random_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], r=1, use_rslora=True))
    config, tensors = convert_to_lora(model, rank=1.0)
    assert len(config.rank_pattern) == len(tensors) / 2 == 4 and config.r == 1
    assert config.rank_pattern == config.alpha_pattern


def test_tensors_have_the_type_of_the_adapter() -> None:
    config = LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False)
    for autocast, expected in ((False, torch.bfloat16), (True, torch.float32)):
        model = get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=autocast)
        assert {tensor.dtype for tensor in convert_to_lora(model, rank=2)[1].values()} == {expected}


def test_a_plain_lora_needs_no_conversion() -> None:
    model = random_adapter(LoraConfig(target_modules=["q_proj"], r=3))
    with pytest.warns(UserWarning, match="is a plain LoRA already") as warned:
        convert_to_lora(model, rank=2)
    assert warned[0].filename == __file__
    for config in (
        LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights="pissa"),
        LoraConfig(target_modules=["q_proj"], r=3, trainable_token_indices=[2]),
        LoraConfig(target_modules=["q_proj"], r=3, use_dora=True),
    ):
        convert_to_lora(random_adapter(config), rank=2)  # no warning, because they become plain


def test_a_model_without_adapters_cannot_be_converted() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapters"):
        convert_to_lora(llama(), rank=2)


def test_a_model_whose_class_is_unchanged_has_keys_without_the_prefix() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_rslora=True)
    net = inject_adapter_in_model(config, net)
    _, tensors = convert_to_lora(net)
    assert set(tensors) == {"0.lora_A.weight", "0.lora_B.weight"}


def test_options_of_the_conversion_act(capsys: pytest.CaptureFixture[str]) -> None:
    model = random_adapter(LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False))
    expected = convert_to_lora(model, 3)[1]
    assert "Converting to LoRA" not in capsys.readouterr().err
    convert_to_lora(model, 3, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err
    calls = []

    def backend(graph: Any, _inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    compiled = convert_to_lora(model, 3, compile_kwargs={"backend": backend})[1]
    assert calls
    for key, tensor in expected.items():
        torch.testing.assert_close(compiled[key], tensor)


def test_arguments_in_the_old_order_are_explained(tmp_path: Path) -> None:
    model = random_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ConfigError, match=r"call add_as_lora\(model, adapter_name, new_name\)"):
        convert_to_lora(model, "default", "plain")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes the directory first"):
        save_as_lora(model, tmp_path)  # type: ignore[arg-type]
    for rank in (0, -1, True, 0.0, 1.5, 17):  # 17: above the size of every layer
        with pytest.raises(ConfigError, match="rank"):
            convert_to_lora(model, rank)


def test_the_old_name_of_the_report_warns() -> None:
    with pytest.warns(DeprecationWarning, match="now called LowRankReport"):
        assert conversion.Conversion is conversion.LowRankReport
