"""A whole GGUF of a transformers folder: llama.cpp computes and cuts text as transformers does."""

import json
import string
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import CONTEXT, LlamaCpp, furthest, log_probs, tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peftcore import LoraConfig, get_peft_model
from peftcore.export import ExportError, check_gguf_base, export_gguf_merged
from peftcore.export.gguf_tokenizer import _WORDS

CLOSE = 1e-4
TEXTS = (
    "Hello world",
    " It's 2024, isn't IT? 1234567 numbers!",
    "def f(x):\n    return x+1\n\n\n  # two  spaces",
    "Grüße aus Köln – naïve café, 北京 🙂",
    "<|user|>hello<|end|> done",
)
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


def numbered() -> Tokenizer:
    """Every token is text of its own, which llama.cpp needs to tell log-probabilities."""
    tokens = ["<s>", "</s>", "t", "1", *(f"t{number}" for number in range(1, 61))]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("t", "1")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As the tokenizers of Llama 2 and Mistral are converted from SentencePiece."""
    pieces = [f"<0x{number:02X}>" for number in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer: Any = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator(["▁" + text for text in CORPUS], trainer)
    own = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    for token in sorted(own["vocab"], key=own["vocab"].get):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in own["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
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


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama 3's rotary embedding": ("llama", {"rope_parameters": ROPE, "head_dim": 16}),
    "llama, linear rotary embedding": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_file_says_the_same(kind: str, tmp_path: Path) -> None:
    family, options = MODELS[kind]
    saved(tmp_path / "base", family, numbered(), **options)
    check_gguf_base(tmp_path / "base")
    model = adapted(tmp_path / "base")
    file = export_gguf_merged(tmp_path / "base", model, tmp_path / "merged.gguf", dtype="float32")
    there = partial(LlamaCpp(file).log_probs, vocabulary=model.config.vocab_size)
    assert furthest(there, partial(log_probs, model)) < CLOSE
    with model.disable_adapter():
        assert furthest(there, partial(log_probs, model)) > 0.1


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "llama"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_tokenizer_cuts_alike(kind: str, adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like() if kind == "llama" else byte_level(kind)
    saved(tmp_path / "base", "llama", tokenizer, adds_bos)
    fast = AutoTokenizer.from_pretrained(tmp_path / "base")
    file = export_gguf_merged(tmp_path / "base", adapted(tmp_path / "base"), tmp_path / "merged.gguf")
    there = LlamaCpp(file)
    for text in TEXTS:
        if kind == "llama" and "<|" in text:  # that tokenizer has no such tokens
            continue
        assert there.tokens(text) == fast(text).input_ids, text
    keys = gguf.GGUFReader(file).fields
    assert keys["tokenizer.ggml.pre"].contents() == ("default" if kind == "llama" else kind)
    assert "messages" in keys["tokenizer.chat_template"].contents()


def test_what_cannot_be_written_is_said_before_a_weight_is_read(tmp_path: Path) -> None:
    def refused(said: str, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"not to be read")
        for check in (check_gguf_base, lambda base: export_gguf_merged(base, tmp_path, tmp_path / "out.gguf")):
            with pytest.raises(ExportError, match=said):
                check(folder)
        assert not (tmp_path / "out.gguf").exists()

    def folder(name: str, family: str = "llama", tokenizer: Tokenizer | None = None, **options: Any) -> Path:
        saved(tmp_path / name, family, tokenizer or byte_level("gpt-2"), **options)
        return tmp_path / name

    refused("'gemma' model cannot be exported.*llama, mistral, qwen2, qwen3.*--gguf", folder("gemma", "gemma"))
    refused("hidden_act='gelu'", folder("gelu", hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    refused("rope_type='yarn'", folder("yarn", rope_parameters=yarn))
    (tmp_path / "gelu" / "tokenizer.json").unlink()
    lone = folder("lone")
    (lone / "tokenizer.json").unlink()
    refused("no tokenizer.json", lone)
    pieces = byte_level("gpt-2")
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("must end with ByteLevel", folder("whitespace", tokenizer=pieces))
    other = byte_level("qwen2")
    split = pre_tokenizers.Split(Regex(r"\d+"), "isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    refused("no known name for its pre-tokenizer", folder("other", tokenizer=other))
    refused("its model is 'WordLevel'", folder("words", tokenizer=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}))))
    with pytest.raises(ExportError, match="is not a folder"):
        check_gguf_base(tmp_path / "nowhere")


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    saved(tmp_path / "base", "mistral", byte_level("gpt-2"), sliding_window=CONTEXT // 2)
    file = export_gguf_merged(tmp_path / "base", adapted(tmp_path / "base"), tmp_path / "merged.gguf")
    assert gguf.GGUFReader(file).fields["llama.context_length"].contents() == CONTEXT // 2
