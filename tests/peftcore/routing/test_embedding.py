"""Text embeddings are the mean over the text without padding."""

import random
import sysconfig
from collections import Counter
from pathlib import Path

import minilm
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from flows.data.docstrings import pairs
from peftcore.routing import Centroids, Request
from peftcore.routing.embedding import TextEmbedder


def test_an_embedding_is_the_mean_over_the_text_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embed = TextEmbedder(tmp_path, batch_size=2)
    texts = ["a", "a longer text", "another"]
    torch.testing.assert_close(embed(texts), torch.cat([embed([text]) for text in texts]), atol=1e-5, rtol=0)
    assert embed([]).shape == (0, 16)


@pytest.mark.proof
def test_minilm_finds_the_package_that_a_function_is_from(tmp_path: Path) -> None:
    """Centroids of 20 functions of each of the standard library's eight largest packages, asked of 8 others."""
    functions = list(pairs(Path(sysconfig.get_paths()["stdlib"])))
    largest = Counter(pair.module.split(".")[0] for pair in functions).most_common(8)
    own = {name: [p.source for p in functions if p.module.split(".")[0] == name] for name, _ in largest}
    chosen = {name: random.Random(0).sample(texts, 28) for name, texts in own.items()}
    embed = TextEmbedder(minilm.fetched(tmp_path), max_length=128)
    router = Centroids.of(embed, {name: texts[:20] for name, texts in chosen.items()})
    right = [router.route(Request(text=text)) == name for name, texts in chosen.items() for text in texts[20:]]
    assert len(right) == 64 and sum(right) > 32  # 8 by chance
