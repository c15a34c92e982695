"""`load_adapter` of a plain transformers model: its options and its errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from peftcore import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    HotswapError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.hf_peft.transformers_models import load_adapter
from peftcore.injection.adapter_set import adapter_set


def llama(hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(8).reshape(2, 4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_model_keeps_its_class_and_computes_with_the_adapter(saved: Path) -> None:
    model, kind = llama(), type(llama())
    base = logits(model)
    info = load_adapter(model, saved)
    assert type(model) is kind and not info.missing_keys and not info.unexpected_keys
    assert not torch.equal(logits(model), base)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert list(model.peft_config) == ["default"] and model._hf_peft_config_loaded


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]}])
def test_an_adapter_fits_the_model_with_and_without_its_head(tmp_path: Path, options: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
    trained = get_peft_model(llama(), config)
    trained.save_pretrained(tmp_path / "head")
    expected = trained.model(IDS).last_hidden_state
    headless = llama().model
    info = load_adapter(headless, tmp_path / "head")
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(headless(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)

    get_peft_model(llama().model, config).save_pretrained(tmp_path / "none")
    model = llama()
    load_adapter(model, tmp_path / "none")
    other = PeftModel.from_pretrained(llama().model, tmp_path / "none")
    torch.testing.assert_close(model.model(IDS)[0], other(IDS)[0], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_model_does_not_fit_with_any_head(saved: Path) -> None:
    headless = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1)).model
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(headless, saved)


def test_a_trainable_adapter_alone_trains(saved: Path) -> None:
    model = llama().train()
    load_adapter(model, str(saved), "first", is_trainable=True)
    assert model.training
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    load_adapter(model, str(saved), "second", is_trainable=True)
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_configuration_and_the_tensors_may_be_given(saved: Path) -> None:
    expected = llama()
    load_adapter(expected, saved)
    tensors = get_peft_model_state_dict(expected)
    model = llama()
    load_adapter(
        model, adapter_state_dict=tensors, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="x"
    )
    assert torch.equal(logits(model), logits(expected))


def test_tensors_that_do_not_fit_leave_the_model_as_it_was(saved: Path) -> None:
    model = llama()
    tensors = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(5, 5)}
    with pytest.raises(CheckpointError, match="another"):
        load_adapter(model, adapter_state_dict=tensors, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert not len(model.peft_config)
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, AdapterNameError, "'default' is loaded already; give another adapter_name"),
        ({"adapter_name": "b", "hotswap": True}, AdapterNameError, "exchanges a loaded adapter"),
        ({"hotswap": True, "low_cpu_mem_usage": True}, ConfigError, "must be False with hotswap"),
        ({"hotswap": True, "peft_config": LoraConfig()}, ConfigError, "peft_config must be None with hotswap"),
        ({"hotswap": True, "adapter_state_dict": {}}, ConfigError, "adapter_state_dict needs peft_config"),
        ({"adapter_name": "b", "hotswap": "no"}, ConfigError, "hotswap must be True, False or 'auto'; got 'no'"),
        ({"adapter_name": "b", "revision": "x"}, TypeError, "no option 'revision'; .* adapter_kwargs"),
        ({"adapter_name": "b", "adapter_kwargs": {"revizion": "x"}}, TypeError, "no option 'revizion'"),
        ({"adapter_name": "b", "use_safetensors": False}, ConfigError, "pickles are never read"),
        ({"adapter_name": "b", "adapter_state_dict": {}}, ConfigError, "adapter_state_dict needs peft_config"),
        ({"adapter_name": "b", "peft_model_id": None}, ConfigError, "needs a directory or a hub id"),
        ({"adapter_name": "b", "peft_model_id": Path("/nothing/here")}, CheckpointError, "/nothing/here"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    saved: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = llama()
    load_adapter(model, saved)
    before = logits(model)
    with pytest.raises(error, match=message):
        load_adapter(model, **{"peft_model_id": saved, **arguments})
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


@pytest.mark.parametrize("from_tensors", [False, True])
def test_a_prompt_is_refused_because_a_direct_forward_would_leave_it_out(tmp_path: Path, from_tensors: bool) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    source: dict[str, Any] = {"adapter_state_dict": tensors, "peft_config": config} if from_tensors else {}
    model = llama()
    with pytest.raises(ConfigError, match="PROMPT_TUNING; load the adapter with PeftModel"):
        load_adapter(model, None if from_tensors else tmp_path, **source)
    assert torch.equal(logits(model), logits(llama())) and all(p.requires_grad for p in model.parameters())


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A saved LoRA of another rank on the same layers."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llama(), config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def loaded(*arguments: Any, **options: Any) -> LlamaForCausalLM:
    model = llama()
    load_adapter(model, *arguments, **options)
    return model


def test_keys_that_a_state_dict_lacks_or_has_too_many_are_logged(saved: Path, monkeypatch: Any) -> None:
    source: Any = loaded(saved)
    tensors = get_peft_model_state_dict(source)
    key = next(iter(tensors))
    tensors["foreign"] = tensors.pop(key)
    reports: list[str] = []
    monkeypatch.setattr("transformers.integrations.peft.logger.warning", reports.append)
    model = llama()
    info = load_adapter(model, adapter_state_dict=tensors, peft_config=source.peft_config["default"])
    assert info.missing_keys == {"model.layers.0.self_attn.q_proj.lora_A.default.weight"}
    assert info.unexpected_keys == {"foreign"}
    (report,) = reports
    assert "lora_A.default.weight | MISSING" in report and "foreign" in report
    load_adapter(llama(), saved)
    assert reports == [report]


@pytest.mark.parametrize("from_tensors", [False, True])
def test_a_hotswap_gives_the_outputs_of_the_other_adapter(saved: Path, other: Path, from_tensors: bool) -> None:
    model, expected = loaded(saved), loaded(other)
    if from_tensors:
        source: dict[str, Any] = {"adapter_state_dict": get_peft_model_state_dict(expected)}
        source["peft_config"] = expected.peft_config["default"]
    else:
        source = {"peft_model_id": other}
    info = load_adapter(model, **source, hotswap=True, is_trainable=True)
    assert not info.missing_keys and list(model.peft_config) == ["default"]
    torch.testing.assert_close(logits(model), logits(expected))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_an_exchange_keeps_the_memory_after_enable_peft_hotswap(saved: Path, other: Path) -> None:
    model = llama()
    model.enable_peft_hotswap(target_rank=5)
    load_adapter(model, saved)
    torch.testing.assert_close(logits(model), logits(loaded(saved)))
    parameters = {name: (id(p), p.shape) for name, p in model.named_parameters() if "lora_" in name}
    assert all(5 in shape for _, shape in parameters.values())
    load_adapter(model, other)
    assert parameters == {name: (id(p), p.shape) for name, p in model.named_parameters() if "lora_" in name}
    torch.testing.assert_close(logits(model), logits(loaded(other)))
    with pytest.raises(AdapterNameError, match="hotswap=True to exchange it"):
        load_adapter(model, saved, hotswap=False)


@pytest.mark.slow
def test_an_exchange_compiles_nothing_anew(saved: Path, other: Path) -> None:
    torch._dynamo.reset()
    model = llama()
    model.enable_peft_hotswap(target_rank=4)
    load_adapter(model, saved)
    compiled: Any = torch.compile(model, backend="eager")
    logits(compiled)
    load_adapter(model, other)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled), logits(loaded(other)))


def test_a_rank_above_the_stated_one_leaves_the_model_as_it_was(other: Path) -> None:
    model = llama()
    model.enable_peft_hotswap(target_rank=2)
    with pytest.raises(HotswapError, match="rank"):
        load_adapter(model, other)
    assert not getattr(model, "peft_config", None) and torch.equal(logits(model), logits(llama()))


def test_only_the_exchanged_adapter_changes(saved: Path, other: Path) -> None:
    model = loaded(saved, "first")
    load_adapter(model, saved, "second")
    load_adapter(model, other, "first", hotswap=True)
    assert list(adapter_set(model).selection.active) == ["second"]
    torch.testing.assert_close(logits(model), logits(loaded(saved)))


def test_from_pretrained_replaces_what_transformers_has_loaded(saved: Path, other: Path) -> None:
    model = loaded(saved)
    before = logits(model)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(model, "/nothing/here")
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="'default' was loaded already and is replaced"):
        adapted: Any = PeftModel.from_pretrained(model, other)
    assert list(adapted.peft_config) == ["default"] == list(adapted.active_adapters)
    torch.testing.assert_close(logits(adapted), logits(loaded(other)))


@pytest.mark.parametrize("from_tensors", [False, True])
def test_the_key_mapping_of_from_pretrained_renames_saved_keys(saved: Path, from_tensors: bool) -> None:
    expected = logits(loaded(saved))
    tensors = {key.replace("model.layers", "trunk.blocks"): t for key, t in load_file(saved / WEIGHTS_NAME).items()}
    if not from_tensors:
        save_file(tensors, saved / WEIGHTS_NAME)
        (saved / "SHA256SUMS").unlink(missing_ok=True)
    source: dict[str, Any] = {"peft_model_id": saved}
    if from_tensors:
        source = {"adapter_state_dict": tensors, "peft_config": PeftConfig.from_pretrained(saved)}
    model = llama()
    mapping: Any = get_model_conversion_mapping(model, {r"^trunk\.": "model.", r"\.blocks\.(\d+)": r".layers.\1"})
    info = load_adapter(model, **source, load_config=LoadStateDictConfig(weight_mapping=mapping))
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(logits(model), expected)


def test_options_of_weights_without_effect_warn(saved: Path) -> None:
    model = llama()
    with pytest.warns(UserWarning, match="device_map, dtype has no effect on an adapter"):
        load_adapter(model, saved, device_map="auto", dtype=torch.float16)
    assert torch.equal(logits(model), logits(loaded(saved)))
    assert {tensor.dtype for tensor in adapter_set(model).tensors()} == {torch.float32}


def test_missing_sizes_and_low_memory(saved: Path) -> None:
    model = llama()
    load_adapter(model, saved, low_cpu_mem_usage=True)
    expected = llama()
    load_adapter(expected, saved)
    assert torch.equal(logits(model), logits(expected))
    other = llama(hidden_size=48)
    with pytest.warns(UserWarning, match="shape|sizes"):
        load_adapter(other, saved, ignore_mismatched_sizes=True)
    with pytest.raises(CheckpointError):
        load_adapter(llama(hidden_size=48), saved)
