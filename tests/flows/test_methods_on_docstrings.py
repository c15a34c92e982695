"""Methods of every kind learn the pipeline's own task on the real base: SmolLM2 in bf16, 16 steps of 8 rows.

Each takes more than a minute. `tests/peftcore/test_learning.py` trains every method on a tiny base within seconds.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

import peftcore
from flows.base.folder import load_tokenizer, padding_id
from flows.data.rows import read_rows
from peftcore import get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS, BATCH, LONGEST = 16, 8, 128
ATTENTION = ["q_proj", "v_proj"]
METHODS: dict[str, tuple[Callable[[], Any], float, float]] = {
    "DoRA": (lambda: peftcore.LoraConfig(r=8, use_dora=True, target_modules=ATTENTION), 1e-3, 0.6),
    "IA3": (lambda: peftcore.IA3Config(task_type="CAUSAL_LM"), 1e-2, 0.8),
    "OFT": (lambda: peftcore.OFTConfig(oft_block_size=32, target_modules=ATTENTION), 1e-3, 0.9),
    "LN tuning": (lambda: peftcore.LNTuningConfig(), 3e-3, 0.8),
    "prompt tuning": (lambda: peftcore.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16), 3e-2, 0.1),
    "prefix tuning": (
        lambda: peftcore.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, init_weights="zero"),
        1e-2,
        0.35,
    ),
}
"""{method: (its configuration, learning rate, nats that it must take off the base's validation loss)}.

The rows are those of the running Python's library, so the base's loss is not the same everywhere.
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fetched base and the prepared rows: the checkout's own, or made in a clone of it."""
    if (ROOT / "artifacts" / "data" / "report.json").exists():
        return ROOT / "artifacts"
    clone = tmp_path_factory.mktemp("docstrings") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["dvc", "repro", "prepare"], cwd=clone, env=environment, check=True, capture_output=True)
    return clone / "artifacts"


def short_rows(artifacts: Path, split: str, count: int) -> Dataset:
    rows = read_rows(artifacts / "data" / f"{split}.parquet", ["input_ids", "labels"])
    return Dataset.from_list([row for row in rows if len(row["input_ids"]) <= LONGEST][:count])


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method: str, artifacts: Path, tmp_path: Path) -> None:
    make, rate, gain = METHODS[method]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(artifacts / "base", dtype=torch.bfloat16)
    trainer = AdapterTrainer(
        model=get_peft_model(base, make()),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=STEPS // 4,
            lr_scheduler_type="cosine",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            prediction_loss_only=True,
        ),
        train_dataset=short_rows(artifacts, "train", STEPS * BATCH),
        eval_dataset=short_rows(artifacts, "validation", 32),
        data_collator=RightPaddingCollator(padding_id(load_tokenizer(artifacts / "base"))),
    )
    with trainer.model.disable_adapter():
        before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before - trainer.evaluate()["eval_loss"] > gain
