"""Heads of a base: the published one is loaded whole, and an objective's head fits the kind of the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForTokenClassification,
    MambaConfig,
    ModernBertConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from flows.base.heads import (
    answers_chats,
    check_head,
    head_class,
    is_encoder,
    is_encoder_decoder,
    published_class,
    ranks_passages,
    without_pooler,
)
from flows.base.model import load_original
from flows.base.source import Checkpoint, load
from flows.errors import BaseModelError

BERT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 300, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (LlamaConfig(), (False, False)),
        (MambaConfig(), (False, False)),
        (BertConfig(), (True, False)),
        (BertConfig(architectures=["BertForMaskedLM"]), (True, False)),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), (False, False)),
        (T5Config(), (False, True)),
        (BartConfig(), (False, True)),
        (BartConfig(is_encoder_decoder=False, is_decoder=True, architectures=["BartForCausalLM"]), (False, False)),
    ],
)
def test_the_kind_follows_from_the_configuration(config: Any, kinds: tuple[bool, bool]) -> None:
    assert (is_encoder(config), is_encoder_decoder(config)) == kinds


@pytest.mark.parametrize("made", [BertModel, BertForMaskedLM, BertLMHeadModel, T5ForConditionalGeneration])
def test_a_published_base_is_loaded_with_each_of_its_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, made: Any
) -> None:
    torch.manual_seed(0)
    config = T5Config(**T5) if made is T5ForConditionalGeneration else BertConfig(**BERT)
    original = made(config).bfloat16()
    original.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load("path:here", Checkpoint(tmp_path))
    assert type(loaded) is made
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_without_a_task_labels_choose_the_head() -> None:
    assert head_class(None, None).__name__ == "AutoModelForCausalLM"
    assert head_class(None, ["a", "b"]).__name__ == "AutoModelForSequenceClassification"
    assert head_class("TOKEN_CLS", ["a", "b"]).__name__ == "AutoModelForTokenClassification"
    assert published_class(T5Config()).__name__ == "AutoModelForSeq2SeqLM"


def test_an_encoder_gets_a_head_for_tags(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = BertModel(BertConfig(**BERT))
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tagger: Any = load_original(tmp_path, torch.float32, ["B-X", "I-X", "O"], "TOKEN_CLS")
    assert type(tagger) is BertForTokenClassification and tagger.config.id2label == {0: "B-X", 1: "I-X", 2: "O"}
    kept = encoder.encoder.layer[0].attention.self.query.weight
    assert torch.equal(tagger.bert.encoder.layer[0].attention.self.query.weight, kept)


def test_a_decoder_gets_a_head_for_tags(tiny_base: Path) -> None:
    tagger = load_original(tiny_base, torch.float32, ["B-X", "O"], "TOKEN_CLS")
    assert type(tagger) is LlamaForTokenClassification


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (LlamaConfig(), "SEQ_2_SEQ_LM", "seq2seq needs an encoder-decoder such as T5 or BART, and .* a LlamaConfig"),
        (BertConfig(), "SEQ_2_SEQ_LM", "seq2seq needs an encoder-decoder"),
        (BertConfig(), "CAUSAL_LM", "needs a decoder.*train.objective: classification, token_classification"),
        (T5Config(), "CAUSAL_LM", "needs a decoder.*train.objective: seq2seq"),
        (MambaConfig(), "TOKEN_CLS", "transformers has no ModelForTokenClassification for base.source, a MambaConfig"),
    ],
)
def test_a_base_of_another_kind_is_refused(tmp_path: Path, config: Any, task: str, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        check_head(tmp_path, task)


def test_a_damaged_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config.json cannot be read .*run the fetch stage again"):
        check_head(tmp_path, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("bert", "BertModel", "AutoModel"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("xlm-roberta", "XLMRobertaModel", "AutoModel"),
        ("bert", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM", "AutoModelForCausalLM"),
        ("gpt2", "GPT2Model", "AutoModelForCausalLM"),
        ("llama", None, "AutoModelForCausalLM"),
    ],
)
def test_a_base_is_loaded_by_its_architecture(
    tmp_path: Path, model_type: str, architecture: str | None, expected: str
) -> None:
    content = {"model_type": model_type} | ({} if architecture is None else {"architectures": [architecture]})
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert published_class(AutoConfig.from_pretrained(tmp_path)).__name__ == expected
    assert answers_chats(tmp_path) is (expected == "AutoModelForCausalLM")


def test_a_reranker_is_a_classifier_with_one_output() -> None:
    architectures = ["BertForSequenceClassification"]
    assert ranks_passages(BertConfig(architectures=architectures, num_labels=1))
    assert not ranks_passages(BertConfig(architectures=architectures, num_labels=2))
    assert not ranks_passages(BertConfig(architectures=["BertModel"], num_labels=1))


def test_a_pooling_layer_is_left_out_where_there_is_one() -> None:
    assert without_pooler(BertConfig()) == {"add_pooling_layer": False}
    assert without_pooler(LlamaConfig()) == without_pooler(ModernBertConfig()) == {}


def test_a_folder_that_cannot_be_read_is_left_to_loading(tmp_path: Path) -> None:
    assert answers_chats(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert answers_chats(tmp_path)
