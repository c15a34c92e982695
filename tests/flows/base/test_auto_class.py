"""The class that loads a base, by the configurations that models on the hub have."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
)

from flows.base.auto_class import auto_class, generates_text, ranks_passages, without_pooler


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("bert", "BertModel", AutoModel),
        ("bert", "BertForMaskedLM", AutoModel),
        ("xlm-roberta", "XLMRobertaModel", AutoModel),
        ("bert", "BertForSequenceClassification", AutoModelForSequenceClassification),
        ("llama", "LlamaForCausalLM", AutoModelForCausalLM),
        ("qwen3", "Qwen3ForCausalLM", AutoModelForCausalLM),
        ("gpt2", "GPT2Model", AutoModelForCausalLM),
        ("llama", None, AutoModelForCausalLM),
    ],
)
def test_a_base_is_loaded_by_its_architecture(
    tmp_path: Path, model_type: str, architecture: str | None, expected: type
) -> None:
    content = {"model_type": model_type} | ({} if architecture is None else {"architectures": [architecture]})
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert auto_class(AutoConfig.from_pretrained(tmp_path)) is expected
    assert generates_text(tmp_path) is (expected is AutoModelForCausalLM)


def test_a_reranker_is_a_classifier_with_one_output() -> None:
    architectures = ["BertForSequenceClassification"]
    assert ranks_passages(BertConfig(architectures=architectures, num_labels=1))
    assert not ranks_passages(BertConfig(architectures=architectures, num_labels=2))
    assert not ranks_passages(BertConfig(architectures=["BertModel"], num_labels=1))


def test_a_pooling_layer_is_left_out_where_there_is_one() -> None:
    assert without_pooler(BertConfig()) == {"add_pooling_layer": False}
    assert without_pooler(LlamaConfig()) == without_pooler(ModernBertConfig()) == {}


def test_a_folder_that_cannot_be_read_is_left_to_loading(tmp_path: Path) -> None:
    assert generates_text(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert generates_text(tmp_path)
