"""Sources with targets through the stages: a tiny T5 learns to write the target, and the merged model writes it too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from flows.base.folder import load_tokenizer
from flows.data.rows import read_rows
from flows.errors import BaseModelError, DataError
from flows.evaluation.generation import generate_answers
from flows.gate.rows import mean_value, row_values
from flows.params import Params
from flows.paths import Paths
from flows.stages import detect, evaluate, fetch, merge, prepare, train
from flows.stages.reevaluate import measure
from peftcore import PeftConfig

CHARACTERS = {"scorer": "length", "name": "characters", "options": {"unit": "characters"}}


def task(number: int) -> dict[str, Any]:
    """Four letters, of which the target repeats the first two."""
    letters = "abcd"
    source = "".join(letters[(number >> shift) % 4] for shift in (0, 2, 4)) + f"{number}"
    return {"source": source, "target": source[:2], "book": f"book{number // 4}"}


@pytest.fixture
def paths(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Paths:
    """A tiny T5 as its authors publish one: no chat template, padding as the decoder's first token."""
    torch.manual_seed(0)
    tokenizer.chat_template, tokenizer.pad_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "source")
    config = T5Config(
        vocab_size=len(tokenizer),
        **{"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
        **{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id},
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(task(n)) + "\n" for n in range(100)))
    return Paths(tmp_path)


@pytest.fixture
def writing(tiny_params: Callable[..., Params]) -> Callable[..., Params]:
    """`writing(train={...})`: parameters of this objective on the tiny T5."""

    def make(**sections: dict[str, Any]) -> Params:
        given: dict[str, dict[str, Any]] = {
            "data": {"kind": "seq2seq", "near_duplicates": "keep"},
            "train": {"objective": "seq2seq", "epochs": 4.0, "learning_rate": 0.02},
            "base": {"source": "path:source"},
            "quantization": {"storage": "none", "compute_dtype": "float32"},
            "evaluate": {"scorers": [CHARACTERS, "exact_match"]},
        }
        for name, section in sections.items():
            given[name] = given.get(name, {}) | section
        return tiny_params(**given)

    return make


def test_an_encoder_decoder_is_trained_evaluated_and_merged(paths: Paths, writing: Callable[..., Params]) -> None:
    params = writing()
    for stage in (fetch, detect, prepare, train, evaluate):
        stage.run(params, paths)
    assert json.loads(paths.architecture.read_text())["kind"] == "encoder-decoder"
    report = json.loads(paths.data_report.read_text())
    assert [finding for finding in report["doctor"]["findings"] if finding["severity"] == "error"] == []
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "SEQ_2_SEQ_LM"
    metrics, table = json.loads(paths.evaluation_metrics.read_text()), parquet.read_table(paths.evaluation_rows)
    base, adapter = metrics["base"], metrics["adapter"]
    assert adapter["loss"] < base["loss"] - 1 and metrics["loss_function"] == "cross entropy of target tokens"
    assert adapter["ended"] > base["ended"] and {"perplexity", "rouge_l", "exact_match"} < adapter.keys()
    assert metrics["latency"]["adapter"]["token_ms"] > 0 and metrics["control"] is None
    assert metrics["answers"] == {"max_new_tokens": 8, "longer_known_answers": 0.0}
    for figure in ("rouge_l", "ended", "characters"):
        assert mean_value(table, figure) == pytest.approx(adapter[figure])
    assert_measured_alike(params, paths, table)
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["top1_agreement"] > 0.99
    rows = read_rows(paths.split("test"))
    merged: Any = AutoModelForSeq2SeqLM.from_pretrained(paths.merged).eval()
    written = {row["id"]: row["adapter_answer"] for row in table.to_pylist() if row["adapter_answer"] is not None}
    chosen = [row for row in rows if row["id"] in written]
    sources = [row["input_ids"] for row in chosen]
    answers = generate_answers(merged, load_tokenizer(paths.base), sources, 8, 1).answers
    assert [answer.text for answer in answers] == [written[row["id"]] for row in chosen]


def assert_measured_alike(params: Params, paths: Paths, table: Any) -> None:
    """An adapter that is measured again has the losses and the metrics that its evaluation found."""
    places = {"base": str(paths.base), "adapter": str(paths.adapter), "test": str(paths.split("test"))}
    task = {"version": "v0.1.0", "params": params.model_dump(), "rows": table.num_rows, "labels": None, **places}
    answered = [row["id"] for row in table.to_pylist() if row["adapter_answer"] is not None]
    metrics = ["rouge_l", "ended", "characters", "exact_match"]
    limits = {"answered": answered, "max_new_tokens": params.evaluate.max_new_tokens, "root": str(paths.root)}
    again = measure(task | {"metrics": metrics} | limits)
    for metric in metrics:
        assert row_values(again, metric) == row_values(table, metric) != None, metric  # noqa: E711
    assert again["adapter_loss"].to_pylist() == pytest.approx(table["adapter_loss"].to_pylist(), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    paths: Paths, writing: Callable[..., Params], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    class Killed(BaseException):
        pass

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    params = writing(train={"epochs": 1.0}, quantization={"compute_dtype": dtype})
    fetch.run(params, paths)
    prepare.run(params, paths)
    train.run(params, paths)
    weights = paths.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train.ShowProgress, "on_step_begin", on_step_begin)
        with pytest.raises(Killed):
            train.run(params, paths)
    assert list(paths.checkpoints.glob("*/checkpoint-*")), "it goes on from a checkpoint"
    train.run(params, paths)
    assert weights.read_bytes() == whole


def test_a_decoder_is_no_base_for_targets(paths: Paths, tiny_base: Path, writing: Callable[..., Params]) -> None:
    with pytest.raises(BaseModelError, match=r"seq2seq needs an encoder-decoder such as T5 or BART, and .*LlamaFor"):
        prepare.run(writing(), paths)
    assert not paths.data.exists()


def test_an_encoder_decoder_is_no_base_for_chats(paths: Paths, writing: Callable[..., Params]) -> None:
    fetch.run(writing(), paths)
    (paths.root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(BaseModelError, match=r"needs a decoder.*a T5For.*train\.objective: seq2seq"):
        prepare.run(writing(data={"kind": "chat"}, train={"objective": "sft"}), paths)


def test_faulty_rows_are_told_together_and_nothing_is_written(paths: Paths, writing: Callable[..., Params]) -> None:
    fetch.run(writing(), paths)
    rows = [task(1) | {"target": ""}, task(2), {"source": "a"}, {"target": "a"}, {"input": "a", "target": "b"}]
    (paths.root / "rows.jsonl").write_text("".join(json.dumps(row | {"book": "b"}) + "\n" for row in rows))
    message = r"3 rows cannot be used.*\n.*:1: its target is empty.*\n.*:3: it has no target.*\n.*:4: it has no source"
    with pytest.raises(DataError, match=message):
        prepare.run(writing(), paths)
    assert not paths.data.exists()


def test_overlong_sources_are_cut_and_targets_never(paths: Paths, writing: Callable[..., Params]) -> None:
    params = writing(data={"max_length": 8, "overlong": "truncate"})
    fetch.run(params, paths)
    rows = [task(n) | {"source": f"{n} " * 9} if n % 2 else task(n) | {"target": "long" * 9} for n in range(100)]
    (paths.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.run(params, paths)
    kept = read_rows(paths.split("train"))
    assert all(len(row["input_ids"]) <= 8 >= len(row["labels"]) and len(row["target"]) == 2 for row in kept)
    assert json.loads(paths.data_report.read_text())["dropped"]["longer than 8 tokens"] == 50
