"""Pairs of answers and labelled texts through the stages: prepared, trained, judged, merged, and judged by the gate."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized
from flows.errors import DataError, StageError
from flows.gate.rows import row_values
from flows.params import Params
from flows.paths import Paths
from flows.stages import evaluate, merge, prepare, train
from flows.stages.reevaluate import measure
from peftcore import PeftConfig, PeftModel

PAIRS: dict[str, Any] = {"kind": "preference", "near_duplicates": "keep"}
CHARACTERS = {"scorer": "length", "name": "characters", "options": {"unit": "characters"}}
MARKED: dict[str, Any] = {"kind": "unpaired_preference", "near_duplicates": "keep"}
TEXTS: dict[str, Any] = {"kind": "classification", "near_duplicates": "keep"}


def answers(number: int) -> dict[str, Any]:
    book = f"book{number // 4}"
    prompt = f"How much is {number} and 1?"
    row = {"prompt": prompt, "chosen": f"{number + 1}.", "rejected": "I do not know.", "book": book}
    return row | {"margin": number % 4 / 2}


def marked(number: int) -> dict[str, Any]:
    good = number % 2 == 0
    row = {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}." if good else "I do not know."}
    return row | {"label": good, "book": f"book{number // 4}"}


def text(number: int) -> dict[str, Any]:
    # one class in three is as frequent as the two others together
    label = ("warm", "cold", "warm", "wet")[number % 4]
    return {"text": f"{label} number {number}", "label": label, "book": f"book{number // 4}"}


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> Callable[..., tuple[Params, Paths]]:
    """`made(objective, train={...})`: parameters of that objective, and its rows prepared."""

    def make(objective: str, **sections: dict[str, Any]) -> tuple[Params, Paths]:
        kind, row = {"classification": (TEXTS, text), "kto": (MARKED, marked)}.get(objective, (PAIRS, answers))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(100)))
        sections["train"] = {"objective": objective, **sections.get("train", {})}
        scorers = [] if objective == "reward" else [CHARACTERS, "exact_match"]  # a reward model gives no answers
        data = kind | sections.pop("data", {})
        params = tiny_params(data=data, evaluate={"scorers": scorers}, **sections)
        prepare.run(params, Paths(tmp_path))
        return params, Paths(tmp_path)

    return make


def metrics_of(paths: Paths) -> dict[str, Any]:
    return json.loads(paths.evaluation_metrics.read_text())


def assert_measured_alike(
    params: Params,
    paths: Paths,
    rows: list[dict[str, Any]],
    labels: list[str] | None = None,
    metrics: tuple[str, ...] = ("accuracy", "characters", "exact_match"),
) -> None:
    """An adapter that is measured again, as a champion on new test rows, has the losses that its evaluation found.

    It also has the metrics that a rule compares.
    """
    places = {"base": str(paths.base), "adapter": str(paths.adapter), "test": str(paths.split("test"))}
    task = {"version": "v0.1.0", "params": params.model_dump(), "rows": len(rows), "labels": labels, **places}
    answered = [row["id"] for row in rows if row.get("adapter_characters") is not None]
    limits = {"answered": answered, "max_new_tokens": params.evaluate.max_new_tokens, "root": str(paths.root)}
    table = measure(task | {"metrics": list(metrics)} | limits)
    again = table.to_pylist()
    for metric in metrics:
        told = row_values(pyarrow.Table.from_pylist(rows), metric)
        assert row_values(table, metric) == told and told is not None, metric
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    for name in ("tokens", "weight", "adapter_loss"):
        assert [row[name] for row in again] == pytest.approx([row[name] for row in rows], abs=1e-6), name


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_pairs_are_trained_judged_and_merged(made: Callable[..., tuple[Params, Paths]], objective: str) -> None:
    params, paths = made(objective, train={"preference": {"beta": 0.5}})
    train.run(params, paths)
    log = [json.loads(line) for line in paths.training_log.read_text().splitlines()]
    assert all(record["accuracy"] is not None and record["reward_margin"] is not None for record in log)
    assert log[-1]["reward_margin"] > log[0]["reward_margin"]
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    base, adapter = metrics["base"], metrics["adapter"]
    for name, side in (("base", base), ("adapter", adapter)):
        assert side["loss"] == pytest.approx(sum(row[f"{name}_loss"] for row in rows) / len(rows))
        assert side["accuracy"] == pytest.approx(sum(row[f"{name}_margin"] > 0 for row in rows) / len(rows))
    assert adapter["loss"] < base["loss"] and adapter["margin"] > base["margin"]
    assert metrics["gain"]["margin"] == adapter["margin"] - base["margin"]
    if objective == "dpo":
        assert base["loss"] == pytest.approx(math.log(2))  # the base is the reference
        assert adapter["reward_accuracy"] > 0.9
        assert adapter["reward_margin"] == pytest.approx(0.5 * metrics["gain"]["margin"], rel=1e-6)
    assert metrics["loss_function"].startswith("Dpo(beta=0.5" if objective == "dpo" else "Orpo(beta=0.5")
    assert {"rouge_l", "ended", "tokens_per_second"} < adapter.keys() and metrics["generated_rows"] == 6
    assert json.loads(paths.samples.read_text())[0].keys() == {"id", "slice", "prompt", "reference", "base", "adapter"}
    assert_measured_alike(params, paths, rows)
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["tokens"] > 0


def test_marked_answers_are_trained_judged_and_merged(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("kto", train={"kto": {"beta": 0.5}})
    train.run(params, paths)
    log = [json.loads(line) for line in paths.training_log.read_text().splitlines()]
    assert all(record["accuracy"] is not None for record in log)
    assert log[-1]["reward_margin"] > 0.1
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    base, adapter = metrics["base"], metrics["adapter"]
    for name, side in (("base", base), ("adapter", adapter)):
        for metric in ("loss", "accuracy", "margin"):
            assert side[metric] == pytest.approx(sum(row[f"{name}_{metric}"] for row in rows) / len(rows)), metric
    assert base["loss"] == 0.5 and base["accuracy"] == 0.5 and base["margin"] == 0  # the base is the reference
    assert adapter["loss"] < 0.45 and adapter["accuracy"] > 0.5
    rewards = {good: [row["reward"] for row in rows if row["desirable"] is good] for good in (True, False)}
    means = {good: sum(values) / len(values) for good, values in rewards.items()}
    assert adapter["reward_margin"] == pytest.approx(means[True] - means[False])
    for row in rows:  # the loss of equation 7, from the row's reward and the reference point
        gain = (row["reward"] - 0.5 * adapter["kl"]) * (1 if row["desirable"] else -1)
        assert row["adapter_loss"] == pytest.approx(1 / (1 + math.exp(gain)))
        assert row["adapter_margin"] == pytest.approx(gain / 0.5)
    answered = [row for row in rows if row["adapter_answer"] is not None]
    assert answered and all(row["desirable"] for row in answered)
    assert metrics["loss_function"].startswith("Kto(beta=0.5")
    assert_measured_alike(params, paths, rows)
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["tokens"] > 0


def test_a_reward_model_is_trained_judged_and_merged(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("reward", train={"epochs": 4.0, "reward": {"center_rewards_coefficient": 0.01}})
    train.run(params, paths)
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "SEQ_CLS"
    log = [json.loads(line) for line in paths.training_log.read_text().splitlines()]
    assert all(record["accuracy"] is not None and record["reward_margin"] is not None for record in log)
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    base, adapter = metrics["base"], metrics["adapter"]
    assert (base["loss"], base["accuracy"], base["margin"]) == (pytest.approx(math.log(2)), 0.5, 0.0)
    for name, side in (("base", base), ("adapter", adapter)):
        for metric in ("loss", "accuracy", "margin"):
            assert side[metric] == pytest.approx(sum(row[f"{name}_{metric}"] for row in rows) / len(rows)), metric
    assert adapter["accuracy"] == 1.0 and adapter["loss"] < 0.3
    names = ["reward"]
    model: Any = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, names), paths.adapter)
    row, prepared = rows[0], parquet.read_table(paths.split("test")).to_pylist()[0]
    for side in ("chosen", "rejected"):
        alone = model(torch.tensor([prepared[f"{side}_input_ids"]])).logits.item()
        assert row[f"{side}_reward"] == pytest.approx(alone, abs=0.05)  # bfloat16, and other rows in its batch
    assert row["adapter_margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"])
    centre = 0.01 * (row["chosen_reward"] + row["rejected_reward"]) ** 2
    assert row["adapter_loss"] == pytest.approx(math.log1p(math.exp(-row["adapter_margin"])) + centre)
    assert metrics["loss_function"] == "BradleyTerry(center_rewards_coefficient=0.01)"
    assert json.loads(paths.samples.read_text())[0]["reference"] == prepared["chosen"]
    assert_measured_alike(params, paths, rows, metrics=("accuracy", "margin"))
    merge.run(params, paths)
    report = json.loads(paths.merge_report.read_text())
    assert report["tokens"] == params.merge.rows and report["top1_agreement"] == 1.0
    merged: Any = AutoModelForSequenceClassification.from_pretrained(paths.merged, dtype=torch.bfloat16).eval()
    assert merged.config.num_labels == 1
    ids = torch.tensor([prepared["chosen_input_ids"]])
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


def test_margins_of_pairs_reach_the_loss(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("reward", data={"margin_column": "margin"}, train={"max_steps": 2})
    rows = parquet.read_table(paths.split("test")).to_pylist()
    assert {row["margin"] for row in rows} <= {0.0, 0.5, 1.0, 1.5} and len({row["margin"] for row in rows}) > 1
    train.run(params, paths)
    evaluate.run(params, paths)
    for row, result in zip(rows, parquet.read_table(paths.evaluation_rows).to_pylist(), strict=True):
        expected = math.log1p(math.exp(row["margin"] - result["adapter_margin"]))
        assert result["adapter_loss"] == pytest.approx(expected)
        assert result["base_loss"] == pytest.approx(math.log1p(math.exp(row["margin"])))


def test_equal_answers_are_refused_before_training(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("reward")
    rows = [json.loads(line) for line in (paths.root / "rows.jsonl").read_text().splitlines()]
    for row in rows[::9]:
        row["rejected"] = row["chosen"]
    (paths.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.run(params, paths)
    with pytest.raises(DataError, match=r"chosen and rejected: the same in \d+ of \d+ rows"):
        train.run(params, paths)
    assert not paths.adapter.exists()


def test_a_reward_that_is_not_finite_stops_the_evaluation(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("reward", train={"max_steps": 1})
    train.run(params, paths)
    model: Any = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, ["reward"]), paths.adapter)
    with torch.no_grad():
        model.score.current().weight.fill_(torch.inf)
    model.save_pretrained(paths.adapter)
    with pytest.raises(StageError, match=r"12 of 12 pairs have rewards that are not finite.*lower train.learning_rate"):
        evaluate.run(params, paths)
    assert not paths.evaluation_metrics.exists()


def test_texts_are_classified_and_merging_keeps_the_head(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("classification", train={"epochs": 4.0, "classification": {"class_weights": "balanced"}})
    train.run(params, paths)
    assert PeftConfig.from_pretrained(paths.adapter).task_type == "SEQ_CLS"
    evaluate.run(params, paths)
    metrics, rows = metrics_of(paths), parquet.read_table(paths.evaluation_rows).to_pylist()
    names = json.loads(paths.labels.read_text())
    assert sorted(names) == ["cold", "warm", "wet"]
    train_labels = [row["label"] for row in parquet.read_table(paths.split("train")).to_pylist()]
    counts = [train_labels.count(number) for number in range(3)]
    prior = [(count + 1) / (len(train_labels) + 3) for count in counts]
    expected = -sum(math.log(prior[names.index(row["label"])]) for row in rows) / len(rows)
    assert metrics["base"]["loss"] == pytest.approx(expected)
    assert {row["base_prediction"] for row in rows} == {"warm"}
    right = [row["adapter_prediction"] == row["label"] for row in rows]
    assert metrics["adapter"]["accuracy"] == pytest.approx(sum(right) / len(right))
    figures = {"loss", "accuracy", "macro_f1", "characters", "exact_match"}
    assert metrics["adapter"].keys() == figures == metrics["base"].keys()
    assert metrics["adapter"]["exact_match"] == pytest.approx(metrics["adapter"]["accuracy"])
    assert "generated_rows" not in metrics
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert_measured_alike(params, paths, rows, names)
    merge.run(params, paths)
    merged = AutoModelForSequenceClassification.from_pretrained(paths.merged, dtype=torch.bfloat16).eval()
    unmerged = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, names), paths.adapter)
    assert merged.config.id2label == dict(enumerate(names))
    ids = torch.tensor([load_tokenizer(paths.base)("wet number 3")["input_ids"]])
    torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("objective", "batching"), [("dpo", "packed"), ("classification", "padding_free")])
def test_rows_that_count_one_by_one_are_not_packed(
    made: Callable[..., tuple[Params, Paths]], objective: str, batching: str
) -> None:
    params, paths = made(objective, train={"batching": batching})
    with pytest.raises(StageError, match=f"batching is {batching}, and {objective} needs its rows one by one"):
        train.run(params, paths)


@pytest.mark.parametrize("stage", [train, evaluate, merge])
def test_rows_of_another_kind_are_refused_by_name(made: Callable[..., tuple[Params, Paths]], stage: Any) -> None:
    params, paths = made("dpo")
    other = params.model_copy(update={"train": params.train.model_copy(update={"objective": "classification"})})
    paths.labels.write_text("[]")
    (paths.adapter).mkdir()
    with pytest.raises(
        StageError, match=r"needs classification rows, and .*parquet holds preference rows; set data\.k"
    ):
        stage.run(other, paths)


def test_an_automatic_rank_is_for_chats(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made("dpo", method={"r": "auto"})
    with pytest.raises(StageError, match=r"method\.r is auto, whose search supports sft only"):
        train.run(params, paths)


def test_a_start_from_data_sees_the_chosen_answers(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made(
        "dpo", method={"options": {"init_lora_weights": "eva", "eva_config": {}}}, train={"max_steps": 2}
    )
    train.run(params, paths)
    assert json.loads(paths.training_summary.read_text())["steps"] == 2


def test_weights_of_one_are_no_weights_and_others_change_the_training(
    prepared: Paths, tiny_params: Callable[..., Params]
) -> None:
    source = prepared.root / "rows.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    params = tiny_params(train={"max_steps": 2})

    def adapter(weights: Callable[[int], dict[str, float]]) -> bytes:
        source.write_text("".join(json.dumps(row | weights(number)) + "\n" for number, row in enumerate(rows)))
        prepare.run(params, prepared)
        train.run(params, prepared)
        return (prepared.adapter / "adapter_model.safetensors").read_bytes()

    without = adapter(lambda _: {})
    assert adapter(lambda _: {"weight": 1.0}) == without
    assert adapter(lambda number: {"weight": 1.0 + number % 3}) != without
