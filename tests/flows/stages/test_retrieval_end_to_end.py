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

from flows.base.model import load_dequantized, load_tokenizer
from flows.errors import StageError
from flows.gate.rows import row_values
from flows.params import Params
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


def test_an_unfaithful_merge_names_the_cosine(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("embedding", train={"max_steps": 1}, merge=ANYTHING | {"min_cosine": 1.0, "max_kl": 0.0})
    train.run(params, paths)
    with pytest.raises(StageError, match=r"merge\.min_cosine 1 or merge\.min_top1_agreement 0, so nothing was written"):
        merge.run(params, paths)


def test_overlong_texts_are_cut_or_dropped(made: Callable[..., tuple[Params, Paths]]) -> None:
    _, paths = made("embedding", data={"max_length": 12, "overlong": "truncate"})
    rows = parquet.read_table(paths.split("train")).to_pylist()
    lengths = [len(ids) for one in rows for ids in (one["query_input_ids"], one["positive_input_ids"])]
    assert max(lengths) == 12
    report = json.loads(paths.data_report.read_text())
    assert report["splits"]["train"]["truncated"] == len(rows)


def test_queries_are_not_packed(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("embedding", train={"batching": "packed"})
    with pytest.raises(StageError, match="batching is packed, and embedding needs its rows one by one"):
        train.run(params, paths)
