"""Transformers folders of tiny models with tokenizers of the kinds that GGUF knows."""

import string
from pathlib import Path
from typing import Any

import torch
from gguf_models import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peftcore import LoraConfig, get_peft_model
from peftcore.export.gguf_tokenizer import _WORDS

EXPRESSIONS = {name: words for words, name in _WORDS.items()}


CORPUS = [
    string.printable,
    "Hello world hello numbers 1234 2024 return def it's isn't",
    "Grüße Köln naïve café 北京",
] * 20


def byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    first: list[Any] = []
    if kind in EXPRESSIONS:
        first = [pre_tokenizers.Split(Regex(EXPRESSIONS[kind]), "isolated")]
    elif kind == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, whole]) if first else whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>", "<|end|>"]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def saved(folder: Path, family: str, tokenizer: Tokenizer, adds_bos: bool = True, **options: Any) -> Any:
    """A model's folder with its tokenizer; gives the model."""
    if adds_bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", number)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    model = tiny(family, vocab_size=tokenizer.get_vocab_size() + 5, **options)
    model.save_pretrained(folder)
    return model


def adapted(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()
