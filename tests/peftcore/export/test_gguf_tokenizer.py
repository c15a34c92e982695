"""A GGUF tokenizer splits text like the original tokenizer."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_folders import CORPUS, adapted, byte_level, saved
from gguf_models import LlamaCpp
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer

from peftcore.export import export_gguf_merged

TEXTS = (
    "Hello world",
    " It's 2024, isn't IT? 1234567 numbers!",
    "def f(x):\n    return x+1\n\n\n  # two  spaces",
    "Grüße aus Köln – naïve café, 北京 🙂",
    "<|user|>hello<|end|> done",
)


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
