"""Tagged words through the stages, on an encoder and on a decoder: fetched, prepared, trained, evaluated, merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertModel, PreTrainedTokenizerBase

from flows.base.model import load_dequantized
from flows.data.rows import read_rows
from flows.errors import BaseModelError, DataError
from flows.gate.rows import mean_value, row_values
from flows.params import Params
from flows.paths import Paths
from flows.stages import detect, evaluate, fetch, merge, prepare, train
from flows.stages.reevaluate import measure
from peftcore import PeftConfig, PeftModel

TAGGED: dict[str, Any] = {"kind": "token_classification", "near_duplicates": "keep"}
CHARACTERS = {"scorer": "length", "name": "characters", "options": {"unit": "characters"}}


def sentence(number: int) -> dict[str, Any]:
    """A name of one word or two, which begins with a capital, among other words."""
    name = ["Ada"] if number % 2 else ["Bo", "Xu"]
    words = ["so", *name, "met", f"n{number}"]
    tags = ["O", "B-PER", *["I-PER"] * (len(name) - 1), "O", "O"]
    return {"tokens": words, "tags": tags, "book": f"book{number // 4}"}


def write(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def paths(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Paths:
    """A tiny encoder as its authors publish it: without a head, chat template, or end of text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    encoder.save_pretrained(tmp_path / "source")
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = None, None, "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "source")
    write(tmp_path, [sentence(number) for number in range(100)])
    return Paths(tmp_path)


@pytest.fixture
def tagging(tiny_params: Callable[..., Params]) -> Callable[..., Params]:
    """`tagging(train={...})`: parameters of this objective on the tiny encoder."""

    def make(**sections: dict[str, Any]) -> Params:
        options = {"objective": "token_classification", "epochs": 4.0} | sections.pop("train", {})
        base = {"source": "path:source"} | sections.pop("base", {})
        storage = {"storage": "none", "compute_dtype": "float32"} | sections.pop("quantization", {})
        data = TAGGED | sections.pop("data", {})
        evaluation = {"scorers": [CHARACTERS, "exact_match"]} | sections.pop("evaluate", {})
        return tiny_params(data=data, train=options, base=base, quantization=storage, evaluate=evaluation, **sections)

    return make


def test_an_encoder_learns_tags_and_merging_keeps_them(paths: Paths, tagging: Callable[..., Params]) -> None:
    params = tagging()
    for stage in (fetch, detect, prepare, train, evaluate):
        stage.run(params, paths)
    assert json.loads(paths.architecture.read_text())["kind"] == "encoder"
    report = json.loads(paths.data_report.read_text())
    assert report["labels"] == ["B-PER", "I-PER", "O"]
    assert [finding for finding in report["doctor"]["findings"] if finding["severity"] == "error"] == []
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "TOKEN_CLS"
    log = [json.loads(line) for line in paths.training_log.read_text().splitlines()]
    assert log[-1]["accuracy"] > 0.9
    metrics, table = json.loads(paths.evaluation_metrics.read_text()), parquet.read_table(paths.evaluation_rows)
    assert metrics["base"]["entity_f1"] == 0 and metrics["adapter"]["entity_f1"] > 0.9
    assert metrics["loss_function"] == "cross entropy of tags"
    for side in ("base", "adapter"):
        assert mean_value(table, "entity_f1", side) == pytest.approx(metrics[side]["entity_f1"])
    assert metrics["control"] is None and metrics["latency"] is None
    assert_measured_alike(params, paths, table)
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["top1_agreement"] > 0.99
    merged = AutoModelForTokenClassification.from_pretrained(paths.merged).eval()
    base = load_dequantized(paths.base, params.quantization, report["labels"], "TOKEN_CLS")
    ids = torch.tensor([read_rows(paths.split("test"))[0]["input_ids"]])
    torch.testing.assert_close(merged(ids).logits, PeftModel.from_pretrained(base, paths.adapter)(ids).logits)


