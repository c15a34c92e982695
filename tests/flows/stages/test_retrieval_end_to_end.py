"""Queries with passages through the stages: prepared, trained, evaluated, merged, and measured again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized
from flows.errors import StageError
from flows.evaluation.embedding_fidelity import EmbeddingFidelity
from flows.gate.rows import row_values
from flows.params import Merge, Params
from flows.paths import Paths
from flows.stages import evaluate, merge, prepare, train
from flows.stages.reevaluate import measure
from peftcore import PeftConfig, PeftModel
from peftcore.train import RANKING_METRICS

DATA: dict[str, Any] = {"kind": "retrieval", "near_duplicates": "keep"}
FLOAT32 = {"storage": "none", "compute_dtype": "float32"}
ANYTHING = {"max_kl": 10.0, "min_top1_agreement": 0.0, "min_cosine": 0.5}


def row(number: int) -> dict[str, Any]:
    texts = {"query": f"How much is {number} and 1?", "positive": f"It is {number + 1}."}
    if number % 2 == 0:
        texts["negatives"] = [f"It is not {number}.", f"Nobody knows {number}."]  # type: ignore[assignment]
    return texts | {"book": f"book{number // 4}"}


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> Callable[..., tuple[Params, Paths]]:
    """`made(objective, train={...})`: parameters of that objective, and its rows prepared."""

    def make(objective: str, **sections: dict[str, Any]) -> tuple[Params, Paths]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(100)))
        sections["train"] = {"objective": objective, **sections.get("train", {})}
        params = tiny_params(data=DATA | sections.pop("data", {}), quantization=FLOAT32, **sections)
        prepare.run(params, Paths(tmp_path))
        return params, Paths(tmp_path)

    return make


def metrics_of(paths: Paths) -> dict[str, Any]:
    return json.loads(paths.evaluation_metrics.read_text())


def assert_measured_alike(params: Params, paths: Paths, rows: list[dict[str, Any]]) -> None:
    """An adapter that is measured again has the losses and metrics that its evaluation found."""
    places = {"base": str(paths.base), "adapter": str(paths.adapter), "test": str(paths.split("test"))}
    task = {"version": "v0.1.0", "params": params.model_dump(), "rows": len(rows), "labels": None, **places}
    limits = {"answered": [], "max_new_tokens": 8, "root": str(paths.root), "metrics": list(RANKING_METRICS)}
    table = measure(task | limits)
    for metric in ("loss", *RANKING_METRICS):
        expected = [one[f"adapter_{metric}"] for one in rows]
        assert row_values(table, metric) == pytest.approx(expected, abs=1e-5), metric


def test_texts_are_embedded_searched_and_merged(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made(
        "embedding", train={"epochs": 2.0, "embedding": {"pooling": "last", "symmetric": True}}, merge=ANYTHING
    )
    report = json.loads(paths.data_report.read_text())
    checks = {one["check"]: one["severity"] for one in report["doctor"]["findings"]}
    assert checks["passages"] == "ok" and checks["hard negatives"] == "warning"
    train.run(params, paths)
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "FEATURE_EXTRACTION"
    log = [json.loads(line) for line in paths.training_log.read_text().splitlines()]
    assert all(record["accuracy"] is not None for record in log if record["loss"] is not None)
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    assert metrics["adapter"].keys() == metrics["base"].keys() == {"loss", *RANKING_METRICS}
    for side in ("base", "adapter"):
        for name in ("loss", *RANKING_METRICS):
            assert metrics[side][name] == pytest.approx(sum(one[f"{side}_{name}"] for one in rows) / len(rows)), name
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert metrics["loss_function"] == "Contrastive(scale=20.0, symmetric=True, mask_false_negatives=True)"
    # the ranks, from embeddings that are computed one by one
    model: Any = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, []), paths.adapter).eval()
    texts = parquet.read_table(paths.split("test")).to_pylist()[: len(rows)]
    tokenizer = load_tokenizer(paths.base)

    @torch.no_grad()
    def vector(of: Any, text: str) -> torch.Tensor:
        hidden = of(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
        return F.normalize(hidden[0, -1], dim=-1)

    corpus = {text for one in texts for text in (one["positive"], *one["negatives"])}
    vectors = {text: vector(model, text) for text in corpus}
    for one, values in zip(texts, rows, strict=True):
        query = vector(model, one["query"])
        scores = {text: float(query @ each) for text, each in vectors.items()}
        rank = sum(score >= scores[one["positive"]] - 1e-6 for score in scores.values())
        assert values["adapter_recall_at_1"] == (rank == 1)
        assert values["adapter_mrr_at_10"] == pytest.approx(1 / rank if rank <= 10 else 0)
    sample = json.loads(paths.samples.read_text())[0]
    assert sample["prompt"] == texts[0]["query"] and sample["adapter"].startswith(("rank ", "not among"))
    assert_measured_alike(params, paths, rows)
    merge.run(params, paths)
    merged = AutoModel.from_pretrained(paths.merged, dtype=torch.float32).eval()
    report = json.loads(paths.merge_report.read_text())
    assert report["cosine"] > 0.9999 and report["tokens"] == 6
    torch.testing.assert_close(vector(merged, "It is 4."), vector(model, "It is 4."), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_passages_are_reranked_and_merged(made: Callable[..., tuple[Params, Paths]], loss: str) -> None:
    params, paths = made("reranker", train={"epochs": 2.0, "reranker": {"loss": loss, "negatives": 3}}, merge=ANYTHING)
    train.run(params, paths)
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "SEQ_CLS"
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    assert metrics["adapter"].keys() == metrics["base"].keys() == {"loss", *RANKING_METRICS}
    texts = parquet.read_table(paths.split("test")).to_pylist()[: len(rows)]
    counts = [1 + (len(one["negatives"]) or 3) for one in texts]
    assert [one["base_recall_at_1"] for one in rows] == pytest.approx([1 / count for count in counts])  # no head
    assert metrics["baseline"] == "passages in random order"
    model: Any = PeftModel.from_pretrained(
        load_dequantized(paths.base, params.quantization, ["relevance"]), paths.adapter
    ).eval()
    tokenizer = load_tokenizer(paths.base)

    @torch.no_grad()
    def score(of: Any, query: str, passage: str) -> float:
        return float(of(input_ids=torch.tensor([tokenizer(query, passage)["input_ids"]])).logits[0, 0])

    for one, values in zip(texts, rows, strict=True):
        if one["negatives"]:
            scores = [score(model, one["query"], passage) for passage in (one["positive"], *one["negatives"])]
            assert values["adapter_recall_at_1"] == (scores[0] > max(scores[1:]))
    assert_measured_alike(params, paths, rows)
    merge.run(params, paths)
    merged = AutoModelForSequenceClassification.from_pretrained(paths.merged, dtype=torch.float32).eval()
    assert score(merged, "a?", "b.") == pytest.approx(score(model, "a?", "b."), abs=1e-4)


def test_a_merge_of_other_embeddings_is_refused_by_their_cosine() -> None:
    measured = EmbeddingFidelity(0.0, 1.0, 0.5, 0.5, 8, cosine=0.9, least_cosine=0.8)
    limits = Merge(min_cosine=0.95)
    with pytest.raises(StageError, match=r"max_kl 0\.05, merge\.min_cosine 0\.95 or .*original: cosine 0\.90000"):
        merge._chosen(limits, {"original": measured})
    assert merge._chosen(Merge(min_cosine=0.9), {"original": measured}) == "original"


def test_overlong_texts_are_cut_or_dropped(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("embedding")
    rows = parquet.read_table(paths.split("train")).to_pylist()
    limit = max(len(one["query_input_ids"]) for one in rows) + 2
    longer = [row(n) | ({"positive": f"It is {n + 1}, " * 9} if n % 2 else {}) for n in range(100)]
    (paths.root / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in longer))
    reports = {}
    for overlong in ("truncate", "drop"):
        data = params.data.model_copy(update={"max_length": limit, "overlong": overlong})
        prepare.run(params.model_copy(update={"data": data}), paths)
        rows = parquet.read_table(paths.split("train")).to_pylist()
        assert max(len(one["positive_input_ids"]) for one in rows) <= limit
        reports[overlong] = json.loads(paths.data_report.read_text())
    assert reports["truncate"]["splits"]["train"]["truncated"] > 5 and reports["truncate"]["dropped"] == {}
    assert reports["drop"]["dropped"] == {f"longer than {limit} tokens": 50}


def test_queries_are_not_packed(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("embedding", train={"batching": "packed"})
    with pytest.raises(StageError, match="batching is packed, and embedding needs its rows one by one"):
        train.run(params, paths)
