"""Tiny reward models, and pairs of answers without labels, for tests of reward models."""

from typing import Any

import torch
from tiny_pairs import pairs
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from peftcore import LoraConfig, TaskType, get_peft_model

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def decoder(labels: int = 1) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, intermediate_size=48, num_labels=labels, pad_token_id=0, **SIZES)
    return LlamaForSequenceClassification(config)


def encoder() -> Any:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=32, num_labels=1, **SIZES, **dropout)
    )


def adapted(make: Any = decoder, start: bool = False) -> Any:
    """A LoRA with the usual start, or with one that has no factor of zero, and a trained head."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS, init_lora_weights=start)
    return get_peft_model(make(), config)


def answers(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("chosen_input_ids", "rejected_input_ids")} for row in pairs(count, seed=seed)]
