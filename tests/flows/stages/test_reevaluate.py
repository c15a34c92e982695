"""Losses of an adapter on given test rows: the first rows of a file, by the run's own objective.

`test_objectives_end_to_end.py` compares them with those of the evaluate stage.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from flows.base.model import load_dequantized
from flows.params import Params
from flows.paths import Paths
from flows.runtime import task as task_process
from flows.stages.reevaluate import adapter_losses, adapter_values, measure
from peftcore import LoraConfig, PeftModel, get_peft_model

ROW = {"input_ids": [1, 5, 9, 7, 2], "labels": [-100, -100, 9, 7, 2]}
PAIR = {
    **{f"chosen_{name}": values for name, values in ROW.items()},
    "rejected_input_ids": [1, 5, 8, 2],
    "rejected_labels": [-100, -100, 8, 2],
}


def small_model(**options: Any) -> PeftModel:
    """A Llama with random weights in float32, and an adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=2, target_modules="all-linear", **options))


def params(objective: str, **train: Any) -> Params:
    data = {"source": "rows.jsonl", "kind": "chat" if objective == "sft" else "preference"}
    return Params.model_validate({"data": data, "train": {"objective": objective, **train}})


def losses_of(model: PeftModel, ids: list[int], labels: list[int]) -> torch.Tensor:
    """By hand: the loss of each supervised token, without padding and without a batch."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(labels[1:]), reduction="none")[torch.tensor(labels[1:]) != -100]


def test_a_chats_loss_is_the_mean_over_its_supervised_tokens() -> None:
    model = small_model(init_lora_weights=False)
    long = {"input_ids": [1, 5, 9, 7, 4, 3, 6, 2], "labels": [-100] * 6 + [6, 2], "weight": 0.5}
    found = adapter_losses(params("sft"), model, [ROW | {"weight": 1.0}, long], 0)
    expected = [losses_of(model, row["input_ids"], row["labels"]) for row in (ROW, long)]
    assert found.means == pytest.approx([float(one.mean()) for one in expected], abs=1e-5)
    assert list(found.tokens) == [3, 2]


def test_an_adapter_that_changes_nothing_is_as_likely_to_prefer_either_answer() -> None:
    """DPO compares the adapter with its own base, so every pair has a loss of log 2."""
    found = adapter_losses(params("dpo"), small_model(), [PAIR, PAIR | {"weight": 2.5}], 0)
    assert found.means == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert list(found.tokens) == [5, 5] and list(found.weights) == [1.0, 2.5]


def test_a_pairs_loss_is_that_of_its_margin_over_the_base() -> None:
    model = small_model(init_lora_weights=False)
    (loss,) = adapter_losses(params("dpo", preference={"beta": 0.3}), model, [PAIR], 0).means

    def margin() -> float:
        chosen, rejected = (
            losses_of(model, PAIR[f"{side}_input_ids"], PAIR[f"{side}_labels"]).sum() for side in ("chosen", "rejected")
        )
        return float(rejected - chosen)

    with_adapter = margin()
    with model.disable_adapter():
        reference = margin()
    expected = math.log1p(math.exp(-0.3 * (with_adapter - reference)))  # arXiv:2305.18290, equation 7
    assert loss == pytest.approx(expected, abs=1e-5) and abs(with_adapter - reference) > 0.01


@pytest.fixture
def task(prepared: Paths, tiny_params: Callable[..., Params]) -> dict[str, Any]:
    """A task on the first five prepared test rows, with an adapter of random weights."""
    run = tiny_params()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_dequantized(prepared.base, run.quantization), config).save_pretrained(prepared.adapter)
    places = {"base": str(prepared.base), "adapter": str(prepared.adapter), "test": str(prepared.split("test"))}
    return {"version": "v0.1.0", "params": run.model_dump(), "rows": 5, "labels": None, **places}


def run_main(task: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "task.json").write_text(json.dumps(task))
    monkeypatch.setattr(task_process, "watch_parent", lambda: None)  # the tests must not end with their parent
    monkeypatch.setattr(sys, "argv", ["reevaluate", str(folder / "task.json"), str(folder / "rows.parquet")])
    task_process.run_task(measure, parquet.write_table)
    return folder / "rows.parquet"


def test_the_first_rows_of_the_file_are_measured_and_written(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written = parquet.read_table(run_main(task, tmp_path, monkeypatch))
    assert written.column_names == ["id", "tokens", "weight", "adapter_loss"]
    rows = parquet.read_table(task["test"]).to_pylist()[:5]
    assert written["id"].to_pylist() == [row["id"] for row in rows]
    assert written["tokens"].to_pylist() == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert written.equals(measure(task)), "the same again"
    captured = capfd.readouterr()
    assert captured.out == "" and "evaluate v0.1.0 again" in captured.err


def test_what_cannot_be_measured_leaves_its_reason_beside_the_rows(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(task["base"]) / "config.json").unlink()
    with pytest.raises(SystemExit) as ended:
        run_main(task, tmp_path, monkeypatch)
    assert ended.value.code == 1
    assert "config.json is damaged or missing" in (tmp_path / "rows.txt").read_text()
    assert not (tmp_path / "rows.parquet").exists()


def test_metrics_that_rules_compare_are_measured_on_the_answered_rows(task: dict[str, Any]) -> None:
    params = Params.model_validate(task["params"] | {"evaluate": {"scorers": ["length", "exact_match"]}})
    rows = parquet.read_table(task["test"]).to_pylist()[:5]
    answered = [rows[1]["id"], rows[4]["id"]]
    more = {"metrics": ["length", "rouge_l"], "answered": answered, "max_new_tokens": 3, "root": "."}
    table = measure(task | {"params": params.model_dump()} | more)
    assert table.column_names[:4] == ["id", "tokens", "weight", "adapter_loss"]
    assert table.column_names[4:] == ["adapter_answer", "adapter_rouge_l", "adapter_ended", "adapter_length"]
    for column in ("adapter_rouge_l", "adapter_ended", "adapter_length"):
        assert [value is not None for value in table[column].to_pylist()] == [False, True, False, False, True]
    assert table.select(["id", "tokens", "weight", "adapter_loss"]).equals(measure(task)), "the losses stay"


def test_the_accuracy_of_pairs_follows_from_margins() -> None:
    run = params("dpo")
    model = small_model(init_lora_weights=False)
    _, columns = adapter_values(run, model, [PAIR], 0)
    chosen, rejected = (
        losses_of(model, PAIR[f"{side}_input_ids"], PAIR[f"{side}_labels"]).sum() for side in ("chosen", "rejected")
    )
    assert columns["adapter_margin"] == pytest.approx([float(rejected - chosen)], abs=1e-4)
