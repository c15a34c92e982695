"""Tiny models and questions shared by the tests of the prompt learners; HF `peft` is the oracle where it can be."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from method_example import randomise
from parity_log import agree
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcore import PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
ENCODER = BertConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    num_labels=3,
    initializer_range=0.2,
)
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=48, eos_token_id=None, initializer_range=0.2
)
T5 = T5Config(
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    vocab_size=64,
    decoder_start_token_id=0,
    eos_token_id=None,
    initializer_factor=1.0,
)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2), "CAUSAL_LM"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), "CAUSAL_LM"),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**DECODER)), "CAUSAL_LM"),
    "llama-cls": (lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER, num_labels=3)), "SEQ_CLS"),
    "bert-cls": (lambda: BertForSequenceClassification(ENCODER), "SEQ_CLS"),
    "bert-tokens": (lambda: BertForTokenClassification(ENCODER), "TOKEN_CLS"),
    "bert-qa": (lambda: BertForQuestionAnswering(BertConfig(**{**ENCODER.to_dict(), "num_labels": 2})), "QUESTION_ANS"),
    "bert-features": (lambda: BertModel(ENCODER), "FEATURE_EXTRACTION"),
    "t5": (lambda: T5ForConditionalGeneration(T5), "SEQ_2_SEQ_LM"),
}
"""{name: (how to make it, its task)}."""


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def batch(rows: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(1, 60, (rows, tokens), generator=torch.Generator().manual_seed(1))


def call(family: str, model: Any, **inputs: Any) -> Tensor:
    """The numbers that a model gives for `batch()`."""
    inputs = {"input_ids": batch(), **inputs}
    if family == "t5":
        inputs = {"decoder_input_ids": batch(2, 4), **inputs}
    with torch.no_grad():
        out = model(**inputs)
    if family == "bert-qa":
        return torch.stack([out.start_logits, out.end_logits])
    return out.last_hidden_state if family == "bert-features" else out.logits


def attach(family: str, config: Any, spread: float = 0.3) -> Any:
    """The family's model with this prompt, moved from its start."""
    model = get_peft_model(build(family), config).eval()
    randomise(model, spread)
    return model


def both_ways(family: str, theirs: Any, ours: Any, folder: Path, spread: float = 0.3, **inputs: Any) -> None:
    """Save with one library, read with the other, and compare what the models compute."""
    hf = peft.get_peft_model(build(family), copy.deepcopy(theirs)).eval()
    randomise(hf, spread)
    hf.save_pretrained(folder / "hf")
    here = PeftModel.from_pretrained(build(family), folder / "hf")
    expected = call(family, hf, **inputs)
    plain = call(family, build(family), **{k: v for k, v in inputs.items() if k != "task_ids"})
    assert expected.shape != plain.shape or (expected - plain).abs().max() > 1e-3
    agree(call(family, here, **inputs), expected, ours.method, family, made_by="peft")

    model = attach(family, ours, spread)
    model.save_pretrained(folder / "ours")
    there = peft.PeftModel.from_pretrained(build(family), folder / "ours").eval()
    result, expected = call(family, model, **inputs), call(family, there, **inputs)
    agree(result, expected, ours.method, family, made_by="peftcore")
