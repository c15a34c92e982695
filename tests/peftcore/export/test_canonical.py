"""The canonical form adds to each weight what the adapter does, from a model and from a directory alike."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import (
    AdaLoraConfig,
    BeftConfig,
    LilyConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peftcore.export import CanonicalLora, ExportError, canonicalise
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


def llama() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval()


def adapted(config: PeftConfig) -> Any:
    model = get_peft_model(llama(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def assert_adds_what_it_should(lora: CanonicalLora, model: Any) -> None:
    adapters = adapter_set(model).adapters("default")
    assert lora.layers.keys() == adapters.keys()
    for path, (a, b) in lora.layers.items():
        assert (len(a), b.shape[1]) == (lora.rank, lora.rank)
        torch.testing.assert_close(b @ a, adapters[path].delta_weight().detach(), rtol=1e-5, atol=1e-6)


PLAIN: dict[str, PeftConfig] = {
    "patterns": LoraConfig(
        target_modules=["q_proj", "up_proj"],
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"up_proj": 6},
        alpha_pattern={"layers.1.*q_proj": 9},
    ),
    "embeddings": LoraConfig(target_modules=["embed_tokens", "lm_head"], r=3),
    "pissa": LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=4),
}


@pytest.mark.filterwarnings("ignore:.*are not exported and not compared:UserWarning")
@pytest.mark.parametrize("method", PLAIN)
def test_a_model_and_its_directory_give_the_same(method: str, tmp_path: Path) -> None:
    model = adapted(PLAIN[method])
    assert_adds_what_it_should(canonicalise(model), model)
    model.save_pretrained(tmp_path)
    found = canonicalise(tmp_path)
    assert_adds_what_it_should(found, model)
    assert (
        found.embeddings
        == canonicalise(model).embeddings
        == ({"model.embed_tokens"} if method == "embeddings" else set())
    )
    padded = canonicalise(tmp_path, rank=16)
    assert padded.rank == 16
    assert_adds_what_it_should(padded, model)
    with pytest.raises(ExportError, match="rank 1 is below the adapter's"):
        canonicalise(tmp_path, rank=1)


def test_vera_is_low_rank_where_its_model_is() -> None:
    model = adapted(VeraConfig(target_modules=["q_proj", "down_proj"], r=5))
    assert_adds_what_it_should(canonicalise(model), model)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_hf_pefts_own_directory(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config: Any = {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**config, init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    lora = canonicalise(tmp_path)
    assert lora.rank == 4 and len(lora.layers) == 4
    for path, (a, b) in lora.layers.items():
        layer: Any = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    theirs.save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(ExportError, match="subtracts a residual from the base; load the adapter onto the model"):
        canonicalise(tmp_path / "pissa")


@pytest.mark.filterwarnings("ignore:lora_bias. .* has no bias")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), r"DoRA is not low-rank; convert it by"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save, a task head"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "trains biases"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), "aLoRA acts at some positions only"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices is not read"),
        (LoHaConfig(target_modules=["q_proj"]), "is not low-rank"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_advice(config: PeftConfig, match: str, tmp_path: Path) -> None:
    model = adapted(config)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ExportError, match=match):
            canonicalise(source)


@pytest.mark.filterwarnings("ignore:BEFT. .* has no bias")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (BeftConfig(target_modules=["q_proj"]), "changes the layer's bias too"),
        (LilyConfig(target_modules=["q_proj"], r=2, num_B=2), "mixes its experts anew"),
    ],
)
def test_adapters_that_no_weight_equals_are_refused(config: PeftConfig, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        canonicalise(adapted(config))


def test_a_merged_adapter_is_refused() -> None:
    model = adapted(LoraConfig(target_modules=["q_proj"], r=2))
    model.merge_adapter()
    with pytest.raises(ExportError, match="call unmerge_adapter first"):
        canonicalise(model)


def test_saved_embeddings_that_are_left_out_are_said(tmp_path: Path) -> None:
    adapted(PLAIN["embeddings"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds embeddings of the base .*lm_head.* not compared"):
        canonicalise(tmp_path)
