"""The suites of the rules, answered by an adapter in a process of its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.base.model import load_dequantized
from flows.params import Params
from flows.paths import Paths
from flows.runtime import task as task_process
from flows.stages import evaluate
from flows.stages.reevaluate_suites import measure
from peftcore import LoraConfig, get_peft_model

SUITE = "prompts: [{prompt: How much is 1 and 1?, must: [{contain: zzz}]}]"


@pytest.fixture
def task(prepared: Paths, tiny_params: Callable[..., Params]) -> dict[str, Any]:
    """A task for an adapter of random weights, which the evaluate stage has evaluated with the same suite."""
    (prepared.root / "data").mkdir(exist_ok=True)
    (prepared.root / "data" / "support.yaml").write_text(SUITE)
    run = tiny_params(evaluate={"suites": ["data/support.yaml"]})
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_dequantized(prepared.base, run.quantization), config).save_pretrained(prepared.adapter)
    evaluate.run(run, prepared)
    places = {"base": str(prepared.base), "adapter": str(prepared.adapter), "root": str(prepared.root)}
    return {"params": run.model_dump(), "system_prompt": run.data.system_prompt, **places}


def run_main(task: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "task.json").write_text(json.dumps(task))
    monkeypatch.setattr(task_process, "watch_parent", lambda: None)  # the tests must not end with their parent
    monkeypatch.setattr(sys, "argv", ["reevaluate", str(folder / "task.json"), str(folder / "suites.json")])
    task_process.run_task(measure)
    return folder / "suites.json"


def test_the_answers_are_those_of_the_evaluation(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads(Paths(Path(task["root"])).evaluation_suites.read_text())
    assert json.loads(run_main(task, tmp_path, monkeypatch).read_text()) == expected
    assert measure(task | {"system_prompt": "Be brief."})["support"]["content"] != expected["support"]["content"]


def test_what_cannot_be_measured_leaves_its_reason(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(task["root"]) / "data" / "support.yaml").unlink()
    with pytest.raises(SystemExit) as ended:
        run_main(task, tmp_path, monkeypatch)
    assert ended.value.code == 1
    assert "support.yaml: cannot be read" in (tmp_path / "suites.txt").read_text()
