"""A directory of AdaLoRA becomes plain LoRA bit for bit."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import SHAPE, TOKENS, llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peftcore import (
    AdaLoraConfig,
    ConfigError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peftcore.conversion import convert_directory_to_lora, save_as_lora
from peftcore.files import damaged_files
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


def adalora(base: Any, **options: Any) -> Any:
    """Trained by random gradients until some layers have lost triplets, and one has lost them all."""
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "init_r": 4,
        "target_r": 2,
        "total_step": 6,
        "target_modules": "all-linear",
        "lora_alpha": 12,
    }
    model = get_peft_model(base, AdaLoraConfig(init_lora_weights=False, **{**given, **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 7):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        first: Any = next(iter(adapter_set(model).of_method("default").values()))
        for parameter in first.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.on_optimizer_step(step, optimizer if step == 6 else None)
    return model.eval()


def test_the_same_function_to_the_bit(tmp_path: Path) -> None:
    model = adalora(llama())
    expected, before = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    save_as_lora(tmp_path / "lora", model)
    here = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert torch.equal(here(TOKENS).logits, expected)
    assert (expected - llama()(TOKENS).logits).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert damaged_files(tmp_path / "lora") == []


def test_layers_keep_their_rank_and_scaling_and_those_of_rank_0_are_no_targets(tmp_path: Path) -> None:
    model = adalora(llama())
    layers: Any = adapter_set(model).of_method("default")
    ranks = {path: len(adapter.lora_E_weight) for path, adapter in layers.items()}
    assert min(ranks.values()) == 0 < 2 < max(ranks.values())
    save_as_lora(tmp_path, model)
    config: Any = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig) and config.target_modules == {path for path, rank in ranks.items() if rank}
    loaded: Any = adapter_set(PeftModel.from_pretrained(llama(), tmp_path)).of_method("default")
    assert {path: adapter.r for path, adapter in loaded.items()} == {path: r for path, r in ranks.items() if r}
    assert all(adapter.scaling == pytest.approx(12 / 4.00001, rel=1e-15) for adapter in loaded.values())


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_hf_peft_reads_it_as_lora_whoever_trained_it(writer: str, tmp_path: Path) -> None:
    if writer == "ours":
        model = adalora(llama())
        save_as_lora(tmp_path / "lora", model)
    else:
        model = peft.get_peft_model(
            llama(),
            peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, deltaT=1, target_modules=["q_proj", "up_proj"]),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        for step in range(6):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)  # type: ignore[operator]
            optimizer.zero_grad()
        model.eval().save_pretrained(str(tmp_path / "adalora"))
        convert_directory_to_lora(tmp_path / "adalora", tmp_path / "lora")
    with torch.no_grad():
        expected = model(TOKENS).logits
        there = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
        assert there.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(there(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            PeftModel.from_pretrained(llama(), tmp_path / "lora")(TOKENS).logits, expected, rtol=1e-5, atol=1e-5
        )
        assert (expected - llama()(TOKENS).logits).abs().max() > 1e-3


def test_triplets_that_are_masked_and_not_pruned_are_left_out(tmp_path: Path) -> None:
    model = adalora(llama(), total_step=12)  # the budget is still falling
    layers: Any = adapter_set(model).of_method("default")
    assert any(0 < int(a.kept.sum()) < len(a.lora_E_weight) for a in layers.values())
    save_as_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-6)
    found: Any = adapter_set(loaded).of_method("default")
    assert {path: a.r for path, a in found.items()} == {p: int(a.kept.sum()) for p, a in layers.items() if a.kept.any()}


def test_heads_and_biases_trained_with_it_come_along(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3, attention_bias=True)).eval()

    model = adalora(classifier(), task_type="SEQ_CLS", bias="all")
    save_as_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)
    assert not torch.equal(loaded.score.current().weight, classifier().score.weight)


def test_what_no_lora_equals_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="holds a LORA adapter; only ADALORA"):
        convert_directory_to_lora(tmp_path / "lora", tmp_path / "out")
    empty = adalora(llama())
    for adapter in adapter_set(empty).of_method("default").values():
        adapter.kept = torch.zeros(4, dtype=torch.bool)  # type: ignore[assignment]
        for name in ("lora_A_weight", "lora_E_weight"):
            setattr(adapter, name, nn.Parameter(getattr(adapter, name)[:0]))
        adapter.lora_B_weight = nn.Parameter(adapter.lora_B_weight[:, :0])  # type: ignore[index]
    with pytest.raises(ConfigError, match="every layer of this ADALORA adapter has rank 0"):
        save_as_lora(tmp_path / "out", empty)
    with_biases = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
    with pytest.raises(ConfigError, match="lora_only"):
        save_as_lora(tmp_path / "out", adalora(with_biases, bias="lora_only"))
    assert not (tmp_path / "out").exists()