def assert_measured_alike(params: Params, paths: Paths, table: pyarrow.Table) -> None:
    """An adapter that is measured again has the losses and the metrics that its evaluation found."""
    places = {"base": str(paths.base), "adapter": str(paths.adapter), "test": str(paths.split("test"))}
    names = json.loads(paths.labels.read_text())
    metrics = ["entity_f1", "characters", "exact_match"]
    task = {"version": "v0.1.0", "params": params.model_dump(), "rows": table.num_rows, "labels": names, **places}
    again = measure(task | {"metrics": metrics, "answered": [], "max_new_tokens": 1, "root": str(paths.root)})
    assert again["id"] == table["id"] and again["adapter_prediction"] == table["adapter_prediction"]
    for metric in metrics:
        assert row_values(again, metric) == row_values(table, metric) != None, metric  # noqa: E711
    assert again["adapter_loss"].to_pylist() == pytest.approx(table["adapter_loss"].to_pylist(), abs=1e-6)
    assert "adapter_prediction" not in measure(task).column_names


@pytest.mark.slow
def test_a_decoder_in_4_bits_learns_tags(
    tmp_path: Path, tiny_base: Path, paths: Paths, tagging: Callable[..., Params]
) -> None:
    params = tagging(
        quantization={"storage": "nf4", "compute_dtype": "bfloat16"},
        train={"epochs": 8.0, "token_classification": {"class_weights": "balanced"}},
        merge={"max_kl": 1.0},
    )
    for stage in (prepare, train, evaluate, merge):
        stage.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"] and metrics["adapter"]["entity_f1"] > 0.3


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    paths: Paths, tagging: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    params = tagging(train={"epochs": 1.0})
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


def test_an_encoder_does_not_chat(paths: Paths, tagging: Callable[..., Params]) -> None:
    fetch.run(tagging(), paths)
    (paths.root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    params = tagging(data={"kind": "chat"}, train={"objective": "sft"}, evaluate={"scorers": []})
    with pytest.raises(
        BaseModelError, match=r"needs a decoder such as Llama or GPT-2, and base\.source is a BertModel"
    ):
        prepare.run(params, paths)
    assert not paths.data.exists()


def test_faulty_rows_are_told_together_and_nothing_is_written(paths: Paths, tagging: Callable[..., Params]) -> None:
    fetch.run(tagging(), paths)
    write(paths.root, [sentence(1) | {"tags": ["O"]}, sentence(2), sentence(3) | {"tags": ["O", "PER", "O", "O"]}])
    with pytest.raises(
        DataError, match=r"2 rows cannot be used.*\n.*:1: it has 4 tokens and 1 tags.*\n.*:3: its tag 2"
    ):
        prepare.run(tagging(), paths)
    assert not paths.data.exists()


def test_rows_without_entities_are_not_trained(paths: Paths, tagging: Callable[..., Params]) -> None:
    fetch.run(tagging(), paths)
    prepare.run(tagging(), paths)
    held_out = {row["group"] for split in ("validation", "test") for row in read_rows(paths.split(split))}
    rows = [sentence(number) for number in range(100)]
    write(paths.root, [row if row["book"] in held_out else row | {"tags": ["O"] * len(row["tags"])} for row in rows])
    prepare.run(tagging(), paths)
    with pytest.raises(DataError, match="never in train: B-PER, I-PER"):
        train.run(tagging(), paths)


def test_an_overlong_row_ends_before_an_entity_that_does_not_fit(paths: Paths, tagging: Callable[..., Params]) -> None:
    params = tagging(data={"max_length": 8, "overlong": "truncate"})
    fetch.run(params, paths)
    rows = [sentence(number) for number in range(100)]
    write(paths.root, [row | {"tokens": [f"n{number:02}", *row["tokens"][1:]]} for number, row in enumerate(rows)])
    prepare.run(params, paths)
    train_rows = read_rows(paths.split("train"))
    assert {row["tags"] for row in train_rows} == {"O", "O B-PER"}, "half of the name in 'n02 Bo Xu' is no name"
    assert json.loads(paths.data_report.read_text())["splits"]["train"]["truncated"] == len(train_rows)
