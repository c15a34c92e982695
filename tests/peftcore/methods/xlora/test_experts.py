"""The trained LoRAs that X-LoRA reads: which directories fit, and which are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import peft
from method_example import randomise
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from xlora_models import config, llama, mixed, tokens

from peftcore import CheckpointError, ConfigError, LoraConfig, TargetError, get_peft_model
from peftcore.bases import base_weight
from peftcore.files import MANIFEST
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.methods.xlora import XLoraConfig
from peftcore.methods.xlora.experts import frozen, lora_paths, read_lora


def test_loras_of_a_base_with_other_embeddings_are_refused(loras: dict[str, str]) -> None:
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[5] += 1
    with pytest.raises(CheckpointError, match=r"holds embeddings of model\.embed_tokens that differ from the model's"):
        get_peft_model(other, config(loras))


def test_loras_that_do_not_fit_are_refused(loras: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter directory"):
        get_peft_model(llama(), config({"0": str(tmp_path / "nowhere")}))
    bert: Any = BertForSequenceClassification(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(TargetError, match="which BertForSequenceClassification does not have"):
        get_peft_model(bert, config(loras))
    for name, options in {"use_dora": {"use_dora": True}, "trained biases": {"bias": "all"}}.items():
        get_peft_model(bert, LoraConfig(r=2, target_modules=["query"], **options)).save_pretrained(tmp_path / name)
        bert = bert.unload()
        with pytest.raises(ConfigError, match=name):
            get_peft_model(bert, XLoraConfig(hidden_size=32, adapters={"0": str(tmp_path / name)}))


@pytest.mark.filterwarnings("ignore")
def test_loras_that_peft_wrote_are_read(tmp_path: Path) -> None:
    hf = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path)  # with the embedding's own weight
    model = mixed({"0": str(tmp_path)})  # a softmax over one LoRA gives it the weight 1
    torch.testing.assert_close(model(tokens()).logits, hf(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_the_paths_of_a_lora_are_those_of_its_tensors() -> None:
    keys = ("h.0.q.lora_A.weight", "h.0.q.lora_B.weight", "wte.lora_embedding_A", "wte.base_layer.weight")
    tensors = {f"base_model.model.{key}": torch.zeros(1) for key in keys}
    assert list(lora_paths(tensors, Path("somewhere"))) == ["h.0.q", "wte"]
    with pytest.raises(CheckpointError, match="somewhere holds no LoRA"):
        lora_paths({"base_model.model.wte.base_layer.weight": torch.zeros(1)}, Path("somewhere"))


def test_a_frozen_expert_has_buffers_and_no_parameters() -> None:
    layer = nn.Linear(3, 2)
    x, weight = torch.randn(4, 3), layer.weight.detach().clone()
    expected = layer(x)
    assert frozen(layer) is layer and not list(layer.parameters())
    assert torch.equal(layer(x), expected) and not layer(x).requires_grad
    layer.requires_grad_(True)
    assert torch.equal(layer.get_buffer("weight"), weight) and not layer(x).requires_grad


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_loras_that_do_more_than_add_at_a_layer_are_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], **options)).save_pretrained(tmp_path)
    bases = {"model.layers.0.self_attn.q_proj": base_weight(nn.Linear(32, 32))}
    with pytest.raises(ConfigError, match=f"mixes plain LoRAs; .* has {named}"):
        read_lora(tmp_path, bases)


def test_tensors_without_a_place_are_refused(loras: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(loras["2"], tmp_path / "more")
    weights = tmp_path / "more" / WEIGHTS_NAME
    extra = {"base_model.model.model.layers.0.self_attn.v_proj.lora_C.weight": torch.zeros(1)}
    save_file({**load_file(weights), **extra}, weights)
    (tmp_path / "more" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_C\.weight, which is no tensor of a plain LoRA"):
        get_peft_model(llama(), config({"0": str(tmp_path / "more")}))
