"""Routers: names, tags, rules, sticky shares, centroids of embeddings, fallbacks; Arrow against its definition."""

import random
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import minilm
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from flows.data.docstrings import pairs
from peftcore import IA3Config, LoraConfig, get_peft_model
from peftcore.composition import Weighted
from peftcore.errors import RoutingError
from peftcore.routing import ByName, ByRule, ByTag, Centroids, FirstOf, Request, Shares, arrow_gate
from peftcore.routing.embedding import TextEmbedder
from peftcore.routing.gates import prototype


def test_names_tags_rules_and_the_first_opinion() -> None:
    router = FirstOf(
        [
            ByName(["sql", "chat"]),
            ByTag({"gold": {"sql": 0.5, "chat": 0.5}, "silver": "chat"}),
            ByRule([(lambda request: len(request.text) > 10, "long")]),
        ],
        fallback="rest",
    )
    for request, expected in (
        (Request(adapter="sql", tags=frozenset({"silver"})), "sql"),
        (Request(adapter="unknown", tags=frozenset({"silver", "gold"})), {"sql": 0.5, "chat": 0.5}),
        (Request(tags=frozenset({"silver"})), "chat"),
        (Request(text="a text that is long"), "long"),
        (Request(), "rest"),
    ):
        assert router.route(request) == expected
    assert FirstOf([ByName([])]).route(Request()) is None


def test_shares_are_sticky_and_as_large_as_they_say() -> None:
    shares = Shares({"new": 1, "old": 3})
    found = {key: shares.route(Request(key=str(key))) for key in range(4000)}
    assert found == {key: shares.route(Request(key=str(key))) for key in range(4000)}
    assert Counter(found.values())["new"] == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)
    wider = Shares({"new": 2, "old": 2})
    assert all(wider.route(Request(key=str(key))) == "new" for key, name in found.items() if name == "new")
    other = Shares({"new": 1, "old": 3}, salt="another week")
    assert sum(other.route(Request(key=str(key))) != name for key, name in found.items()) > 1000
    assert Shares({None: 1.0}).route(Request()) == "__base__"
    for wrong in ({}, {"a": -1.0, "b": 2.0}, {"a": 0.0}):
        with pytest.raises(RoutingError, match="give weights of at least 0, and one above"):
            Shares(wrong)  # type: ignore[arg-type]


def letters(texts: Any) -> Tensor:
    """How often each letter stands in a text (n, 26)."""
    return torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in texts])


def test_a_text_goes_to_the_adapter_whose_texts_it_resembles() -> None:
    router = Centroids.of(letters, {"a": ["aaa b", "aa"], "z": ["zz y", "zzzz"]}, at_least=0.5)
    assert router.route(Request(text="aab")) == "a" and router.route(Request(text="yzz")) == "z"
    assert router.route(Request(text="mnop")) is None
    expected = F.normalize(F.normalize(letters(["aaa b", "aa"]), dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(router.similarities(["aab"])[0, 0], F.normalize(letters(["aab"]))[0] @ expected)
    with pytest.raises(RoutingError, match=r"\['a'\] have no texts"):
        Centroids.of(letters, {"a": []})


def test_an_embedding_is_the_mean_over_the_text_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embed = TextEmbedder(tmp_path, batch_size=2)
    texts = ["a", "a longer text", "another"]
    torch.testing.assert_close(embed(texts), torch.cat([embed([text]) for text in texts]), atol=1e-5, rtol=0)
    assert embed([]).shape == (0, 16)


def experts() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 8)).double()
    for number, name in enumerate("abc"):
        config = LoraConfig(r=2 + number, target_modules=["0"], init_lora_weights=False)
        model = model if number else get_peft_model(model, config, name)
        if number:
            model.add_adapter(name, config)
    return model.double().eval()


def test_a_prototype_is_the_first_right_singular_vector() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 12, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    expected = torch.linalg.svd(b @ a)[2][0]
    assert abs(float(prototype(a, b) @ expected)) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_arrow_is_what_its_paper_says(top_k: int | None) -> None:
    model, x = experts(), torch.randn(5, 12, dtype=torch.float64)
    layer = model[0]
    with torch.no_grad():
        base, changes, scores = layer.base_layer(x), [], []
        for name in "abc":
            delta = layer.adapters[name].delta_weight()
            changes.append(x @ delta.T)
            scores.append((x @ torch.linalg.svd(delta)[2][0]).abs() / 0.5)
        score = torch.stack(scores, -1)
        if top_k is not None:
            score = score.masked_fill(score < score.topk(top_k, -1)[0][:, -1:], -torch.inf)
        expected = base + (score.softmax(-1)[:, None] * torch.stack(changes, -1)).sum(-1)
        gate = arrow_gate(["a", "b", "c"], top_k, temperature=0.5)
        torch.testing.assert_close(model(x, adapter_names=gate), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x, adapter_names=gate), expected, atol=1e-12, rtol=0)  # with gradients
    assert Weighted({"a": 1.0}) != gate


def test_what_arrow_cannot_do_is_refused() -> None:
    with pytest.raises(RoutingError, match="temperature must be above 0, got 0"):
        arrow_gate(["a"], temperature=0)
    with pytest.raises(RoutingError, match="top_k must be from 1 to 1, got 2"):
        arrow_gate(["a"], top_k=2)
    model = experts()
    model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(RoutingError, match="Arrow needs low-rank adapters; IA3 at 0 is not low-rank"):
        model(torch.randn(2, 12, dtype=torch.float64), adapter_names=arrow_gate(["a", "ia3"]))


@pytest.mark.slow
def test_minilm_finds_the_package_that_a_function_is_from(tmp_path: Path) -> None:
    """Centroids of 40 functions of each of the standard library's eight largest packages, asked of 16 others."""
    functions = list(pairs(Path(sysconfig.get_paths()["stdlib"])))
    largest = Counter(pair.module.split(".")[0] for pair in functions).most_common(8)
    own = {name: [p.source for p in functions if p.module.split(".")[0] == name] for name, _ in largest}
    chosen = {name: random.Random(0).sample(texts, 56) for name, texts in own.items()}
    embed = TextEmbedder(minilm.fetched(tmp_path), max_length=128)
    router = Centroids.of(embed, {name: texts[:40] for name, texts in chosen.items()})
    right = [router.route(Request(text=text)) == name for name, texts in chosen.items() for text in texts[40:]]
    assert len(right) == 128 and sum(right) > 64  # 16 by chance
