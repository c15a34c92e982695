"""Figures of embeddings of a tiny encoder against a search text by text."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from flows.evaluation.embedding_fidelity import embedding_fidelity
from flows.evaluation.embeddings import embeddings, ranking_result, retrieval_values, row_tokens, texts_of
from flows.evaluation.fidelity import Reference
from flows.params import Params

PARAMS = Params.model_validate(
    {
        "data": {"source": "a.jsonl", "kind": "retrieval"},
        "train": {"objective": "embedding", "embedding": {"scale": 3.0}},
        "evaluate": {"batch_size": 2, "samples": 1},
    }
)


def encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=40, **sizes), add_pooling_layer=False).eval()


def rows() -> list[dict[str, Any]]:
    return [
        {
            **{"id": f"r{n}", "slice": f"s{n % 2}", "query": f"q{n}", "positive": f"p{n}", "weight": 1.0 + n},
            "query_input_ids": [2, 10 + n],
            "positive_input_ids": [2, 20 + n, 3],
            "negatives_input_ids": [[2, 30 + n]] if n else [],
        }
        for n in range(5)
    ]


def vector(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return F.normalize(model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0), dim=-1)


def test_texts_have_the_vectors_of_each_alone() -> None:
    model, texts = encoder(), texts_of(rows())
    assert len(texts) == 14
    for text, each in zip(texts, embeddings(model, texts, 0, 3, "mean", True), strict=True):
        torch.testing.assert_close(each, vector(model, list(text)), rtol=1e-5, atol=1e-6)


def test_values_are_those_of_a_search_text_by_text() -> None:
    model, data = encoder(), rows()
    values = retrieval_values(PARAMS, model, data, 0)
    passages = [row["positive_input_ids"] for row in data] + [ids for row in data for ids in row["negatives_input_ids"]]
    vectors = torch.stack([vector(model, ids) for ids in passages])
    for number, row in enumerate(data):
        scores = vectors @ vector(model, row["query_input_ids"])
        loss = F.cross_entropy(3 * scores[None], torch.tensor([number]))
        assert values["loss"][number].item() == pytest.approx(loss.item(), rel=1e-5)
        rank = int((scores >= scores[number]).sum())
        assert values["mrr_at_10"][number].item() == pytest.approx(1 / rank)


def test_the_result_has_each_rows_values_and_weighs_losses_alone() -> None:
    data = rows()
    values = {side: retrieval_values(PARAMS, encoder(seed), data, 0) for seed, side in enumerate(("base", "adapter"))}
    result = ranking_result(PARAMS, data, values, row_tokens(data), [row["positive"] for row in data])
    table = result.table.to_pylist()
    losses, weights = [row["adapter_loss"] for row in table], [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / 15
    assert result.metrics["adapter"]["loss"] == pytest.approx(expected)
    assert result.metrics["base"]["recall_at_5"] == sum(row["base_recall_at_5"] for row in table) / 5
    gain = result.metrics["adapter"]["mrr_at_10"] - result.metrics["base"]["mrr_at_10"]
    assert result.metrics["gain"]["mrr_at_10"] == pytest.approx(gain)
    assert [row["tokens"] for row in table] == [5] * 5
    rank = round(1 / table[0]["adapter_mrr_at_10"])
    assert result.samples[0]["adapter"] == f"rank {rank}" and result.samples[0]["reference"] == "p0"


def test_a_model_is_faithful_to_itself_and_not_to_another() -> None:
    reference = Reference(encoder(), rows(), 0, 2)
    same, other = (embedding_fidelity(PARAMS, reference, encoder(seed)) for seed in (0, 1))
    assert same.kl == pytest.approx(0, abs=1e-9) and same.top1_agreement == 1 and same.tokens == 5
    assert same.cosine == pytest.approx(1, abs=1e-6) and same.loss == pytest.approx(same.reference_loss)
    assert other.least_cosine < other.cosine < 0.9 and other.kl > 1e-4
    assert str(same).startswith("cosine 1.0")
